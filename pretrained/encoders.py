"""What conditions the policy besides cameras and the source's latents: text, the first frame, a
caption.

umT5-XXL and CLIP ViT-H/14 are transformers' own classes, filled from Wan2.1's .pth files by
renaming keys; their shapes are read off the weights. Inference only.
"""
import functools
import html
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from pretrained.vae import load_vae
from pretrained.weights import (
    IMAGE_FILE, TEXT_FILE, TOKENIZER, VAE_FILE, fill, find_policy, first_line, need, read_weights)

TEXT_TOKENS = 512  # every prompt is padded or cut to as many

# Wan's standard negative prompt, for classifier-free guidance
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rename(key, names):
    """Replaces the dotted parts of a key that are in `names`."""
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})(?!\w)", lambda m: names[m[1]], key)


def count(state, pattern):
    """Number of blocks, from the highest index in the keys."""
    return 1 + max(int(m[1]) for m in map(re.compile(pattern).match, state) if m)


# ---- text


# What ftfy.fix_text, which the official pipeline cleans prompts with, makes of single characters:
# curly quotes straight, full-width forms (the negative prompt's commas) narrow, ligatures apart,
# control characters gone.
CHARACTERS = {**dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc"), "'"),
              **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
              **{i: unicodedata.normalize("NFKC", chr(i))
                 for i in [0x3000, *range(0xFF01, 0xFFF0)]},
              0x149: "'n",
              **{ord(x): unicodedata.normalize("NFKC", x)
                 for x in "\u0132\u0133\u01f1\u01f2\u01f3\u01c4\u01c5\u01c6\u01c7\u01c8\u01c9\u01ca"
                 "\u01cb\u01cc\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06"},
              **dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
                               *range(0xFFF9, 0xFFFD)])}


def clean(prompt):
    """As Wan's tokenizer gets it: what ftfy repairs in captions, mojibake as a whole and single
    characters; HTML entities resolved twice, runs of white space made single spaces."""
    # mojibake: UTF-8 that was once read as Windows-1252, or as Latin-1 where that has no character
    try:
        codes = [c.encode("latin-1" if "\x80" <= c <= "\x9f" else "cp1252") for c in prompt]
        prompt = b"".join(codes).decode("utf-8")
    except UnicodeError:
        pass
    prompt = unicodedata.normalize("NFC", prompt.translate(CHARACTERS))
    return " ".join(html.unescape(html.unescape(prompt)).split())


def check_caption(caption, where):
    """ValueError for a caption that holds a special token of the reward models, <|...|>. Their
    official code lets it act: it ends the user's turn, or stands for a picture that is not there.
    """
    found = re.search(r"<\|.*?\|>", caption)
    if found:
        raise ValueError(f"{where}: the caption holds {found[0][:40]}, which is a command to the "
                         "reward models; expected text without <|...|>")


class TextEncoder(nn.Module):
    """umT5's encoder: see load_text_encoder."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, ids, mask):
        """Token ids and mask (B,L) of integers, 1 = token, 0 = padding -> embeddings (B,L,4096),
        zero where the mask is, on the weights' device and in their dtype. ValueError for another
        shape, dtype or id."""
        for x, name in (ids, "ids"), (mask, "mask"):
            if x.dim() != 2 or x.shape != ids.shape or x.is_floating_point() or not x.numel():
                raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}, expected integers, both "
                                 "(B, L)")
        weight = self.model.shared.weight
        if ids.min() < 0 or ids.max() >= len(weight):
            raise ValueError(f"ids: from {ids.min()} to {ids.max()}, the vocabulary has "
                             f"{len(weight)}")
        ids = ids.to(weight.device)
        mask = mask.to(weight.device)
        # nothing attends to padding, so what no prompt of the batch uses needs no computing
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        used = int((mask.any(0) * positions).max().clamp(min=1))
        found = self.model(input_ids=ids[:, :used], attention_mask=mask[:, :used].long())
        hidden = found.last_hidden_state.masked_fill(mask[:, :used, None] == 0, 0)
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - used))

    def embed(self, prompts):
        """List of B strings -> embeddings (B,512,4096), zero beyond each prompt's length (but kept:
        the policy's cross-attention has no mask). ValueError without a tokenizer."""
        if (isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts)
                or not prompts):
            raise ValueError(f"prompts: expected a list of strings, found {prompts!r:.80}")
        if self.tokenizer is None:
            raise ValueError("no tokenizer: give load_text_encoder the folder google/umt5-xxl")
        tokens = self.tokenizer(
            [clean(prompt) for prompt in prompts], padding="max_length", truncation=True,
            max_length=TEXT_TOKENS, add_special_tokens=True, return_tensors="pt")
        return self(tokens.input_ids, tokens.attention_mask)


