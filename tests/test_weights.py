"""A folder of published weights is checked, and a checkpoint leaves the project as a file that others can load."""
import json
import shutil

import pytest
import tiny_weights
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import load_dit, trainable
from plumbing.checkpoint import METADATA, save_checkpoint
from plumbing.settings import run_command
from pretrained import weights
from pretrained.weights import DIT, REDIRECTOR

COMMANDS = {"check": (weights.Check, weights.check, "folder"), "merge": (weights.Merge, weights.merge, "files")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "W")
    return tmp_path / "W"


@pytest.fixture
def run(folder, tmp_path):
    """A run's folder with one checkpoint of the tiny policy, one number of which was trained."""
    dit = load_dit(folder / DIT, folder / REDIRECTOR, trained_dtype=torch.float32, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable(dit))
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    with torch.no_grad():
        next(iter(trained.values())).view(-1)[0] = 3.0
    made = {"seed": 5, "weights": str(folder), "keep": 1, "out": "elsewhere", "iterations": 9}
    save_checkpoint(tmp_path / "run", 7, trained, optimizer, made)
    return tmp_path / "run"


def call(capsys, *argv):
    """(output, exit code or the error's text)"""
    code = 0
    try:
        run_command("weights", "", COMMANDS, [str(x) for x in argv])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


# ---- a folder ----

def test_a_whole_folder(folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(folder / "packages"))
    out, code = call(capsys, folder)
    assert code == 0 and "missing" not in out and "damaged" not in out
    shapes = tiny_weights.dit_shapes()
    count = sum(shape.numel() for name, shape in shapes.items() if "rope_phase" not in name)
    for phrase in (f"Wan DiT with camera control, 2 blocks of width 128, {count:,} parameters", "HPSv3, ",
                   "VideoReward, ", "ReDirector's self-attention", "data.prepare:     all there"):
        assert phrase in out


@pytest.mark.parametrize("name, spoil, said, code", [
    (DIT, "remove", "missing  diffusion_pytorch_model.safetensors", 1),
    (DIT, "cut", "damaged  diffusion_pytorch_model.safetensors", 1),
    ("models_t5_umt5-xxl-enc-bf16.pth", "cut", "damaged  models_t5", 1),
    ("models_t5_umt5-xxl-enc-bf16.pth", "remove", "evaluate:         lacks models_t5", 0),
    ("HPSv3/HPSv3.safetensors", "cut", "damaged  HPSv3", 1),
    ("Qwen2-VL-2B-Instruct/tokenizer.json", "cut", "damaged  Qwen2-VL-2B-Instruct/tokenizer.json", 1),
    ("VideoReward/checkpoint-1/model.pth", "remove", "missing  VideoReward/checkpoint-*/model.pth", 1),
    (REDIRECTOR, "other", "expected ReDirector's self-attention, found Wan DiT", 1)])
def test_what_is_wrong_is_named(folder, capsys, monkeypatch, name, spoil, said, code):
    monkeypatch.syspath_prepend(str(folder / "packages"))
    file = folder / name
    if spoil == "other":
        shutil.copy(folder / DIT, file)
    elif spoil == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        file.unlink()
    out, found = call(capsys, folder)
    assert said in out and found == code
    if "Reward" in name or "HPS" in name or "Qwen" in name:  # which cameras alone do not need
        assert call(capsys, folder, "--rewards=trans=1")[1] == (1 if spoil == "cut" else 0)


@pytest.mark.parametrize("policy, name", [("ReCamMaster", "ReCamMaster's DiT, 2 blocks"), ("Wan", "Wan DiT, plain")])
def test_other_policies(policy, name, tmp_path, capsys, monkeypatch):
    folder = tiny_weights.write(tmp_path / "W", policy=policy)
    monkeypatch.syspath_prepend(str(folder / "packages"))
    out, code = call(capsys, folder)
    assert code == 0 and name in out and "clip" not in out and "data.prepare:     all there" in out
    shutil.copy(tiny_weights.write(tmp_path / "other") / REDIRECTOR, folder / REDIRECTOR)
    out, code = call(capsys, folder)
    assert code == 1


def test_no_folder(tmp_path, capsys):
    assert "no such folder of published weights" in call(capsys, tmp_path / "nowhere")[1]


# ---- out of the door ----

def test_a_checkpoint_is_a_drop_in_for_redirectors_file(folder, run):
    """ReDirector's code casts a file to bfloat16, loads it over the base and refuses unexpected keys."""
    ours = load_file(run / "iteration_000007/self_attn.safetensors")
    theirs = load_file(folder / REDIRECTOR)
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    assert {x.dtype for x in ours.values()} == {torch.float32}  # masters: what a resumed run needs
    assert {x.dtype for x in theirs.values()} == {torch.bfloat16}
    changed = [k for k in ours if not torch.equal(ours[k].bfloat16(), theirs[k])]
    assert len(changed) == 1
    with safe_open(run / "iteration_000007/self_attn.safetensors", "pt") as file:
        about = json.loads(file.metadata()[METADATA])
    assert about["iteration"] == 7 and about["settings"]["seed"] == 5
    assert about["settings"]["weights"] == str(folder) and "out" not in about["settings"]


def test_merge(folder, run, tmp_path, capsys):
    out = tmp_path / "made/whole.safetensors"
    said, code = call(capsys, "merge", folder, run, out)
    assert code == 0 and "bfloat16" in said
    merged, base = load_file(out), load_file(folder / DIT)
    ours = load_file(run / "iteration_000007/self_attn.safetensors")
    assert set(merged) == {*base, *ours} and {x.dtype for x in merged.values()} == {torch.bfloat16}
    for key, x in merged.items():
        assert torch.equal(x, ours[key].bfloat16() if key in ours else base[key]), key
    one = load_dit(out).state_dict()
    three = load_dit(folder / DIT, folder / REDIRECTOR, run / "iteration_000007/self_attn.safetensors").state_dict()
    assert all(torch.equal(one[key], three[key].bfloat16().float()) for key in three)
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()[METADATA])
    assert DIT in about["base"][0] and "iteration_000007, digest" in about["checkpoint"]
    assert "expected the name of a new" in call(capsys, "merge", folder, run, out)[1]


def test_merge_refuses(folder, run, tmp_path, capsys):
    file = run / "iteration_000007/self_attn.safetensors"
    good = load_file(file)
    key = next(iter(good))
    (run / "iteration_000007/state.json").unlink()  # whose checksum would speak first
    for wrong, said in (({"blocks.9.self_attn.q.weight": torch.ones(2, 2)}, "no such tensor in the base"),
                        ({key: torch.ones(3)}, f"{key} is (3,), expected"),
                        ({key: torch.full_like(good[key], torch.nan)}, "not finite")):
        save_file({**good, **wrong}, file)
        error = call(capsys, "merge", folder, file, tmp_path / "x.safetensors")[1]
        assert said in error and not (tmp_path / "x.safetensors").exists()
    assert "expected BASE CKPT OUT" in call(capsys, "merge", folder, file)[1]
    assert "no such file, expected the base" in call(capsys, "merge", ROOT / "no.safetensors", file, "x.safetensors")[1]
