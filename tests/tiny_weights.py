"""A folder of tiny random weights in the official layout: stands in for the published one in tests.

    python tests/tiny_weights.py FOLDER [ReDirector | ReCamMaster | Wan]

Names, keys, layouts and the parts of each network are the published files'; only widths and depths
are small, and pictures made with it are noise. Beside it, for a rehearsal: paths/ (camera files),
videos/ (two, with captions.csv), packages/ and bin/ (stand-ins for the package mapanything and the
program vipe, for PYTHONPATH and PATH).
"""
import inspect
import json
import sys
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
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

GOLDEN = ROOT / "tests/golden"
TEXT_DIM, IMAGE_DIM = 32, 80  # of the recorded small umT5, which stands in for the text encoder


def random_state(shapes, seed=0):
    """name -> shape into name -> bfloat16 tensor that keeps a signal's size; gains are about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 50
        gain = name.endswith("gamma") or name.endswith(".weight") and len(shape) == 1
        state[name] = (torch.randn(shape, generator=generator) / fan_in ** 0.5 + gain).bfloat16()
    return state


def shapes_of(network, *args):
    """The shapes of network(*args)'s state dict."""
    with torch.device("meta"):
        return {name: x.shape for name, x in network(*args).state_dict().items()}


PARTS = {"ReDirector": dict(image_dim=IMAGE_DIM, camera_dim=24, roce=True),
         "ReCamMaster": dict(in_dim=16, pose_dim=12), "Wan": dict(in_dim=16)}


def dit_shapes(policy="ReDirector", heads=1, layers=2):
    """A DiT with every part of a policy's, heads of 128 as published."""
    return shapes_of(model.DiT, model.Config(
        dim=128 * heads, num_heads=heads, num_layers=layers, ffn_dim=256, freq_dim=64,
        text_dim=TEXT_DIM, **PARTS[policy]))


def vae_shapes(widths=(4, 4, 8, 16, 16), blocks=2, temporal=(False, True, True), z=16):
    return shapes_of(vae.VAE, z, widths, blocks, temporal)


def image_shapes():
    """Those of the recorded small CLIP, but for heads of 80 and 257 positions, as published."""
    sizes = {64: IMAGE_DIM, 192: 3 * IMAGE_DIM, 256: 4 * IMAGE_DIM, 17: 257}
    return {name: tuple(sizes.get(n, n) for n in x.shape)
            for name, x in load_file(GOLDEN / "clip_weights.safetensors").items()}


def save_tokenizer(folder):
    """A small unigram tokenizer of umT5's kind: <pad> 0, </s> 1, <unk> 2, </s> added at the end."""
    words = "<pad> </s> <unk> \u2581a \u2581cat \u2581dog \u2581".split(" ")
    pieces = [*words, *map(chr, range(33, 125))]
    pieces = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)


QWEN_TOKENS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad",
               "image_pad", "video_pad")


def save_qwen_base(folder):
    """Config and tokenizer of a small Qwen2-VL -> how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "pretrained/prompts").glob("*.txt")]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[f"<|{token}|>" for token in QWEN_TOKENS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>")
    fast.save_pretrained(folder)
    ids = {token.removesuffix("_pad") + "_token_id": tokenizer.token_to_id(f"<|{token}|>")
           for token in QWEN_TOKENS[3:]}
    config = {"model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 48,
              "num_attention_heads": 1, "num_hidden_layers": 2, "num_key_value_heads": 1,
              "vocab_size": len(fast), **ids, "bos_token_id": 0, "eos_token_id": 2,
              "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
              "vision_config": {"depth": 1, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 1,
                                "hidden_size": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    return len(fast)


def qwen_state(base, added, heads, seed):
    """The official checkpoint's: the body's under "model.", with `added` tokens; the reward's head."""
    tokens = save_qwen_base(base) + added
    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = tokens
    body = shapes_of(Qwen2VLModel, config)
    shapes = {name.replace("language_model.", "model."): shape for name, shape in body.items()}
    return random_state(shapes | heads, seed)


VIDEO_REWARD = {  # what is read of the published model_config.json
    "data_config": {"max_frame_pixels": 448 * 448, "num_frames": None, "fps": 2.0,
                    "prompt_template_type": "detailed_special"},
    "model_config": {"output_dim": 1, "reward_token": "special"},
    "peft_lora_config": {"lora_r": 64, "lora_alpha": 128},
    "inference_config": {f"{name}_{what}": x for name in ("VQ", "MQ", "TA")
                         for what, x in (("mean", 2.5), ("std", 2.0))}}


def write_reward_models(folder, seed):
    """VideoReward and HPSv3, random, in the official layout; weights of a stand-in for MapAnything."""
    for name in ("VideoReward/checkpoint-1", "HPSv3", "map-anything"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "VideoReward/model_config.json").write_text(json.dumps(VIDEO_REWARD))
    (folder / "map-anything/config.json").write_text("{}")
    state = qwen_state(folder / "Qwen2-VL-2B-Instruct", 3, {"rm_head.weight": (1, 32)}, seed)
    torch.save({f"base_model.model.{name}": x for name, x in state.items()},
               folder / "VideoReward/checkpoint-1/model.pth")
    head = {"0.weight": (32, 32), "0.bias": (32,), "3.weight": (16, 32), "3.bias": (16,),
            "5.weight": (2, 16), "5.bias": (2,)}
    state = qwen_state(folder / "Qwen2-VL-7B-Instruct", 1,
                       {f"rm_head.{name}": shape for name, shape in head.items()}, seed + 1)
    save_file(state, folder / "HPSv3/HPSv3.safetensors")
    state = random_state({"info_sharing.weight": (6, 3)}, seed + 2)
    save_file(state, folder / "map-anything/model.safetensors")


