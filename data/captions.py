"""A world of captions alone: your own reward on Wan2.1 T2V, which takes only text.

    python train.py --world=captions --captions=prompts.txt --weights=WAN --rewards=my.py:f=1

prompts.txt has one prompt a line. Rewards that compare with a path or a source video are refused:
VideoAlign's, HPSv3's, `exposure` and your own are left.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import rewards
from data.world import World, open_policy
from model import Condition
from pretrained.encoders import NEGATIVE_PROMPT, check_caption, load_text_encoder
from pretrained.reward_models import model_files
from pretrained.vae import load_vae
from pretrained.weights import TEXT_FILE, TOKENIZER, VAE_FILE, find_policy

FPS = 16.0  # of what Wan2.1 T2V was trained on
COMPARING = ("trans", "rot", "sharpness", "flicker", "colour")  # with a path or a source


def embed(weights, prompts, device):
    """Prompts -> their embeddings (L, D) on the CPU, without the zeros at their ends, and the
    length with them."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = load_text_encoder(Path(weights) / TEXT_FILE, Path(weights) / TOKENIZER, device, dtype)
    texts = []
    for prompt in tqdm(prompts, "prompts", disable=len(prompts) < 20):
        text = encoder.embed([prompt])[0].bfloat16().cpu()
        texts.append(text[:1 + int(text.any(1).nonzero().max())].clone())
    return texts, len(text)


def open_captions(config, device):
    """World of the prompts in config.captions. ValueError where policy, prompts or rewards do not
    fit it."""
    policy = find_policy(config.weights)
    if policy.source:
        raise ValueError(f"{config.weights}: {policy.name} takes a source video: expected world = "
                         "clips")
    for item in config.rewards.split(","):
        if item.rpartition("=")[0].strip() in COMPARING:
            raise ValueError(f"rewards: {item}: this world has no path or source to compare with")
    lines = Path(config.captions).read_bytes().decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        check_caption(line, f"{config.captions}: line {number}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts or any("\ufffd" in prompt for prompt in prompts):
        raise ValueError(f"{config.captions}: expected UTF-8 text, one prompt a line")
    (unwanted, *texts), length = embed(config.weights, [NEGATIVE_PROMPT, *prompts], device)
    dit = open_policy(config.weights, None, device)
    codec = load_vae(Path(config.weights) / VAE_FILE, device, dit.patch_embedding.weight.dtype)
    rewarded, reward_weights = rewards.load(
        config.rewards, config.weights, device, park=config.park, grey_mq=config.grey_mq,
        hpsv3_prompt=config.hpsv3_prompt or None)

    def padded(texts):
        return torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x in texts]).to(device)

    def draw(numbers, rngs):
        fps = torch.full((len(numbers),), FPS)
        scene = rewards.Scene(None, None, [prompts[i] for i in numbers], fps)
        return Condition(padded([texts[i] for i in numbers])), scene

    shape = (dit.config.out_dim, (config.frames + 3) // 4, config.height // 8, config.width // 8)
    files = [*policy.files, *(Path(config.weights) / name for name in (VAE_FILE, TEXT_FILE))]
    inputs = {"weights": files + model_files(reward_weights, config.weights),
              "captions": [Path(config.captions)]}
    negative = padded([unwanted])
    return World(dit, codec, shape, len(prompts), draw, negative, rewarded, reward_weights, inputs)
