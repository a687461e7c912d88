"""A weights folder in the official layout with tiny random weights: stands in for the real one in
tests.

    python tests/tiny_weights.py FOLDER [ReDirector | ReCamMaster | Wan]

Names, keys, layouts and the parts of each network are the published files'; only widths and depths
are small. The pictures made with it are noise, and so are their scores. Beside the weights, for a
rehearsal:
    FOLDER/paths     camera files: the ten evaluation paths, and "static"
    FOLDER/videos    two short videos, with their captions in captions.csv
    FOLDER/packages  a package `mapanything` that stands in for the real one (for PYTHONPATH)
    FOLDER/bin       a program `vipe` that stands in for the real one (for PATH)
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2VLModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import cameras  # noqa: E402
import model  # noqa: E402
import trajectories  # noqa: E402
from data.video import write_video  # noqa: E402
from pretrained import vae  # noqa: E402
from pretrained.weights import (  # noqa: E402
    DIT, IMAGE_FILE, RECAMMASTER, REDIRECTOR, TEXT_FILE, TOKENIZER, VAE_FILE)

TEXT_DIM, IMAGE_DIM, VOCABULARY = 32, 80, 400


def randn(shape, generator):
    """Random weights that keep a signal's size: ones for gains (1-D), 1/sqrt(fan in) for the
    rest."""
    if len(shape) < 2:
        return 0.02 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5


def random_state(shapes, seed):
    """name -> shape into name -> bf16 tensor; norms' gains are about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = randn(shape, generator)
        gain = name.endswith("gamma") or name.endswith(".weight") and len(shape) == 1
        state[name] = (x + 1 if gain else x).bfloat16()
    return state


PARTS = {"ReDirector": dict(image_dim=IMAGE_DIM, camera_dim=24, roce=True),
         "ReCamMaster": dict(in_dim=16, pose_dim=12), "Wan": dict(in_dim=16)}


def dit_shapes(policy="ReDirector", heads=1, layers=2):
    """Shapes of a DiT with every part of a policy's (head size 128, as published)."""
    config = model.Config(dim=128 * heads, num_heads=heads, num_layers=layers, ffn_dim=256, freq_dim=64,
                          text_dim=TEXT_DIM, **PARTS[policy])
    with torch.device("meta"):
        return {name: x.shape for name, x in model.DiT(config).state_dict().items()}


def vae_shapes(width=4):
    with torch.device("meta"):
        codec = vae.VAE(16, [width, width, 2 * width, 4 * width, 4 * width], 2, [False, True, True])
    return {name: x.shape for name, x in codec.state_dict().items()}