def load_text_encoder(path, tokenizer_folder=None, device="cpu", dtype=torch.float32):
    """Official `models_t5_umt5-xxl-enc-bf16.pth`, or the same keys in safetensors -> TextEncoder: a
    callable on token ids and mask, with `.embed(prompts)`. tokenizer_folder: if not given,
    `google/umt5-xxl` beside the file, if there. FileNotFoundError; ValueError: the file is no such
    encoder or the folder no tokenizer.
    """
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel  # slow to import
    tokenizer = None
    folder = Path(tokenizer_folder or Path(path).parent / "google/umt5-xxl")
    if tokenizer_folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (the tokenizer's)")
    if folder.is_dir():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                      trust_remote_code=False)
        except Exception as error:  # its readers raise all kinds
            raise ValueError(f"{folder}: no tokenizer ({first_line(error)})") from None
    official = read_weights(path)
    need(path, official, "umT5 encoder", {"token_embedding.weight": 2, "blocks.0.attn.q.weight": 2,
         "blocks.0.ffn.fc1.weight": 2, "blocks.0.pos_embedding.embedding.weight": 2})
    vocabulary, width = official["token_embedding.weight"].shape
    buckets, heads = official["blocks.0.pos_embedding.embedding.weight"].shape
    config = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=len(official["blocks.0.attn.q.weight"]) // heads,
        d_ff=len(official["blocks.0.ffn.fc1.weight"]),
        num_layers=count(official, r"blocks\.(\d+)\."), num_heads=heads,
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    del model.encoder.embed_tokens  # tied to `shared`: filled once
    names = {
        "token_embedding": "shared", "blocks": "encoder.block", "norm": "encoder.final_layer_norm",
        "norm1": "layer.0.layer_norm", "attn": "layer.0.SelfAttention",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm", "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1", "ffn.fc2": "layer.1.DenseReluDense.wo"}
    fill(model, {rename(k, names): v for k, v in official.items()}, path, device, dtype)
    model.encoder.embed_tokens = model.shared
    return TextEncoder(model, tokenizer)


# ---- first frame


class ImageEncoder(nn.Module):
    """CLIP's image tower but for its last block: see load_image_encoder."""

    def __init__(self, model, size):
        super().__init__()
        self.model = model
        self.size = size

    def preprocess(self, images):
        """(B,3,H,W) in [-1,1] -> (B,3,224,224) as CLIP wants it, float32."""
        size = (self.size, self.size)
        x = F.interpolate(images.float(), size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(s, device=x.device).view(3, 1, 1) for s in (CLIP_MEAN, CLIP_STD))
        return (x * 0.5 + 0.5 - mean) / std

    @torch.no_grad()
    def forward(self, images):
        """Images (B,3,H,W) in [-1,1] -> tokens (B,257,1280), the hidden state before the last
        block, on the weights' device and in their dtype. ValueError for another shape, dtype or
        range."""
        if (images.dim() != 4 or images.shape[1] != 3 or not images.numel()
                or not images.is_floating_point()):
            raise ValueError(f"images: {images.dtype} {tuple(images.shape)}, expected floats "
                             "(B, 3, H, W)")
        low, high = images.aminmax()
        if not (low >= -1.5 and high <= 1.5):  # leaves room for a resize's overshoot
            raise ValueError(f"images: values from {low:.3g} to {high:.3g}, expected [-1, 1]")
        weight = self.model.post_layernorm.weight
        x = self.preprocess(images.to(weight.device)).to(weight.dtype)
        return self.model(x).last_hidden_state


def load_image_encoder(path, device="cpu", dtype=torch.float32, num_heads=None):
    """Official `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, or the same keys in
    safetensors -> ImageEncoder, a callable on images; only the `visual.` part is read. num_heads:
    only where the head size isn't 80. FileNotFoundError; ValueError when the file is no such
    encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # slow to import
    official = read_weights(path)
    need(path, official, "CLIP image tower", {
        "visual.patch_embedding.weight": 4, "visual.pos_embedding": 3,
        "visual.transformer.0.mlp.0.weight": 2})
    width, _, patch, _ = official["visual.patch_embedding.weight"].shape
    if width % (num_heads or 80):
        raise ValueError(f"{path}: width {width} does not divide into "
                         f"{f'{num_heads} heads' if num_heads else 'heads of 80; give num_heads'}")
    size = round((official["visual.pos_embedding"].shape[1] - 1) ** 0.5) * patch
    last = count(official, r"visual\.transformer\.(\d+)\.") - 1
    config = CLIPVisionConfig(
        hidden_size=width, num_attention_heads=num_heads or width // 80, num_hidden_layers=last,
        intermediate_size=len(official["visual.transformer.0.mlp.0.weight"]), hidden_act="gelu",
        image_size=size, patch_size=patch)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    model = getattr(model, "vision_model", model)  # one level deeper in transformers 4
    names = {
        "cls_embedding": "embeddings.class_embedding",
        "patch_embedding": "embeddings.patch_embedding",
        "pos_embedding": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm",
        "post_norm": "post_layernorm", "transformer": "encoder.layers", "norm1": "layer_norm1",
        "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2"}
    state = {}
    for key, value in official.items():
        after = ("visual.head", f"visual.transformer.{last}.")
        if not key.startswith("visual.") or key.startswith(after):
            continue  # the text tower, and what comes after the features
        key = rename(key.removeprefix("visual."), names)
        if "attn.to_qkv" in key:
            for name, part in zip("qkv", value.chunk(3)):
                state[key.replace("attn.to_qkv", f"self_attn.{name}_proj")] = part
        elif key == "embeddings.class_embedding":
            state[key] = value.flatten()  # (1,1,1280)
        elif key == "embeddings.position_embedding.weight":
            state[key] = value[0]  # (1,257,1280)
        else:
            state[key] = value
    fill(model, state, path, device, dtype)
    positions = len(model.embeddings.position_embedding.weight)
    model.embeddings.position_ids = torch.arange(positions, device=device)[None]  # in no file
    return ImageEncoder(model, size)


# ---- all that prepares a clip


def open_encoders(weights, device):
    """VAE, text and image encoder (None where the policy takes no image) from a folder of
    weights."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    folder = Path(weights)
    return (load_vae(folder / VAE_FILE, device, dtype),
            load_text_encoder(folder / TEXT_FILE, folder / TOKENIZER, device, dtype),
            load_image_encoder(folder / IMAGE_FILE, device, dtype)
            if "image" in find_policy(weights).parts else None)


# ---- captions, for videos that come without one


@functools.lru_cache(maxsize=1)
def load_captioner(folder_or_id, device, dtype):
    """BLIP-2's processor and model; they stay in memory until `load_captioner.cache_clear()`."""
    from huggingface_hub import snapshot_download
    from transformers import Blip2ForConditionalGeneration, Blip2Processor
    try:
        folder = folder_or_id if Path(folder_or_id).is_dir() else snapshot_download(
            folder_or_id, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        processor = Blip2Processor.from_pretrained(folder, local_files_only=True,
                                                   trust_remote_code=False)
        model = Blip2ForConditionalGeneration.from_pretrained(folder, local_files_only=True,
                                                              trust_remote_code=False)
    except ImportError as error:
        why = first_line(error)
        raise ValueError(f"captioning needs pillow: pip install pillow ({why})") from None
    except Exception as error:  # the libraries raise all kinds
        raise ValueError(f"{folder_or_id}: no BLIP-2 in a local folder or on the hub "
                         f"({first_line(error)}); get one, such as Salesforce/blip2-opt-2.7b, or "
                         "give the caption") from None
    return processor, model.to(device=device, dtype=dtype).eval()


@torch.no_grad()
def describe_frame(frame, folder_or_id="Salesforce/blip2-opt-2.7b", device="cpu",
                   dtype=torch.float32):
    """One frame, uint8 (H,W,3) RGB, array or tensor -> what BLIP-2 (by local folder or hub id) sees
    in it, a string. Made for a clip's middle frame. ValueError for another kind of frame, or
    without the model."""
    frame = torch.as_tensor(frame)
    if frame.dtype != torch.uint8 or frame.dim() != 3 or frame.shape[2] != 3 or not frame.numel():
        raise ValueError(f"frame: {frame.dtype} {tuple(frame.shape)}, expected torch.uint8 "
                         "(H, W, 3)")
    processor, model = load_captioner(str(folder_or_id), str(device), dtype)
    inputs = processor(images=frame.cpu().numpy(), return_tensors="pt").to(device, dtype)
    tokens = model.generate(**inputs, max_new_tokens=20)  # as many as ReDirector's
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
