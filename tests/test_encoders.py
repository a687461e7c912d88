"""umT5, CLIP and the captioner: recorded numbers of the official ones, both networks written out, wrong input."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import load_file
from tiny_weights import image_shapes, random_state, save_tokenizer, text_shapes

from pretrained import encoders
from pretrained.encoders import NEGATIVE_PROMPT, clean, describe_frame, load_image_encoder, load_text_encoder

GOLDEN = Path(__file__).parent / "golden"
TEXT_WEIGHTS, IMAGE_WEIGHTS = GOLDEN / "umt5_weights.safetensors", GOLDEN / "clip_weights.safetensors"


def far(a, b):
    return (a - b).abs().max().item()


# ---- the two networks written out ----

def umt5(w, ids, mask, heads):
    L, x = ids.shape[1], w["token_embedding.weight"][ids]
    offset = torch.arange(L) - torch.arange(L)[:, None]  # key minus query
    log = 8 + (torch.log(offset.abs().clamp(min=1) / 8) / torch.tensor(128 / 8).log() * 8).long()
    bucket = 16 * (offset > 0) + torch.where(offset.abs() < 8, offset.abs(), log.clamp(max=15))

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


def tiny(path, shapes):
    state = random_state(shapes)
    torch.save(state, path)
    return {key: x.float() for key, x in state.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A random umT5 and a little tokenizer beside it, as in Wan's folder: (weights, encoder, file)."""
    file = tmp_path_factory.mktemp("umt5") / "umt5.pth"
    save_tokenizer(file.parent / "google/umt5-xxl")
    weights = tiny(file, text_shapes(vocabulary=150, width=24, attention=30, ffn=40, heads=6, layers=3))
    return weights, load_text_encoder(file), file


def test_recorded_numbers():
    recorded = load_file(GOLDEN / "umt5_io.safetensors")
    out = load_text_encoder(TEXT_WEIGHTS)(recorded["ids"], recorded["mask"])
    assert out.shape == recorded["embedding"].shape and far(out, recorded["embedding"]) < 1e-4
    recorded, encoder = load_file(GOLDEN / "clip_io.safetensors"), load_image_encoder(IMAGE_WEIGHTS, num_heads=4)
    assert far(encoder.preprocess(recorded["image"]), recorded["pixel_values"]) < 1e-4
    assert far(encoder(recorded["image"]), recorded["features"]) < 1e-4


def test_umt5_written_out(text):
    """At every length, far positions included; nothing attends to padding, and it comes out as zeros."""
    weights, encoder, file = text
    ids = torch.randint(0, 150, (3, 200), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(200) < torch.tensor([190, 150, 1])[:, None]).long()
    out = encoder(ids, mask)
    assert far(out, umt5(weights, ids, mask, 6)) < 1e-4
    assert far(out[1:2, :150], encoder(ids[1:2, :150], mask[1:2, :150])) < 1e-5
    half = load_text_encoder(file, dtype=torch.bfloat16)(ids, mask.bool())
    assert half.dtype == torch.bfloat16 and (half - out).norm() < 0.06 * out.norm()


