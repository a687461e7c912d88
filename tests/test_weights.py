"""Published files: each is read or refused by name; a folder of them is checked; merging."""
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny_weights
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from data.world import open_policy
from model import load_dit, trainable
from plumbing.checkpoint import METADATA, save_checkpoint
from plumbing.settings import run_command
from pretrained import weights
from pretrained.encoders import load_image_encoder, load_text_encoder
from pretrained.vae import load_vae
from pretrained.weights import DIT, IMAGE_FILE, RECAMMASTER, REDIRECTOR, TEXT_FILE, VAE_FILE

COMMANDS = {"check": (weights.Check, weights.check, "folder"),
            "merge": (weights.Merge, weights.merge, "files")}
OURS, RECAM, VAE_TENSORS = "ours.safetensors", "recam.ckpt", "vae.safetensors"
LOAD = {DIT: load_dit, REDIRECTOR: lambda file: load_dit(file.with_name(DIT), file), RECAM: load_dit,
        OURS: lambda file: open_policy(file.parent, file, torch.device("cpu")),  # over a policy
        VAE_FILE: load_vae, VAE_TENSORS: load_vae, TEXT_FILE: load_text_encoder,
        IMAGE_FILE: load_image_encoder}


def read(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file)


def to_bytes(state, name, zipped=True):
    if name.endswith(".safetensors"):
        return save(state)
    torch.save(state, out := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return out.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {policy: tiny_weights.write(tmp_path_factory.mktemp(policy), policy=policy)
            for policy in ("ReDirector", "ReCamMaster", "Wan")}


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """One of every kind of file."""
    folder = tmp_path_factory.mktemp("whole")
    for file in (DIT, REDIRECTOR, VAE_FILE, TEXT_FILE, IMAGE_FILE):
        shutil.copy(folders["ReDirector"] / file, folder)
    shutil.copy(folders["ReDirector"] / REDIRECTOR, folder / OURS)
    shutil.copy(folders["ReCamMaster"] / RECAMMASTER, folder / RECAM)
    save_file(torch.load(folder / VAE_FILE), folder / VAE_TENSORS)
    return folder


# ---- one file ----

def put(folder, whole, name, content):
    """The file of this name, with this content, in a folder of links to the others."""
    for file in whole.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    return folder / name


def some(state):
    return [key for key, x in state.items() if x.ndim > 1 and ".1." in key and "rope" not in key]


def with_one(value):
    """A state dict of which one number is `value`."""
    def change(state):
        key = some(state)[-1]
        x = state[key].flatten()
        x[-1] = value
        return state | {key: x.view(state[key].shape)}
    return change


def renamed(prefix):
    return lambda state: {prefix + key: x for key, x in state.items()}


def misfit(state):
    """One key too many, one gone, one of another shape."""
    more = {"blocks.1.extra": torch.zeros(1), "visual.transformer.1.extra": torch.zeros(1)}
    return more | {key: x for key, x in state.items() if key != some(state)[-2]} | {
        some(state)[-1]: torch.zeros(5, 7)}


@pytest.mark.parametrize("change, words", [
    *((with_one(value), ["holds NaN or infinity"]) for value in (torch.nan, torch.inf, -torch.inf)),
    (lambda s: s | {key: s[key].int() for key in some(s)[-1:]}, ["32"]),
    (misfit, ["keys do not fit", "unexpected"]),
    (renamed("module."), ["keys begin with 'module.'"]),
    (renamed("model.diffusion_model."), ["keys begin with 'model.diffusion_"]),
    (lambda s: {key.replace("o", "oo"): x for key, x in s.items()}, ["oo"]),
    (lambda s: {"conv.weight": torch.zeros(3)}, ["conv.weight"])])
@pytest.mark.parametrize("name", LOAD)
def test_wrong_tensors_are_refused_by_name(whole, tmp_path, name, change, words):
    file = put(tmp_path, whole, name, to_bytes(change(read(whole / name)), name))
    message = refused(lambda: LOAD[name](file), *words)
    assert message.startswith(f"{file}: ") and len(message) <= 300
    if change is misfit:
        assert "missing" in message or name in (REDIRECTOR, OURS)  # what these lack, the base has
        assert " is (5" in message or name == TEXT_FILE  # whose names are long, and cut


@pytest.mark.parametrize("name", LOAD)
def test_bytes_that_are_no_checkpoint_are_refused(whole, tmp_path, name):
    """Cut off at any length, empty, noise, a pointer in its place, another archive, no file at all."""
    zipfile.ZipFile(archive := io.BytesIO(), "w").close()
    contents = [b"\x80\x02x" * 99, b"version https://git-lfs.github.com/spec/v1\n", archive.getvalue()]
    for data in ((whole / name).read_bytes(), to_bytes(read(whole / name), name, zipped=False)):
        contents += [data[:length] for length in (0, 3, 100, 5000, len(data) // 2, len(data) - 10)]
    LOAD[name](put(tmp_path, whole, name, data))  # whole, in the old form of .pth too
    for content in contents:
        file = put(tmp_path, whole, name, content)
        assert refused(lambda: LOAD[name](file)).startswith(f"{file}: ")
    file.unlink()
    refused(lambda: LOAD[name](file), name, error=FileNotFoundError)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", [VAE_FILE, RECAM])
def test_pickled_code_is_refused_and_not_run(tmp_path, name, form):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    content, file = {"conv1.weight": torch.zeros(1), "bad": Malicious()}, tmp_path / name
    file.write_bytes(to_bytes(content, name, form == "zip"))
    if form == "plain":
        file.write_bytes(pickle.dumps(content, 2))
    refused(lambda: LOAD[name](file), str(file), "refused")
    assert not (tmp_path / "executed").exists()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, file)
    refused(lambda: LOAD[name](file), str(file), "holds other things than tensors")


@pytest.mark.parametrize("load, name, shapes", [
    (load_text_encoder, "umt5.pth", tiny_weights.text_shapes(80_000, 512)),
    (load_dit, "dit.safetensors", tiny_weights.dit_shapes(heads=6))])
def test_loading_takes_little_more_memory_than_the_file(tmp_path, load, name, shapes):
    def memory(what):
        return 1024 * int(re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    file = tmp_path / name
    file.write_bytes(to_bytes({key: torch.ones(shape).bfloat16() for key, shape in shapes.items()}, name))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak, VmHWM, from the present VmRSS
    except OSError:
        pytest.skip("peak memory is read from Linux's /proc")
    before = memory("VmRSS")
    load(file, dtype=torch.bfloat16)
    assert memory("VmHWM") - before < 1.3 * file.stat().st_size


# ---- a folder ----

@pytest.fixture
def policy():
    return "ReDirector"


@pytest.fixture
def folder(folders, policy, tmp_path):
    return shutil.copytree(folders[policy], tmp_path / "W")


def call(capsys, *argv):
    """(output, exit code or the error's text)"""
    code = 0
    try:
        run_command("weights", "", COMMANDS, [str(x) for x in argv])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


BASE = {key: x for key, x in tiny_weights.dit_shapes().items() if "rope_phase" not in key}
GRADES, QWEN = "VideoReward/checkpoint-1/model.pth", "Qwen2-VL-2B-Instruct/tokenizer.json"


@pytest.mark.parametrize("policy, name, change, said, code", [
    *(("ReDirector", "", "", said, 0) for said in (
        f"DiT with camera control, 2 blocks of width 128, {sum(x.numel() for x in BASE.values()):,} par",
        "HPSv3, ", "VideoReward, ", "ReDirector's self-attention", "CLIP image tower")),
    ("ReCamMaster", "", "", "ReCamMaster's DiT, 2 blocks", 0), ("Wan", "", "", "Wan DiT, plain", 0),
    ("ReDirector", DIT, "remove", "missing  diffusion_pytorch_model.safetensors", 1),
    ("ReDirector", DIT, "cut", "damaged  diffusion_pytorch_model.safetensors", 1),
    ("ReDirector", TEXT_FILE, "cut", "damaged  models_t5", 1),
    ("ReDirector", TEXT_FILE, "remove", "evaluate:         lacks models_t5", 0),
    ("ReDirector", "HPSv3/HPSv3.safetensors", "cut", "damaged  HPSv3", 1),
    ("ReDirector", QWEN, "cut", f"damaged  {QWEN}", 1),
    ("ReDirector", GRADES, "remove", "missing  VideoReward/checkpoint-*/model.pth", 1),
    ("ReDirector", REDIRECTOR, DIT, "expected ReDirector's self-attention, found Wan DiT", 1),
    ("ReCamMaster", REDIRECTOR, REDIRECTOR, "expected one policy, found step20000.ckpt", 1),
    ("Wan", REDIRECTOR, REDIRECTOR, "expected Wan DiT with camera control, found Wan DiT, plain", 1)])
def test_a_folder_is_described(folder, whole, capsys, monkeypatch, name, change, said, code):
    """What is there, what is missing, damaged or of another policy, and which commands can run."""
    monkeypatch.syspath_prepend(str(folder / "packages"))
    if change == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    elif change == "remove":
        (folder / name).unlink()
    elif name:
        shutil.copy(whole / change, folder / name)
    out, found = call(capsys, folder)
    assert said in out and found == code
    assert name or "missing" not in out and "damaged" not in out and "data.prepare:     all there" in out
    if "/" in name:  # a reward model, which cameras alone do not need
        assert call(capsys, folder, "--rewards=trans=1")[1] == (1 if change == "cut" else 0)
    assert "no such folder of published weights" in call(capsys, folder / "nowhere")[1]


# ---- out of the door ----

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
    return tmp_path / "run/iteration_000007/self_attn.safetensors"


def metadata(file):
    with safe_open(file, "pt") as file:
        return json.loads(file.metadata()[METADATA])


def test_a_checkpoint_is_a_drop_in_for_redirectors_file(folder, run):
    """Whose code casts it to bfloat16, loads it over the base and refuses unexpected keys."""
    ours, theirs = load_file(run), load_file(folder / REDIRECTOR)
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    assert {x.dtype for x in ours.values()} == {torch.float32}  # masters: what a resumed run needs
    assert sum(not torch.equal(ours[k].bfloat16(), theirs[k]) for k in ours) == 1
    about = metadata(run)
    assert about["iteration"] == 7 and about["settings"]["seed"] == 5
    assert about["settings"]["weights"] == str(folder) and "out" not in about["settings"]


def test_merge_makes_one_file_of_base_and_checkpoint(folder, run, tmp_path, capsys):
    out = tmp_path / "made/whole.safetensors"
    said, code = call(capsys, "merge", folder, tmp_path / "run", out)
    merged, base, ours = map(load_file, (out, folder / DIT, run))
    assert code == 0 and "bfloat16" in said
    assert set(merged) == {*base, *ours} and {x.dtype for x in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(x, ours[k].bfloat16() if k in ours else base[k]) for k, x in merged.items())
    one = load_dit(out).state_dict()
    three = load_dit(folder / DIT, folder / REDIRECTOR, run).state_dict()
    assert all(torch.equal(x, three[key].bfloat16().float()) for key, x in one.items())
    about = metadata(out)
    assert DIT in about["base"][0] and "iteration_000007, digest" in about["checkpoint"]
    assert "expected the name of a new" in call(capsys, "merge", folder, run, out)[1]

    key, new = next(iter(ours)), tmp_path / "x.safetensors"
    (run.parent / "state.json").unlink()  # whose checksum would speak first
    for wrong, said in (({"blocks.9.self_attn.q.weight": torch.ones(2, 2)}, "no such tensor in the base"),
                        ({key: torch.ones(3)}, f"{key} is (3,), expected"),
                        ({key: torch.full_like(ours[key], torch.nan)}, "not finite")):
        save_file({**ours, **wrong}, run)
        assert said in call(capsys, "merge", folder, run, new)[1] and not new.exists()
    assert "expected BASE CKPT OUT" in call(capsys, "merge", folder, run)[1]
    said = call(capsys, "merge", folder / "no.safetensors", run, new)[1]
    assert "no such file, expected the base" in said
