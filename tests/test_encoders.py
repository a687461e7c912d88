import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pretrained import encoders
from pretrained.encoders import (
    NEGATIVE_PROMPT, clean, describe_frame, load_image_encoder, load_text_encoder)

GOLDEN = Path(__file__).parent / "golden"


# ---- random weights by the official names, and the two networks written out plainly


def umt5_shapes(vocabulary, width, attention, ffn, heads, layers):
    shapes = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{k}.weight": s for k, s in {
            "norm1": (width,), "norm2": (width,), "pos_embedding.embedding": (32, heads),
            "attn.q": (attention, width), "attn.k": (attention, width), "attn.v": (attention, width),
            "attn.o": (width, attention),
            "ffn.gate.0": (ffn, width), "ffn.fc1": (ffn, width), "ffn.fc2": (width, ffn)}.items()}
    return shapes


def clip_shapes(width, layers, size, patch, mlp):
    shapes = {"cls_embedding": (1, 1, width), "pos_embedding": (1, (size // patch) ** 2 + 1, width),
              "patch_embedding.weight": (width, 3, patch, patch), "head": (width, 24)}
    for norm in "pre_norm", "post_norm":
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(layers):
        for k, *shape in (("norm1", width), ("norm2", width), ("attn.to_qkv", 3 * width, width),
                          ("attn.proj", width, width), ("mlp.0", mlp, width), ("mlp.2", width, mlp)):
            shapes |= {f"transformer.{i}.{k}.weight": shape, f"transformer.{i}.{k}.bias": shape[:1]}
    return {f"visual.{k}": s for k, s in shapes.items()} | {"log_scale": (), "textual.norm.weight": (7,)}


def draw(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g) / (math.sqrt(math.prod(s[1:])) if len(s) > 1 else 3)
            + ("norm" in k and k.endswith("weight")) for k, s in shapes.items()}


def umt5(w, ids, mask, heads):
    L, x = ids.shape[1], w["token_embedding.weight"][ids]
    offset = torch.arange(L) - torch.arange(L)[:, None]  # key minus query
    far = 8 + (torch.log(offset.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = 16 * (offset > 0) + torch.where(offset.abs() < 8, offset.abs(), far.clamp(max=15))

    def norm(x, k):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[k]

    for i in range(sum(k.endswith("norm1.weight") for k in w)):
        b = f"blocks.{i}."
        h = norm(x, b + "norm1.weight")
        q, k, v = ((h @ w[f"{b}attn.{n}.weight"].T).unflatten(2, (heads, -1)).transpose(1, 2) for n in "qkv")
        scores = q @ k.mT + w[b + "pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)  # no 1 / sqrt(d)
        scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[b + "attn.o.weight"].T
        h = norm(x, b + "norm2.weight")
        gate = F.gelu(h @ w[b + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w[b + "ffn.fc1.weight"].T)) @ w[b + "ffn.fc2.weight"].T
    return norm(x, "norm.weight") * mask[..., None]


def clip(w, pixels, heads):
    w = {k.removeprefix("visual."): v for k, v in w.items()}
    x = F.conv2d(pixels, w["patch_embedding.weight"], stride=w["patch_embedding.weight"].shape[-1])
    x = torch.cat([w["cls_embedding"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embedding"]

    def norm(x, k):
        return F.layer_norm(x, x.shape[-1:], w[k + ".weight"], w[k + ".bias"], 1e-5)

    def linear(x, k):
        return F.linear(x, w[k + ".weight"], w[k + ".bias"])

    x = norm(x, "pre_norm")
    for i in range(sum(k.endswith("norm1.weight") for k in w) - 1):  # all blocks but the last
        b = f"transformer.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.to_qkv").unflatten(2, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), b + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, b + "norm2"), b + "mlp.0")), b + "mlp.2")
    return x


def far(a, b):
    return (a - b).abs().max().item()


# ---- umT5


def test_umt5_golden():
    encoder = load_text_encoder(GOLDEN / "umt5_weights.safetensors")
    io = load_file(GOLDEN / "umt5_io.safetensors")
    out = encoder(io["ids"], io["mask"])
    assert out.shape == io["embedding"].shape and far(out, io["embedding"]) < 1e-4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A random umT5 and a little tokenizer beside it, as in Wan's folder: (weights, encoder)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("umt5")
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁&", "▁dog", "▁walks"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder / "google/umt5-xxl")
    weights = draw(umt5_shapes(vocabulary=50, width=24, attention=30, ffn=40, heads=6, layers=3))
    torch.save(weights, folder / "umt5.pth")
    return weights, load_text_encoder(folder / "umt5.pth")


def test_umt5_written_out(text):
    weights, encoder = text
    ids = torch.randint(0, 50, (3, 200), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(200) < torch.tensor([200, 150, 1])[:, None]).long()
    assert far(encoder(ids, mask), umt5(weights, ids, mask, 6)) < 1e-4


def test_padding_changes_nothing(text):
    ids = torch.randint(2, 50, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(30) < torch.tensor([12, 7])[:, None]).long()
    out = text[1](ids, mask)
    assert out.shape == (2, 30, 24) and out[0, 12:].abs().max() == 0 and out[1, 7:].abs().max() == 0
    for row, length in enumerate((12, 7)):
        alone = text[1](ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert far(out[row : row + 1, :length], alone) < 1e-5


def test_embed(text):
    weights, encoder = text
    out = encoder.embed(["a cat", "", "a  cat\n&amp;amp; a   dog ", "a " * 600])
    assert out.shape == (4, 512, 24) and out.dtype == torch.float32 and not out.requires_grad
    for row, ids in enumerate([[3, 4, 1], [1], [3, 4, 5, 3, 6, 1], [3] * 511 + [1]]):
        ids = torch.tensor([ids])
        assert far(out[row, : ids.shape[1]], umt5(weights, ids, torch.ones_like(ids), 6)[0]) < 1e-4
        assert (out[row, ids.shape[1] :] == 0).all()


@pytest.mark.parametrize("text, cleaned", [  # as ftfy 6.3.1 and the official pipeline's own steps clean it
    ("  two\t\nwords &amp;lt;b&amp;gt; &quot;x&quot;  ", 'two words <b> "x"'),
    ("A man\u2019s dog \u201cbarks\u201d \u2014 loud\u2026", 'A man\'s dog "barks" \u2014 loud\u2026'),
    ("caf\u00c3\u00a9 &amp;amp; it\u00e2\u20ac\u2122s", "caf\u00e9 & it's"),
    ("\u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d", '"quoted"'), ("caf\u00e9, Z\u00fcrich", "caf\u00e9, Z\u00fcrich"),
    ("re\u0301sume\u0301", "r\u00e9sum\u00e9"), ("\ufb01rst \ufeffa\x00b", "first ab"),
    ("\uff21\uff22\u3000\uff11", "AB 1"), ("\u8857\uff0c\u9053", "\u8857,\u9053"), ("\U0001f600", "\U0001f600")])
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_the_negative_prompts_commas_are_narrow():
    """The official pipeline encodes it so."""
    assert "\uff0c" in NEGATIVE_PROMPT and "\uff0c" not in clean(NEGATIVE_PROMPT)
    assert clean(NEGATIVE_PROMPT) == NEGATIVE_PROMPT.replace("\uff0c", ",")


def test_negative_prompt():
    assert NEGATIVE_PROMPT == (GOLDEN / "negative_prompt.txt").read_text(encoding="utf-8").strip()


def test_umt5_real_shapes(monkeypatch):
    shapes = umt5_shapes(256384, 4096, 4096, 10240, 64, 24)
    monkeypatch.setattr(encoders, "read_weights", lambda path: {k: torch.empty(s, device="meta")
                                                                for k, s in shapes.items()})
    model = load_text_encoder("no/umt5.pth", device="meta", dtype=torch.bfloat16).model
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336  # the embedding counted once
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config.d_kv == 64 and model.encoder.embed_tokens.weight is model.shared.weight


def test_umt5_bfloat16(text, tmp_path):
    weights, encoder = text
    save_file(weights, tmp_path / "umt5.safetensors")
    half = load_text_encoder(tmp_path / "umt5.safetensors", dtype=torch.bfloat16)
    ids, mask = torch.arange(40).reshape(2, 20), torch.ones(2, 20, dtype=torch.bool)
    out, exact = half(ids, mask), encoder(ids, mask)
    error = ((out - exact).norm() / exact.norm()).item()
    assert out.dtype == torch.bfloat16 and error < 0.06


# ---- CLIP


def test_clip_golden():
    encoder = load_image_encoder(GOLDEN / "clip_weights.safetensors", num_heads=4)
    io = load_file(GOLDEN / "clip_io.safetensors")
    assert far(encoder.preprocess(io["image"]), io["pixel_values"]) < 1e-4
    assert far(encoder(io["image"]), io["features"]) < 1e-4


@pytest.mark.parametrize("width, heads", [(160, None), (96, 6)])
def test_clip_written_out(tmp_path, width, heads):
    weights = draw(clip_shapes(width, layers=4, size=42, patch=14, mlp=200), seed=width)
    torch.save(weights, tmp_path / "clip.pth")
    encoder = load_image_encoder(tmp_path / "clip.pth", num_heads=heads)
    images = torch.rand(2, 3, 64, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = clip(weights, encoder.preprocess(images), heads or width // 80)
    assert expected.shape == (2, 10, width) and far(encoder(images), expected) < 1e-4
    half = load_image_encoder(tmp_path / "clip.pth", dtype=torch.bfloat16, num_heads=heads)(images)
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.03 * expected.norm()


def test_clip_preprocess_of_flat_images():
    encoder = load_image_encoder(GOLDEN / "clip_weights.safetensors", num_heads=4)
    white = encoder.preprocess(torch.ones(1, 3, 20, 30))  # CLIP's mean and std, red first
    assert torch.allclose(white[0, :, 5, 7], torch.tensor([1.93033625, 2.0748837, 2.14589692]), atol=1e-5)
    assert white.shape == (1, 3, 56, 56) and (white - white[..., :1, :1]).abs().max() < 1e-5


def test_clip_real_shapes(monkeypatch):
    shapes = clip_shapes(1280, 32, 224, 14, 5120)
    monkeypatch.setattr(encoders, "read_weights", lambda path: {k: torch.empty(s, device="meta")
                                                                for k, s in shapes.items()})
    encoder = load_image_encoder("clip.pth", device="meta")
    model = encoder.model
    assert encoder.size == 224 and len(model.encoder.layers) == 31 and model.config.num_attention_heads == 16
    assert model.embeddings.position_embedding.weight.shape == (257, 1280)


# ---- bad input


def one_line(f, path, *words, error=ValueError):
    with pytest.raises(error) as info:
        f(path)
    message = str(info.value)
    assert "\n" not in message and str(path) in message and all(word in message for word in words), message


@pytest.mark.parametrize("load", [load_text_encoder, load_image_encoder])
def test_bad_files(tmp_path, load):
    one_line(load, tmp_path / "none.pth", "no such file", error=FileNotFoundError)
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    one_line(load, tmp_path / "foreign.safetensors", "missing", "conv1.weight")
    shapes = umt5_shapes(9, 8, 8, 8, 2, 2) if load is load_text_encoder else clip_shapes(80, 3, 28, 14, 8)
    torch.save(draw(shapes), tmp_path / "whole.pth")
    load(tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])  # more in test_vae.py
    one_line(load, tmp_path / "cut.pth")
    state = draw(shapes) | {"visual.more": torch.zeros(1), "blocks.0.more": torch.zeros(1)}
    norm = next(k for k in state if k.endswith("0.norm1.weight"))
    state[norm] = torch.ones(3)
    del state[next(k for k in state if k.endswith("0.norm2.weight"))]
    torch.save(state, tmp_path / "wrong.pth")
    one_line(load, tmp_path / "wrong.pth", "missing", "norm", "is (3,), expected", "unexpected", "more")
    with pytest.raises(ValueError, match="torch.int8"):
        load(tmp_path / "whole.pth", dtype=torch.int8)


def test_bad_tokens_and_prompts(text, tmp_path):
    encoder, ids = text[1], torch.ones(1, 4, dtype=torch.long)
    for bad, mask, word in [(ids.float(), ids, "ids"), (ids, ids.float(), "mask"), (ids, ids[:, :2], "mask"),
                            (ids[0], ids[0], "ids"), (ids + 49, ids, "has 50"), (-ids, ids, "has 50")]:
        with pytest.raises(ValueError, match=word):
            encoder(bad, mask)
    for prompts in "a cat", [], [1]:
        with pytest.raises(ValueError, match="list of strings"):
            encoder.embed(prompts)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_text_encoder(GOLDEN / "umt5_weights.safetensors").embed(["a cat"])
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_text_encoder(GOLDEN / "umt5_weights.safetensors", tmp_path / "none")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_text_encoder(GOLDEN / "umt5_weights.safetensors", tmp_path)


def test_bad_images():
    encoder = load_image_encoder(GOLDEN / "clip_weights.safetensors", num_heads=4)
    x = torch.zeros(1, 3, 8, 8)
    for bad, word in [(x[0], "B, 3, H, W"), (x[:, :2], "B, 3, H, W"), (x.byte(), "uint8"), (x + 2, "-1")]:
        with pytest.raises(ValueError, match=word):
            encoder(bad)
    for heads, word in (None, "num_heads"), (5, "5 heads"):
        with pytest.raises(ValueError, match=word):
            load_image_encoder(GOLDEN / "clip_weights.safetensors", num_heads=heads)


# ---- memory, captions


def test_loading_takes_little_memory(tmp_path):
    def memory(what):
        return 1024 * int(re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    path, shapes = tmp_path / "umt5.pth", umt5_shapes(80_000, 512, 64, 64, heads=2, layers=2)
    torch.save({k: torch.ones(s, dtype=torch.bfloat16) for k, s in shapes.items()}, path)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak, VmHWM, from the present VmRSS
    except OSError:
        pytest.skip("peak memory is read from Linux's /proc")
    before = memory("VmRSS")
    encoder = load_text_encoder(path, dtype=torch.bfloat16)
    assert memory("VmHWM") - before < 1.3 * path.stat().st_size
    assert encoder.model.shared.weight[-1, -1] == 1


def test_caption(tmp_path):
    pytest.importorskip("PIL")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, Blip2QFormerConfig,
                              Blip2VisionConfig, BlipImageProcessor, OPTConfig, PreTrainedTokenizerFast)

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "dog", "walks"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                        eos_token="</s>", unk_token="<unk>")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = Blip2ForConditionalGeneration(Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=28, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, encoder_hidden_size=16, vocab_size=9).to_dict(),
        text_config=OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
                              vocab_size=9, max_position_embeddings=128, word_embed_proj_dim=16,
                              pad_token_id=0, bos_token_id=1, eos_token_id=2).to_dict(),
        num_query_tokens=4, image_token_index=8))
    # the last norm always gives the direction of "cat", so that every next word is "cat"
    norm = model.language_model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(100 * model.language_model.get_input_embeddings().weight[5])
    model.save_pretrained(tmp_path)
    resize = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(resize, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    frame = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8)
    assert set(describe_frame(frame, tmp_path).split()) == {"cat"}
    assert describe_frame(frame.numpy(), str(tmp_path)) == describe_frame(frame, tmp_path)
    encoders.load_captioner.cache_clear()


def test_caption_without_model(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    frame = torch.zeros(4, 4, 3, dtype=torch.uint8)
    for where in str(tmp_path), "someone/blip2", str(tmp_path / "none"):
        one_line(lambda path: describe_frame(frame, path), where, "no BLIP-2")
    for bad in torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3):
        with pytest.raises(ValueError, match="frame"):
            describe_frame(bad, tmp_path)
