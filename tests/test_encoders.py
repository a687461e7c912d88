"""Wan's codec, umT5, CLIP, the captioner: recorded numbers, invariants, published sizes, wrong input.

The codec is ours; the others are transformers' own: how they are built, filled and fed.
"""
import itertools
import re
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file
from tiny_weights import (
    image_shapes, random_state, save_tokenizer, shapes_of, text_shapes, vae_shapes)

from pretrained import encoders
from pretrained.encoders import (
    NEGATIVE_PROMPT, clean, describe_frame, load_image_encoder, load_text_encoder)
from pretrained.vae import MEAN, STD, load_vae

GOLDEN = Path(__file__).parent / "golden"
FRAME = torch.zeros(4, 4, 3, dtype=torch.uint8)
TEXT_WEIGHTS, IMAGE_WEIGHTS = GOLDEN / "umt5_weights.safetensors", GOLDEN / "clip_weights.safetensors"


def image_encoder(file, **options):
    return load_image_encoder(file, num_heads=4, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("name, load, call, result", [
    ("vae", load_vae, lambda vae, io: vae.encode(io["video"]), "latents"),
    ("vae", load_vae, lambda vae, io: vae.decode(io["latents"]), "reconstruction"),
    ("umt5", load_text_encoder, lambda text, io: text(io["ids"], io["mask"]), "embedding"),
    ("clip", image_encoder, lambda image, io: image.preprocess(io["image"]), "pixel_values"),
    ("clip", image_encoder, lambda image, io: image(io["image"]), "features")])
def test_recorded_numbers(name, load, call, result, dtype, tolerance):
    """Those of the official implementations; bfloat16 weights stay near them."""
    recorded = load_file(GOLDEN / f"{name}_io.safetensors")
    exact = recorded[result].clamp(-1, 1) if name == "vae" and result != "latents" else recorded[result]
    found = call(load(GOLDEN / f"{name}_weights.safetensors", dtype=dtype), recorded)
    assert found.dtype == (dtype if result in ("embedding", "features") else torch.float32)
    assert found.shape == exact.shape and (found - exact).norm() < tolerance * exact.norm()


# ---- the codec ----

def tiny(path, seed=0, **shape):
    torch.save(random_state(vae_shapes(**shape), seed), path)
    return load_vae(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("vae") / "vae.pth")


def video(frames, height=16, width=24, batch=1):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def far(a, b):
    return (a - b).abs().max().item()


def diffusers_key(key):
    """Official name -> AutoencoderKLWan's, for four levels of two blocks."""
    key = re.sub(r"^conv1", "quant_conv", re.sub(r"^conv2", "post_quant_conv", key))
    if m := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key):
        level, i = divmod(int(m[1]), 4)  # three blocks, then the upsampler
        key = f"decoder.up_blocks.{level}." + (f"resnets.{i}." if i < 3 else "upsamplers.0.") + m[2]
    names = {"coder.conv1": "coder.conv_in", "head.0": "norm_out", "head.2": "conv_out",
             "downsamples": "down_blocks", "middle.0": "mid_block.resnets.0",
             "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1",
             "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("frames, height, width", [(9, 16, 24), (5, 40, 16), (1, 8, 8)])
def test_equals_diffusers(tmp_path, frames, height, width):
    """At other widths, sizes and lengths; its published size has the same parameters."""
    diffusers = pytest.importorskip("diffusers")
    ours = tiny(tmp_path / "vae.pth", frames, widths=(12, 12, 24, 48, 48))
    theirs = diffusers.AutoencoderKLWan(base_dim=12).eval()
    theirs.load_state_dict({diffusers_key(key): x for key, x in ours.state_dict().items()})
    x = video(frames, height, width, batch=2)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (MEAN, STD))
    with torch.no_grad():
        mu = theirs.encode(x).latent_dist.mean
        z = torch.randn(mu.shape)
        reference = theirs.decode(z * std + mean).sample
    assert far(ours.encode(x), (mu - mean) / std) < 1e-4 and far(ours.decode(z), reference) < 1e-4
    published = {diffusers_key(key): x for key, x in vae_shapes((96, 96, 192, 384, 384)).items()}
    assert published == shapes_of(diffusers.AutoencoderKLWan)


def test_a_beginning_is_coded_as_in_the_whole_and_a_row_as_alone(vae):
    """So no latent frame sees a later video frame, nor another row, and chunks change nothing."""
    x = video(17, batch=2)
    z = vae.encode(x)
    y = vae.decode(z)
    assert z.shape == (2, 16, 5, 2, 3) and z.dtype == torch.float32 and y.shape == x.shape
    for row, k in ((0, 0), (1, 1), (0, 3)):
        part = slice(row, row + 1)
        assert far(vae.encode(x[part, :, : 4 * k + 1]), z[part, :, : k + 1]) < 1e-5
        assert far(vae.decode(z[part, :, : k + 1]), y[part, :, : 4 * k + 1]) < 1e-5
    assert [piece.shape[2] for piece in vae.decode_chunks(z)] == [1, 4, 4, 4, 4]
    assert vae.decode(100 * z).abs().max() == 1
    assert vae.encode(x.bfloat16()).dtype == vae.decode(z.bfloat16()).dtype == torch.bfloat16


