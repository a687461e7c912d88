"""Published files: each is read or refused by name; a folder of them is checked; merging."""
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from model import load_dit, trainable
from plumbing.checkpoint import METADATA, save_checkpoint
from plumbing.settings import run_command
from pretrained import weights
from pretrained.encoders import load_image_encoder, load_text_encoder
from pretrained.vae import load_vae
from pretrained.weights import DIT, IMAGE_FILE, RECAMMASTER, REDIRECTOR, TEXT_FILE, VAE_FILE

COMMANDS = {"check": (weights.Check, weights.check, "folder"),
            "merge": (weights.Merge, weights.merge, "files")}
LOAD = {DIT: load_dit, REDIRECTOR: lambda file: load_dit(file.with_name(DIT), file), RECAMMASTER: load_dit,
        VAE_FILE: load_vae, TEXT_FILE: load_text_encoder, IMAGE_FILE: load_image_encoder}


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published("ReDirector"), tmp_path / "W")


@pytest.fixture
def original(published):
    """Name of a file -> the file itself, whole."""
    return lambda name: published("ReCamMaster" if name == RECAMMASTER else "ReDirector") / name


def put(folder, original, name, content):
    """The file of this name, with this content, beside a link to the base's."""
    if not (folder / DIT).exists():
        (folder / DIT).symlink_to(original(DIT))
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def read(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file)