@pytest.mark.parametrize("width, heads", [(160, None), (96, 6)])
def test_clip_written_out(tmp_path, width, heads):
    weights = tiny(tmp_path / "clip.pth", image_shapes(width, layers=4, pixels=42, mlp=200))
    encoder = load_image_encoder(tmp_path / "clip.pth", num_heads=heads)
    images = torch.rand(2, 3, 64, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = clip(weights, encoder.preprocess(images), heads or width // 80)
    assert expected.shape == (2, 10, width) and far(encoder(images), expected) < 1e-4
    half = load_image_encoder(tmp_path / "clip.pth", dtype=torch.bfloat16, num_heads=heads)(images)
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.03 * expected.norm()


def test_the_published_sizes_are_read_off_the_weights(monkeypatch):
    shapes = {"umt5": text_shapes(256384, 4096, 4096, 10240, 64, 24), "clip": image_shapes(1280, 32, mlp=5120)}
    monkeypatch.setattr(encoders, "read_weights", lambda path: {
        key: torch.empty(shape, device="meta") for key, shape in shapes[path.split("/")[-1]].items()})
    model = load_text_encoder("no/umt5", device="meta", dtype=torch.bfloat16).model
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336  # the embedding counted once
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config.d_kv == 64 and model.encoder.embed_tokens.weight is model.shared.weight
    encoder = load_image_encoder("no/clip", device="meta")
    model = encoder.model
    assert encoder.size == 224 and len(model.encoder.layers) == 31 and model.config.num_attention_heads == 16
    assert model.embeddings.position_embedding.weight.shape == (257, 1280)


# ---- prompts ----

def test_embed(text):
    """Prompts are cleaned, ended, cut to 512 tokens; what is beyond a prompt is zero."""
    weights, encoder, _ = text
    out = encoder.embed(["a cat", "", "a  cat\n&amp;amp; a   dog ", "a " * 600])
    assert out.shape == (4, 512, 24) and out.dtype == torch.float32 and not out.requires_grad
    pieces = encoder.tokenizer.convert_tokens_to_ids(["▁a", "▁cat", "▁", "&", "▁dog"])
    a, cat, space, ampersand, dog = pieces
    for row, ids in enumerate([[a, cat, 1], [1], [a, cat, space, ampersand, a, dog, 1], [a] * 511 + [1]]):
        ids = torch.tensor([ids])
        assert far(out[row, :ids.shape[1]], umt5(weights, ids, torch.ones_like(ids), 6)[0]) < 1e-4
        assert (out[row, ids.shape[1]:] == 0).all()


@pytest.mark.parametrize("text, cleaned", [  # as ftfy 6.3.1 and the official pipeline's own steps clean it
    ("  two\t\nwords &amp;lt;b&amp;gt; &quot;x&quot;  ", 'two words <b> "x"'),
    ("A man\u2019s dog \u201cbarks\u201d \u2014 loud\u2026", 'A man\'s dog "barks" \u2014 loud\u2026'),
    ("caf\u00c3\u00a9 &amp;amp; it\u00e2\u20ac\u2122s", "caf\u00e9 & it's"),
    ("\u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d", '"quoted"'), ("caf\u00e9, Z\u00fcrich", "caf\u00e9, Z\u00fcrich"),
    ("re\u0301sume\u0301", "r\u00e9sum\u00e9"), ("\ufb01rst \ufeffa\x00b", "first ab"),
    ("\uff21\uff22\u3000\uff11", "AB 1"), ("\u8857\uff0c\u9053", "\u8857,\u9053"), ("\U0001f600", "\U0001f600"),
    (NEGATIVE_PROMPT, NEGATIVE_PROMPT.replace("\uff0c", ","))])  # the official pipeline encodes it so
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_the_negative_prompt_is_wans():
    assert NEGATIVE_PROMPT == (GOLDEN / "negative_prompt.txt").read_text(encoding="utf-8").strip()


# ---- wrong input; files are in test_weights.py ----

IDS, IMAGE, FRAME = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 3, 8, 8), torch.zeros(4, 4, 3).byte()


@pytest.mark.parametrize("call, word", [
    (lambda text: text(IDS.float(), IDS), "ids: "), (lambda text: text(IDS, IDS.float()), "mask: "),
    (lambda text: text(IDS, IDS[:, :2]), "mask: "), (lambda text: text(IDS[0], IDS[0]), "ids: "),
    (lambda text: text(IDS + 149, IDS), "has 150"), (lambda text: text(-IDS, IDS), "has 150"),
    (lambda text: text.embed("a cat"), "list of strings"), (lambda text: text.embed([]), "list of strings"),
    (lambda text: text.embed([1]), "list of strings"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS).embed(["a cat"]), "no tokenizer"),
    (lambda text: load_text_encoder(TEXT_WEIGHTS, GOLDEN), "golden: no tokenizer"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS), "give num_heads"),
    (lambda text: load_image_encoder(IMAGE_WEIGHTS, num_heads=5), "5 heads"),
    *((lambda text, x=x: load_image_encoder(IMAGE_WEIGHTS, num_heads=4)(x), word) for x, word in (
        (IMAGE[0], "(B, 3, H, W)"), (IMAGE[:, :2], "(B, 3, H, W)"), (IMAGE.byte(), "uint8"), (IMAGE + 2, "[-1, 1]"))),
    (lambda text: describe_frame(FRAME.permute(2, 0, 1)), "frame: "),
    (lambda text: describe_frame(FRAME.float()), "frame: ")])
def test_wrong_input_is_refused(text, call, word):
    refused(lambda: call(text[1]), word)


def test_a_tokenizer_that_is_not_there(tmp_path):
    refused(lambda: load_text_encoder(TEXT_WEIGHTS, tmp_path / "none"), "tokenizer", error=FileNotFoundError)


# ---- captions ----

def test_a_frame_is_described_by_blip2(tmp_path):
    """By a tiny one whose last norm always gives the direction of one word, so that it says nothing else."""
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
        text_config=t.OPTConfig(**small, ffn_dim=32, vocab_size=9, max_position_embeddings=128, pad_token_id=0,
                                word_embed_proj_dim=16, bos_token_id=1, eos_token_id=2).to_dict(),
        num_query_tokens=4, image_token_index=8))
    norm = model.language_model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(100 * model.language_model.get_input_embeddings().weight[words.index("cat")])
    model.save_pretrained(tmp_path)
    resize = t.BlipImageProcessor(size={"height": 28, "width": 28})
    t.Blip2Processor(resize, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    assert {*describe_frame(FRAME, tmp_path).split(), *describe_frame(FRAME.numpy(), str(tmp_path)).split()} == {"cat"}
    encoders.load_captioner.cache_clear()


def test_a_captioner_that_is_not_there_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for where in str(tmp_path), "someone/blip2", str(tmp_path / "none"):
        refused(lambda: describe_frame(FRAME, where), where, "no BLIP-2")