def peak(run):
    """Most bytes that were alive at once of what run() allocated."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_memory_does_not_grow_with_frames(vae):
    peaks = []
    for frames in (9, 25):
        x = video(frames, 32, 32)
        z = vae.encode(x)
        peaks.append([peak(lambda: vae.encode(x)) - 2 * z.nbytes,
                      peak(lambda: all(True for _ in vae.decode_chunks(z)))])
    assert all(long < 1.02 * short for short, long in zip(*peaks))


@pytest.mark.parametrize("shape, space, time", [
    (dict(widths=(4, 8, 4), blocks=1, temporal=(True,)), 2, 2),
    (dict(widths=(8, 8, 8, 16), blocks=3, temporal=(True, True)), 4, 4)])
def test_shape_is_read_off_the_weights(tmp_path, shape, space, time):
    vae = tiny(tmp_path / "vae.pth", **shape)
    z = vae.encode(video(2 * time + 1, 4 * space, 6 * space))
    assert z.shape == (1, 16, 3, 4, 6)
    assert vae.decode(z).shape == (1, 3, 2 * time + 1, 4 * space, 6 * space)
    refused(lambda: tiny(tmp_path / "z4.pth", z=4), "z4.pth: 4 latent channels, expected 16")


# ---- text, first frame, caption ----

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A random umT5 and a little tokenizer beside it, as in Wan's folder."""
    file = tmp_path_factory.mktemp("umt5") / "umt5.pth"
    save_tokenizer(file.parent / "google/umt5-xxl")
    torch.save(random_state(text_shapes(vocabulary=150, attention=48, heads=6, layers=3)), file)
    return load_text_encoder(file)


def test_padding_changes_nothing_and_comes_out_as_zeros(text):
    ids = torch.randint(0, 150, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(30) < torch.tensor([12, 7])[:, None]).long()
    out = text(ids, mask)
    for row, length in enumerate((12, 7)):
        alone = text(ids[row:row + 1, :length], mask[row:row + 1, :length].bool())
        assert far(out[row:row + 1, :length], alone) < 1e-5 and not out[row, length:].any()


def test_the_published_sizes_are_read_off_the_weights(monkeypatch):
    shapes = {"umt5": text_shapes(256384, 4096, 4096, 10240, 64, 24),
              "clip": image_shapes(1280, 32, mlp=5120)}
    monkeypatch.setattr(encoders, "read_weights", lambda path: {
        key: torch.empty(shape, device="meta") for key, shape in shapes[path.split("/")[-1]].items()})
    model = load_text_encoder("no/umt5", device="meta", dtype=torch.bfloat16).model
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336  # the embedding counted once
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config.d_kv == 64 and model.encoder.embed_tokens.weight is model.shared.weight
    encoder = load_image_encoder("no/clip", device="meta")
    model = encoder.model
    assert encoder.size == 224 and len(model.encoder.layers) == 31
    assert model.config.num_attention_heads == 16
    assert model.embeddings.position_embedding.weight.shape == (257, 1280)


def test_embed(text):
    """Prompts are cleaned, ended, cut to 512 tokens; what is beyond a prompt is zero."""
    out = text.embed(["a cat", "", "a  cat\n&amp;amp; a   dog ", "a " * 600])
    assert out.shape == (4, 512, 32) and out.dtype == torch.float32 and not out.requires_grad
    a, cat, space, ampersand, dog = text.tokenizer.convert_tokens_to_ids(["▁a", "▁cat", "▁", "&", "▁dog"])
    for row, ids in enumerate([[a, cat, 1], [1], [a, cat, space, ampersand, a, dog, 1], [a] * 511 + [1]]):
        ids = torch.tensor([ids])
        assert far(out[row, :ids.shape[1]], text(ids, torch.ones_like(ids))[0]) < 1e-4
        assert not out[row, ids.shape[1]:].any()


@pytest.mark.parametrize("text, cleaned", [  # as ftfy 6.3.1 and the official pipeline's own steps clean it
    ("  two\t\nwords &amp;lt;b&amp;gt; &quot;x&quot;  ", 'two words <b> "x"'),
    ("A man\u2019s dog \u201cbarks\u201d \u2014 loud\u2026", 'A man\'s dog "barks" \u2014 loud\u2026'),
    ("caf\u00c3\u00a9 &amp;amp; it\u00e2\u20ac\u2122s", "caf\u00e9 & it's"),
    ("\u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d", '"quoted"'),
    ("caf\u00e9, Z\u00fcrich \U0001f600", "caf\u00e9, Z\u00fcrich \U0001f600"),
    ("re\u0301sume\u0301", "r\u00e9sum\u00e9"), ("\ufb01rst \ufeffa\x00b", "first ab"),
    ("\uff21\uff22\u3000\uff11", "AB 1"), ("\u8857\uff0c\u9053", "\u8857,\u9053"),
    (NEGATIVE_PROMPT, NEGATIVE_PROMPT.replace("\uff0c", ","))])  # the official pipeline encodes it so