def to_bytes(state, name, zipped=True):
    if name.endswith(".safetensors"):
        return save(state)
    torch.save(state, out := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return out.getvalue()


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


def misfit(state):
    """One key too many, one gone, one of another shape."""
    more = {"blocks.1.extra": torch.zeros(1), "visual.transformer.1.extra": torch.zeros(1)}
    return more | {key: x for key, x in state.items() if key != some(state)[-2]} | {
        some(state)[-1]: torch.zeros(5, 7)}


@pytest.mark.parametrize("change, words", [
    *((with_one(value), ["holds NaN or infinity"]) for value in (torch.nan, torch.inf, -torch.inf)),
    (lambda s: s | {key: s[key].int() for key in some(s)[-1:]}, ["32"]),
    (misfit, ["keys do not fit", "unexpected"]),
    (lambda s: {f"module.{key}": x for key, x in s.items()}, ["keys begin with 'module.'"]),
    (lambda s: {"conv.weight": torch.zeros(3)}, ["conv.weight"])])
@pytest.mark.parametrize("name", LOAD)
def test_wrong_tensors_are_refused_by_name(original, tmp_path, name, change, words):
    file = put(tmp_path, original, name, to_bytes(change(read(original(name))), name))
    message = refused(lambda: LOAD[name](file), *words)
    assert message.startswith(f"{file}: ") and len(message) <= 300
    if change is misfit:
        assert "missing" in message or name == REDIRECTOR  # what it lacks, the base has
        assert " is (5" in message or name == TEXT_FILE  # whose names are long, and cut


@pytest.mark.parametrize("name", LOAD)
def test_bytes_that_are_no_checkpoint_are_refused(original, tmp_path, name):
    """Cut off at any length, empty, noise, a pointer in its place, another archive, no file at all."""
    zipfile.ZipFile(archive := io.BytesIO(), "w").close()
    contents = [b"\x80\x02x" * 99, b"version https://git-lfs.github.com/spec/v1\n", archive.getvalue()]
    for data in (original(name).read_bytes(), to_bytes(read(original(name)), name, zipped=False)):
        contents += [data[:length] for length in (0, 100, len(data) // 2, len(data) - 10)]
    LOAD[name](put(tmp_path, original, name, data))  # whole, in the old form of .pth too
    for content in contents:
        file = put(tmp_path, original, name, content)
        assert refused(lambda: LOAD[name](file)).startswith(f"{file}: ")
    file.unlink()
    refused(lambda: LOAD[name](file), name, error=FileNotFoundError)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_code_is_refused_and_not_run(tmp_path, form):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    content, file = {"conv1.weight": torch.zeros(1), "bad": Malicious()}, tmp_path / VAE_FILE
    file.write_bytes(pickle.dumps(content, 2) if form == "plain" else to_bytes(content, "", form == "zip"))
    refused(lambda: load_vae(file), str(file), "refused")
    assert not (tmp_path / "executed").exists()


def test_pth_files_are_mapped_not_read(original, tmp_path):
    """The published text encoder has 11 GB. They hold tensors by name, nothing else."""
    state, maps = weights.read_weights(original(TEXT_FILE)), Path("/proc/self/maps")
    assert state and (not maps.exists() or f"/{TEXT_FILE}" in maps.read_text())
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    refused(lambda: load_vae(tmp_path / "x.pth"), "x.pth: holds other things than tensors")


def call(capsys, *argv):
    """(output, exit code or the error's text)"""
    code = 0
    try:
        run_command("weights", "", COMMANDS, [str(x) for x in argv])
    except SystemExit as end:
        code = end.code
    return capsys.readouterr().out, code


@pytest.mark.parametrize("policy, words", [
    ("ReDirector", ["DiT with camera control, 2 blocks of width 128, ", "HPSv3, ", "VideoReward, ",
                    "ReDirector's self-attention", "CLIP image tower"]),
    ("ReCamMaster", ["ReCamMaster's DiT, 2 blocks"]), ("Wan", ["Wan DiT, plain"])])
def test_a_whole_folder_is_described(published, capsys, monkeypatch, policy, words):
    monkeypatch.syspath_prepend(str(published(policy) / "packages"))
    said, code = call(capsys, published(policy))
    assert code == 0 and all(word in said for word in [*words, "data.prepare:     all there"])
    assert "missing" not in said and "damaged" not in said
    assert "no such folder of published weights" in call(capsys, "nowhere")[1]


GRADES, QWEN = "VideoReward/checkpoint-1/model.pth", "Qwen2-VL-2B-Instruct/tokenizer.json"


@pytest.mark.parametrize("name, change, said, code, cameras", [  # the last: code for their rewards alone
    (DIT, "cut", "damaged  diffusion_pytorch_model.safetensors", 1, 1),
    (QWEN, "cut", f"damaged  {QWEN}", 1, 1), (TEXT_FILE, "cut", "damaged  models_t5", 1, 1),
    (TEXT_FILE, "remove", "evaluate:         lacks models_t5", 0, 0),
    (GRADES, "remove", "missing  VideoReward/checkpoint-*/model.pth", 1, 0),
    (REDIRECTOR, DIT, "expected ReDirector's self-attention, found Wan DiT", 1, 1),
    (RECAMMASTER, RECAMMASTER, "expected one policy, found step20000.ckpt", 1, 1)])
def test_a_folders_faults_are_told(folder, original, capsys, monkeypatch, name, change, said, code, cameras):
    """What is missing, damaged or of another policy, and which commands can run."""
    monkeypatch.syspath_prepend(str(folder / "packages"))
    if change == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    elif change == "remove":
        (folder / name).unlink()
    else:
        shutil.copy(original(change), folder / name)
    out, found = call(capsys, folder)
    assert said in out and found == code
    assert call(capsys, folder, "--rewards=trans=1")[1] == cameras


def test_a_checkpoint_is_a_drop_in_and_merges_with_its_base(folder, tmp_path, capsys):
    """ReDirector's code casts it to bfloat16, loads it over the base, refuses unexpected keys."""
    dit = load_dit(folder / DIT, folder / REDIRECTOR, trained_dtype=torch.float32, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable(dit))
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    with torch.no_grad():
        next(iter(trained.values())).view(-1)[0] = 3.0
    save_checkpoint(tmp_path / "run", 7, trained, optimizer, {"seed": 5, "keep": 1})
    run, out = tmp_path / "run/iteration_000007/self_attn.safetensors", tmp_path / "made/whole.safetensors"
    said, code = call(capsys, "merge", folder, tmp_path / "run", out)
    merged, base, ours, theirs = map(load_file, (out, folder / DIT, run, folder / REDIRECTOR))
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    assert {x.dtype for x in ours.values()} == {torch.float32}  # masters: what a resumed run needs
    assert sum(not torch.equal(ours[k].bfloat16(), theirs[k]) for k in ours) == 1
    assert code == 0 and "bfloat16" in said
    assert set(merged) == {*base, *ours} and {x.dtype for x in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(x, ours[k].bfloat16() if k in ours else base[k]) for k, x in merged.items())
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()[METADATA])
    assert about["iteration"] == 7 and about["settings"]["seed"] == 5
    assert DIT in about["base"][0] and "iteration_000007, digest" in about["checkpoint"]

    key, new = next(iter(ours)), tmp_path / "x.safetensors"
    (run.parent / "state.json").unlink()  # whose checksum would speak first
    for wrong, said in (({"blocks.9.self_attn.q.weight": torch.ones(2, 2)}, "no such tensor in the base"),
                        ({key: torch.ones(3)}, f"{key} is (3,), expected"),
                        ({key: torch.full_like(ours[key], torch.nan)}, "not finite")):
        save_file({**ours, **wrong}, run)
        assert said in call(capsys, "merge", folder, run, new)[1] and not new.exists()
    for argv, said in (((folder, run), "expected BASE CKPT OUT"),
                       ((folder, run, out), "expected the name of a new"),
                       ((folder / "no.safetensors", run, new), "no such file, expected the base")):
        assert said in call(capsys, "merge", *argv)[1]