def text_shapes(layers=2, attention=64, heads=1, ffn=64):
    shapes = {"token_embedding.weight": (VOCABULARY, TEXT_DIM), "norm.weight": (TEXT_DIM,)}
    for i in range(layers):
        block = f"blocks.{i}."
        shapes |= {block + f"attn.{x}.weight": (attention, TEXT_DIM) for x in "qkv"}
        shapes |= {block + "attn.o.weight": (TEXT_DIM, attention), block + "norm1.weight": (TEXT_DIM,),
                   block + "norm2.weight": (TEXT_DIM,), block + "ffn.gate.0.weight": (ffn, TEXT_DIM),
                   block + "ffn.fc1.weight": (ffn, TEXT_DIM), block + "ffn.fc2.weight": (TEXT_DIM, ffn),
                   block + "pos_embedding.embedding.weight": (32, heads)}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def image_shapes(layers=3, patch=14, pixels=224):
    d = IMAGE_DIM
    shapes = {"log_scale": (), "visual.cls_embedding": (1, 1, d), "visual.head": (d, 24),
              "visual.patch_embedding.weight": (d, 3, patch, patch),
              "visual.pos_embedding": (1, (pixels // patch) ** 2 + 1, d)}
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"visual.{norm}.weight": (d,), f"visual.{norm}.bias": (d,)}
    for i in range(layers):
        for name, out, width in (("attn.to_qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.0", 4 * d, d),
                                 ("mlp.2", d, 4 * d)):
            shapes |= {f"visual.transformer.{i}.{name}.weight": (out, width),
                       f"visual.transformer.{i}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"visual.transformer.{i}.{norm}.{name}": (d,) for name in ("weight", "bias")}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def save_tokenizer(folder):
    """A small unigram tokenizer of umT5's kind: <pad> 0, </s> 1, <unk> 2, </s> added at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    text = 5 * "a camera moves slowly through a street at night, a bear walks on rocks, a man dances. "
    text += " ".join(map(chr, range(33, 127)))
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY - 10, special_tokens=["<pad>", "</s>", "<unk>"],
                                      unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text.split(" "), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)


# ---- reward models ----

QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def save_qwen_base(folder):
    """Config and tokenizer of a small Qwen2-VL -> how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "pretrained/prompts").glob("*.txt")]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=list(QWEN_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=QWEN_TOKENS[0],
                                   eos_token=QWEN_TOKENS[2])
    fast.save_pretrained(folder)
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in (
        ("bos", "endoftext"), ("eos", "im_end"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        ("vision", "vision_pad"), ("image", "image_pad"), ("video", "video_pad"))}
    config = {"model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1,
              "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": len(fast), "rms_norm_eps": 1e-6,
              "max_position_embeddings": 32768, "tie_word_embeddings": True, **ids,
              "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
              "vision_config": {"depth": 1, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 1, "in_chans": 3,
                                "hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
                                "spatial_patch_size": 14, "temporal_patch_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    return len(fast)


def qwen_shapes(base, tokens, head):
    """Shapes of a reward model over the Qwen2-VL in folder `base`, under the published keys; head:
    rm_head's."""
    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = tokens
    with torch.device("meta"):
        body = Qwen2VLModel(config).state_dict()
    shapes = {name.replace("language_model.", "model."): x.shape for name, x in body.items()}
    return shapes | {name: torch.Size(shape) for name, shape in head.items()}


VIDEO_REWARD = {  # what is read of the published model_config.json
    "data_config": {"max_frame_pixels": 448 * 448, "num_frames": None, "fps": 2.0,
                    "prompt_template_type": "detailed_special"},
    "model_config": {"output_dim": 1, "reward_token": "special"},
    "peft_lora_config": {"lora_r": 64, "lora_alpha": 128},
    "inference_config": {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811,
                         "TA_mean": 2.8105, "TA_std": 2.5121}}


def write_reward_models(folder, seed):
    """VideoReward and HPSv3, random, in the official layout."""
    for name in ("VideoReward/checkpoint-1", "HPSv3"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "VideoReward/model_config.json").write_text(json.dumps(VIDEO_REWARD))
    base = folder / "Qwen2-VL-2B-Instruct"
    shapes = qwen_shapes(base, save_qwen_base(base) + 3, {"rm_head.weight": (1, 32)})
    state = {f"base_model.model.{name}": x for name, x in random_state(shapes, seed).items()}
    torch.save(state, folder / "VideoReward/checkpoint-1/model.pth")
    base = folder / "Qwen2-VL-7B-Instruct"
    sizes = {0: (32, 32), 3: (16, 32), 5: (2, 16)}
    head = {f"rm_head.{i}.weight": size for i, size in sizes.items()}
    head |= {f"rm_head.{i}.bias": size[:1] for i, size in sizes.items()}
    shapes = qwen_shapes(base, save_qwen_base(base) + 1, head)
    save_file(random_state(shapes, seed + 1), folder / "HPSv3/HPSv3.safetensors")


# ---- programs of others ----

MAPANYTHING = '''"""Stands in for MapAnything: cameras that depend on the pixels, and mean nothing."""
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class MapAnything(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, folder, strict=True):
        model = cls()
        weight = load_file(f"{folder}/model.safetensors")["info_sharing.weight"]
        model.weight = torch.nn.Parameter(weight.float())
        return model

    def infer(self, views, **options):
        """A view's thumbnail through a matrix gives its rotation vector and position."""
        seen = [0.1 * torch.tanh(F.adaptive_avg_pool2d(view["img"].float(), 4).flatten(1) @ self.weight.T)
                for view in views]
        out = []
        for x in seen:
            x = x - seen[0]
            c2w = torch.eye(4).to(x).repeat(len(x), 1, 1)
            skew = torch.zeros(len(x), 3, 3).to(x)
            for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
                skew[:, j, k] = -x[:, i]
                skew[:, k, j] = x[:, i]
            c2w[:, :3, :3] = torch.matrix_exp(skew)
            c2w[:, :3, 3] = x[:, 3:]
            height, width = views[0]["img"].shape[-2:]
            focal = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]).to(x)
            out.append({"camera_poses": c2w, "intrinsics": focal.expand(len(x), 3, 3)})
        return out
'''
VIPE = '''#!{python}
"""Stands in for ViPE: vipe infer VIDEO -o OUT -p PRESET writes a straight path for any video."""
import sys
from pathlib import Path

import av
import numpy as np

video, out = Path(sys.argv[2]), Path(sys.argv[4])
with av.open(str(video)) as file:
    frames = [(frame.width, frame.height) for frame in file.decode(video=0)]
c2w = np.tile(np.eye(4), (len(frames), 1, 1))
c2w[:, 2, 3] = 0.01 * np.arange(len(frames))
width, height = frames[0]
intrinsics = np.tile([width, width, width / 2, height / 2], (len(frames), 1))
for kind, data in (("pose", c2w), ("intrinsics", intrinsics)):
    (out / kind).mkdir(parents=True)
    np.savez(out / kind / f"{video.stem}.npz", data=data, inds=np.arange(len(frames)))
'''


def write_stand_ins(folder, seed):
    """Weights and package of a stand-in for MapAnything, and a program for ViPE."""
    (folder / "map-anything").mkdir(exist_ok=True)
    (folder / "map-anything/config.json").write_text(json.dumps({"torch_hub_pretrained": False}))
    state = random_state({"info_sharing.weight": torch.Size((6, 48))}, seed)
    save_file(state, folder / "map-anything/model.safetensors")
    package = folder / "packages/mapanything"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MAPANYTHING)
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin/vipe"
    program.write_text(VIPE.replace("{python}", sys.executable))
    program.chmod(0o755)


def write_videos(folder, frames=13, height=72, width=128):
    """Two videos of a pattern that wanders, and captions."""
    folder.mkdir(exist_ok=True)
    y, x = np.mgrid[:height, :width] / height
    for i in range(2):
        waves = [np.sin(9 * (x + 0.02 * t) + 3 * i) * np.cos(7 * (y - 0.01 * t)) for t in range(frames)]
        video = np.stack([np.stack([wave, wave ** 2, -wave], -1) for wave in waves])
        write_video(folder / f"clip{i}.mp4", (127.5 * (video + 1)).clip(0, 255).astype(np.uint8), 24)
    lines = "file_name,text", "clip0.mp4,a street at night", "clip1.mp4,a bear walks"
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def write(folder, seed=0, policy="ReDirector"):
    """Write all that a run on a published policy reads to folder; returns its Path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dit_shapes(policy)
    if policy == "ReDirector":  # base, and attention laid over it
        base = {name: shape for name, shape in shapes.items() if "rope_phase" not in name}
        attention = {name: shape for name, shape in shapes.items() if ".self_attn." in name}
        save_file(random_state(base, seed), folder / DIT)
        save_file(random_state(attention, seed + 1), folder / REDIRECTOR)
    elif policy == "ReCamMaster":  # one file of mixed types
        added = lambda name: "cam_encoder" in name or "projector" in name
        state = random_state(shapes, seed)
        torch.save({k: x.float() if added(k) else x for k, x in state.items()}, folder / RECAMMASTER)
    else:
        save_file(random_state(shapes, seed), folder / DIT)
    torch.save(random_state(vae_shapes(), seed + 2), folder / VAE_FILE)
    torch.save(random_state(text_shapes(), seed + 3), folder / TEXT_FILE)
    if policy == "ReDirector":
        torch.save(random_state(image_shapes(), seed + 4), folder / IMAGE_FILE)
    save_tokenizer(folder / TOKENIZER)
    write_reward_models(folder, seed + 5)
    write_stand_ins(folder, seed + 7)
    write_videos(folder / "videos")
    (folder / "paths").mkdir(exist_ok=True)
    for name in ("static", *trajectories.PATHS):
        np.savez(folder / f"paths/{name}.npz", c2w=cameras.named_path(name))
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1], policy=(sys.argv[2:] or ["ReDirector"])[0]))