def test_clean(text, cleaned):
    assert clean(text) == cleaned
    assert NEGATIVE_PROMPT == (GOLDEN / "negative_prompt.txt").read_text(encoding="utf-8").strip()


def test_a_frame_is_described_by_blip2(tmp_path):
    """By one whose last norm always gives the direction of one word, so that it says nothing else."""
    pytest.importorskip("PIL")
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "dog", "walks"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                          eos_token="</s>", unk_token="<unk>")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = t.Blip2ForConditionalGeneration(t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**small, image_size=28, patch_size=14).to_dict(),
        qformer_config=t.Blip2QFormerConfig(**small, encoder_hidden_size=16, vocab_size=9).to_dict(),
        text_config=t.OPTConfig(
            **small, ffn_dim=32, vocab_size=9, max_position_embeddings=128, word_embed_proj_dim=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2).to_dict(),
        num_query_tokens=4, image_token_index=8))
    norm = model.language_model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(100 * model.language_model.get_input_embeddings().weight[words.index("cat")])
    model.save_pretrained(tmp_path)
    resize = t.BlipImageProcessor(size={"height": 28, "width": 28})
    t.Blip2Processor(resize, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    for frame, folder in (FRAME, tmp_path), (FRAME.numpy(), str(tmp_path)):
        assert set(describe_frame(frame, folder).split()) == {"cat"}
    encoders.load_captioner.cache_clear()


def test_a_captioner_that_is_not_there_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for where in str(tmp_path), "someone/blip2", str(tmp_path / "none"):
        refused(lambda: describe_frame(FRAME, where), where, "no BLIP-2")


# ---- wrong input; files are in test_weights.py ----

X, Z = video(5), torch.zeros(1, 16, 2, 2, 2)


@pytest.mark.parametrize("half, bad, word", [
    ("encode", video(8), "4k+1"), ("encode", video(5, 12), "divisible by 8"),
    ("encode", video(5, 16, 20), "divisible by 8"), ("encode", X[0], "(B, 3,"),
    ("encode", X[:, :2], "(B, 3,"), ("encode", X[:0], "(B, 3,"), ("encode", X.byte(), "torch.uint8"),
    ("encode", (X + 1) * 127, "[-1, 1]"), ("encode", X * torch.nan, "[-1, 1]"),
    ("decode", Z[:, :4], "(B, 16,"), ("decode", Z[0], "(B, 16,"), ("decode", Z[:, :, :0], "(B, 16,"),
    ("decode", Z.int(), "int32")])
def test_wrong_input_is_refused_before_any_work(vae, monkeypatch, half, bad, word):
    monkeypatch.setattr(getattr(vae, f"{half}r"), "forward", lambda *_: pytest.fail("work was done"))
    refused(lambda: getattr(vae, half)(bad), word)


IDS, IMAGE = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("call, word", [
    (lambda text: text(IDS.float(), IDS), "ids: "), (lambda text: text(IDS, IDS.float()), "mask: "),
    (lambda text: text(IDS, IDS[:, :2]), "mask: "), (lambda text: text(IDS[0], IDS[0]), "ids: "),
    (lambda text: text(IDS + 149, IDS), "has 150"), (lambda text: text(-IDS, IDS), "has 150"),
    *((lambda text, prompts=prompts: text.embed(prompts), "list of strings")
      for prompts in ("a cat", [], [1])),
    (lambda text: load_text_encoder(TEXT_WEIGHTS).embed(["a cat"]), "no tokenizer"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS, GOLDEN), "golden: no tokenizer"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS, GOLDEN / "none"), "none: no such folder"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS), "give num_heads"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS, num_heads=5), "5 heads"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS, num_heads=4, dtype=torch.int8), "torch.int8"),
    *((lambda text, x=x: load_image_encoder(IMAGE_WEIGHTS, num_heads=4)(x), word) for x, word in (
        (IMAGE[0], "(B, 3, H, W)"), (IMAGE[:, :2], "(B, 3, H, W)"), (IMAGE.byte(), "uint8"),
        (IMAGE + 2, "[-1, 1]"))),
    (lambda text: describe_frame(FRAME.permute(2, 0, 1)), "frame: "),
    (lambda text: describe_frame(FRAME.float()), "frame: ")])
def test_wrong_input_is_refused(text, call, word):
    refused(lambda: call(text), word, error=(ValueError, FileNotFoundError))
