"""A weights folder in the official layout with tiny random weights: stands in for the real one in tests.

    python tests/tiny_weights.py FOLDER [ReDirector | ReCamMaster | Wan]

Names, keys, layouts and the parts of each network are the published files'; only widths and depths are small.
The pictures made with it are noise. FOLDER/paths gets camera files: the ten evaluation paths, and "static".
"""
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import cameras  # noqa: E402
import model  # noqa: E402
import trajectories  # noqa: E402
from pretrained import vae  # noqa: E402
from pretrained.weights import (  # noqa: E402
    DIT, IMAGE_FILE, RECAMMASTER, REDIRECTOR, TEXT_FILE, TOKENIZER, VAE_FILE)

TEXT_DIM, IMAGE_DIM, VOCABULARY = 32, 80, 400


def randn(shape, generator):
    """Random weights that keep a signal's size: ones for gains (1-D), 1/sqrt(fan in) for the rest."""
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


def write(folder, seed=0, policy="ReDirector"):
    """Write what a run on a published policy reads, reward models apart, to folder; returns its Path."""
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
    (folder / "paths").mkdir(exist_ok=True)
    for name in ("static", *trajectories.PATHS):
        np.save(folder / f"paths/{name}.npy", cameras.named_path(name))
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1], policy=(sys.argv[2:] or ["ReDirector"])[0]))
