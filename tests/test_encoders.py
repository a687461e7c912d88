"""Wan's codec, umT5, CLIP, the captioner: recorded numbers, invariants, wrong input.

The codec is ours; the others are transformers' own: how they are built, filled and fed.
"""
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file
from tiny_weights import random_state, vae_shapes

from pretrained import encoders
from pretrained.encoders import (
    NEGATIVE_PROMPT, clean, describe_frame, load_image_encoder, load_text_encoder)
from pretrained.vae import load_vae
from pretrained.weights import TEXT_FILE

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


def test_a_beginning_is_coded_as_in_the_whole_and_a_row_as_alone(vae):
    """So no latent frame sees a later video frame, nor another row, and chunks change nothing."""
    x = video(17, batch=2)
    z = vae.encode(x)
    y = vae.decode(z)
    for row, k in ((0, 0), (1, 1), (0, 3)):
        part = slice(row, row + 1)
        assert far(vae.encode(x[part, :, : 4 * k + 1]), z[part, :, : k + 1]) < 1e-5
        assert far(vae.decode(z[part, :, : k + 1]), y[part, :, : 4 * k + 1]) < 1e-5
    assert vae.decode(100 * z).abs().max() == 1
    assert vae.encode(x.bfloat16()).dtype == vae.decode(z.bfloat16()).dtype == torch.bfloat16


def test_memory_does_not_grow_with_frames(vae):
    """What a chunk leaves to the next is a copy: not a view, which would keep all of the chunk."""
    past = {}
    for x in video(9).split([1, 4, 4], 2):
        vae.encoder(x, past)
    for z in torch.zeros(1, 16, 3, 2, 3).split(1, 2):
        vae.decoder(z, past)
    assert past and all(x.untyped_storage().nbytes() == x.nbytes for x in past.values())


def test_shape_is_read_off_the_weights(tmp_path):
    vae = tiny(tmp_path / "vae.pth", widths=(4, 8, 4), blocks=1, temporal=(True,))  # halved, not / 8
    z = vae.encode(video(5, 8, 12))
    assert z.shape == (1, 16, 3, 4, 6) and vae.decode(z).shape == (1, 3, 5, 8, 12)
    refused(lambda: tiny(tmp_path / "z4.pth", z=4), "z4.pth: 4 latent channels, expected 16")


@pytest.fixture(scope="module")
def text(published):
    return load_text_encoder(published("ReDirector") / TEXT_FILE)


def test_embed(text):
    """Prompts are cleaned, ended, cut to 512 tokens; padding changes none and comes out as zeros."""
    out = text.embed(["a cat", "", "a  cat\n&amp;amp; a   dog ", "a " * 600])
    assert out.shape == (4, 512, 32) and out.dtype == torch.float32 and not out.requires_grad
    a, cat, space, ampersand, dog = text.tokenizer.convert_tokens_to_ids(["▁a", "▁cat", "▁", "&", "▁dog"])
    for row, ids in enumerate([[a, cat, 1], [1], [a, cat, space, ampersand, a, dog, 1], [a] * 511 + [1]]):
        alone = text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]
        assert far(out[row, :len(ids)], alone) < 1e-4 and not out[row, len(ids):].any()


@pytest.mark.parametrize("text, cleaned", [  # as ftfy 6.3.1 and the official pipeline's own steps clean it
    ("  two\t\nwords &amp;lt;b&amp;gt; &quot;x&quot;  ", 'two words <b> "x"'),
    ("A man\u2019s dog \u201cbarks\u201d \u2014 loud\u2026", 'A man\'s dog "barks" \u2014 loud\u2026'),
    ("caf\u00c3\u00a9 &amp;amp; it\u00e2\u20ac\u2122s \u00e2\u20ac\x9d", "caf\u00e9 & it's \""),
    ("re\u0301sume\u0301 \ufb01rst \ufeffa\x00b \U0001f600", "r\u00e9sum\u00e9 first ab \U0001f600"),
    ("\uff21\uff22\u3000\uff11", "AB 1"), ("\u8857\uff0c\u9053", "\u8857,\u9053")])
def test_clean(text, cleaned):
    assert clean(text) == cleaned
    assert NEGATIVE_PROMPT == (GOLDEN / "negative_prompt.txt").read_text(encoding="utf-8").strip()


def test_a_frame_is_described_by_blip2(monkeypatch):
    """It gets the frame's pixels; special tokens and blanks around its words go."""
    model, words = MagicMock(), Mock(return_value=[" a cat\n"])
    processor = MagicMock(batch_decode=words)
    for name, part in (("Processor", processor), ("ForConditionalGeneration", model)):
        monkeypatch.setattr(f"transformers.Blip2{name}.from_pretrained", Mock(return_value=part))
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock())
    assert describe_frame(FRAME + 7, "someone/else") == "a cat"
    assert (processor.call_args.kwargs["images"] == 7).all() and words.call_args.kwargs["skip_special_tokens"]
    encoders.load_captioner.cache_clear()


# Wrong input; files are in test_weights.py.
X, Z = video(5), torch.zeros(1, 16, 2, 2, 2)
IDS, IMAGE = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("half, bad, word", [
    ("encode", video(8), "4k+1"), ("encode", video(5, 16, 20), "divisible by 8"),
    ("encode", X[:, :2], "(B, 3,"), ("encode", X.byte(), "torch.uint8"),
    ("encode", (X + 1) * 127, "[-1, 1]"), ("encode", X * torch.nan, "[-1, 1]"),
    ("decode", Z[:, :4], "(B, 16,")])
def test_wrong_videos_are_refused_before_any_work(vae, monkeypatch, half, bad, word):
    monkeypatch.setattr(getattr(vae, f"{half}r"), "forward", lambda *_: pytest.fail("work was done"))
    refused(lambda: getattr(vae, half)(bad), word)


@pytest.mark.parametrize("call, word", [
    (lambda text: text(IDS, IDS[:, :2]), "mask: "), (lambda text: text(IDS + 99, IDS), "has 100"),
    (lambda text: text(-IDS, IDS), "has 100"), (lambda text: text.embed("a cat"), "list of strings"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS).embed(["a cat"]), "no tokenizer"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS, GOLDEN), "golden: no tokenizer"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS, GOLDEN / "none"), "none: no such folder"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS), "give num_heads"),
    (lambda text: image_encoder(IMAGE_WEIGHTS, dtype=torch.int8), "torch.int8"),
    (lambda text: image_encoder(IMAGE_WEIGHTS)(IMAGE.byte()), "uint8"),
    (lambda text: image_encoder(IMAGE_WEIGHTS)(IMAGE + 2), "[-1, 1]"),
    (lambda text: describe_frame(FRAME, GOLDEN), "golden: no BLIP-2"),
    (lambda text: describe_frame(FRAME.permute(2, 0, 1)), "frame: ")])
def test_wrong_input_is_refused(text, call, word):
    refused(lambda: call(text), word, error=(ValueError, FileNotFoundError))