class MapAnything(torch.nn.Module):
    """Stands in for MapAnything: cameras that depend on the pixels, and mean nothing."""
    @classmethod
    def from_pretrained(cls, folder, strict=True):
        model = cls()
        state = load_file(f"{folder}/model.safetensors")
        model.register_buffer("weight", state["info_sharing.weight"].float())
        return model

    def infer(self, views, **options):
        """A view's mean colour through a matrix, less the first's: its rotation vector and position."""
        seen = [0.1 * view["img"].mean((2, 3)) @ self.weight.T for view in views]
        height, width = views[0]["img"].shape[-2:]
        focal = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        out = []
        for x in seen:
            c2w = torch.eye(4).to(x).repeat(len(x), 1, 1)
            turn, c2w[:, :3, 3] = (x - seen[0]).split(3, 1)
            c2w[:, :3, :3] = torch.matrix_exp(torch.linalg.cross(turn[:, None], c2w[:, :3, :3]))
            out.append({"camera_poses": c2w, "intrinsics": focal.to(x).expand(len(x), 3, 3)})
        return out


def vipe(video, out):
    """Stands in for ViPE, `vipe infer VIDEO -o OUT -p PRESET`: a straight path for any video."""
    with av.open(video) as file:
        sizes = [(frame.width, frame.height) for frame in file.decode(video=0)]
    c2w = np.tile(np.eye(4), (len(sizes), 1, 1))
    c2w[:, 2, 3] = 0.01 * np.arange(len(sizes))
    intrinsics = [(width, width, width / 2, height / 2) for width, height in sizes]
    for kind, data in (("pose", c2w), ("intrinsics", intrinsics)):
        (Path(out) / kind).mkdir(parents=True)
        np.savez(Path(out) / kind / f"{Path(video).stem}.npz", data=data, inds=np.arange(len(sizes)))


def write_programs(folder):
    package = f"import torch\nfrom safetensors.torch import load_file\n\n\n{inspect.getsource(MapAnything)}"
    imports = "import sys\nfrom pathlib import Path\nimport av\nimport numpy as np\n\n\n"
    program = (f"#!{sys.executable}\n{imports}"
               f"{inspect.getsource(vipe)}\n\nvipe(sys.argv[2], sys.argv[4])\n")
    for name, text in (("packages/mapanything/__init__.py", ""), ("bin/vipe", program),
                       ("packages/mapanything/models.py", package)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin/vipe").chmod(0o755)


def write_videos(folder, frames=13, height=72, width=128):
    """Two videos of a pattern that wanders, and captions."""
    folder.mkdir(exist_ok=True)
    t, y, x = np.ogrid[:frames, :height, :width]
    for i in range(2):
        wave = np.sin(9 * (x / height + 0.02 * t) + 3 * i) * np.cos(7 * (y / height - 0.01 * t))
        video = np.stack([wave, wave ** 2, -wave], -1)
        write_video(folder / f"clip{i}.mp4", (127.5 * (video + 1)).clip(0, 255).astype(np.uint8), 24)
    (folder / "captions.csv").write_text(
        "file_name,text\nclip0.mp4,a street at night\nclip1.mp4,a bear walks\n")


def write(folder, seed=0, policy="ReDirector"):
    """Write all that a run on a published policy reads to folder; returns its Path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dit = random_state(dit_shapes(policy), seed)
    if policy == "ReDirector":  # base, and attention laid over it
        save_file({name: x for name, x in dit.items() if "rope_phase" not in name}, folder / DIT)
        attention = {name: x.shape for name, x in dit.items() if ".self_attn." in name}
        save_file(random_state(attention, seed + 1), folder / REDIRECTOR)
        torch.save(random_state(image_shapes(), seed + 4), folder / IMAGE_FILE)
    elif policy == "ReCamMaster":  # one file of mixed types
        torch.save({name: x.float() if "cam_encoder" in name or "projector" in name else x
                    for name, x in dit.items()}, folder / RECAMMASTER)
    else:
        save_file(dit, folder / DIT)
    torch.save(random_state(vae_shapes(), seed + 2), folder / VAE_FILE)
    torch.save(load_file(GOLDEN / "umt5_weights.safetensors"), folder / TEXT_FILE)
    save_tokenizer(folder / TOKENIZER)
    write_reward_models(folder, seed + 5)
    write_programs(folder)
    write_videos(folder / "videos")
    (folder / "paths").mkdir(exist_ok=True)
    for name in ("static", *trajectories.PATHS):
        np.savez(folder / f"paths/{name}.npz", c2w=cameras.named_path(name))
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1], policy=(sys.argv[2:] or ["ReDirector"])[0]))
