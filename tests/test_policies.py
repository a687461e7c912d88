"""ReDirector, ReCamMaster and plain Wan T2V by naming a folder of (tiny) weights: every step of the way."""
import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scenes import clip

import evaluate
import model
import tiny_weights
import train
import trajectories
from benchmarks import plan
from data.clips import ClipCache, load_clip, read_index
from data.prepare import Prepare, prepare
from data.video import read_video, write_video
from data.world import open_policy
from evaluation import outside
from evaluation.ablation import without_geometry
from evaluation.retake import Retake, retake
from evaluation.scores import save_poses
from model import load_dit
from pretrained.weights import find_policy, weights_sizes

SIZE = dict(frames=9, height=32, width=48)
SOURCE = ("c2w", "image", "intrinsics")  # what ReDirector takes of a clip, and ReCamMaster does not


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Weights of the three policies, two videos, a camera file and captions."""
    w = tmp_path_factory.mktemp("policies")
    for policy in tiny_weights.PARTS:
        tiny_weights.write(w / policy, policy=policy)
    for i, name in enumerate("ab"):
        write_video(w / f"videos/{name}.mp4", np.roll(clip(9), i, 0), 24)
    np.savez(w / "cameras.npz", c2w=trajectories.recammaster(9, 9))
    (w / "captions.csv").write_text("file_name,text\na.mp4,a bear\nb.mp4,a man dances\n")
    (w / "prompts.txt").write_text("a bear walks\n\na man dances\n")
    (w / "bright.py").write_text("def bright(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n")
    return w


@pytest.fixture(autouse=True)
def signals():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


def cache(world, out, policy, **options):
    return prepare(Prepare(videos=str(world / "videos"), captions=str(world / "captions.csv"), out=str(out),
                           weights=str(world / policy), **SIZE, **options))


def cameras(world):
    return dict(cameras=str(world / "cameras.npz"), fov=60.0)


def run(world, out, policy, clips, *more):
    """Two iterations of train.py -> its log and the trained tensors."""
    data = ["--world=clips", f"--clips={clips}", f"--trajectories={world / 'ReDirector/paths'}"]
    data = ["--world=captions", f"--captions={clips}"] if policy == "Wan" else data
    size = [f"--{name}={x}" for name, x in SIZE.items()]
    train.main([*data, *size, f"--weights={world / policy}", "--conditions=2", "--members=2", "--steps=4",
                "--size=2", "--lr=0.01", "--iterations=2", "--validate=1", "--sample_every=2", f"--out={out}",
                f"--rewards={world / 'bright.py'}:bright=1", *more])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [record for record in log if "grad_norm" in record]  # others are of the validation
    return log, load_file(out / "iteration_000002/self_attn.safetensors")


# ---- which policy a folder holds ----

def test_geometry_is_what_the_ablation_leaves_out():
    assert without_geometry("trans=1, rot=1,sharpness=0.01,my.py:f=2") == "sharpness=0.01,my.py:f=2"
    for spec in ("trans=1,rot=1", "vq=1"):
        with pytest.raises(ValueError, match="expected some of trans, rot and some of quality"):
            without_geometry(spec)


def test_policies_are_told_by_their_files(world, tmp_path):
    found = {policy: find_policy(world / policy) for policy in tiny_weights.PARTS}
    assert [p.name for p in found.values()] == ["ReDirector", "ReCamMaster", "Wan T2V"]
    assert [p.source for p in found.values()] == [True, True, False]
    assert found["ReCamMaster"].parts == ("text", "latents")
    assert not any("clip" in name for name in weights_sizes(world / "ReCamMaster"))
    state = torch.load(world / "ReCamMaster/step20000.ckpt", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.bfloat16, torch.float32}
    for name in (tiny_weights.DIT, tiny_weights.REDIRECTOR):  # the same keys in safetensors
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(state, tmp_path / name)
        assert find_policy(tmp_path).files == (tmp_path / name,)
        (tmp_path / name).unlink()
    (tmp_path / tiny_weights.RECAMMASTER).touch()
    (tmp_path / tiny_weights.DIT).touch()  # its base's own file beside it does no harm
    (tmp_path / tiny_weights.DIT).write_bytes((world / "Wan" / tiny_weights.DIT).read_bytes())
    assert find_policy(tmp_path).files == (tmp_path / tiny_weights.RECAMMASTER,)
    other = (world / "ReDirector" / tiny_weights.REDIRECTOR).read_bytes()
    (tmp_path / tiny_weights.REDIRECTOR).write_bytes(other)
    with pytest.raises(ValueError, match=r"found step20000.ckpt \(ReCamMaster\) and step20000.safetensors"):
        find_policy(tmp_path)
    assert find_policy(tmp_path / "empty").name == "ReDirector"  # and its files are found missing
    with pytest.raises(FileNotFoundError, match="step20000.safetensors"):
        weights_sizes(tmp_path / "empty")


# ---- clips: what a policy does not take is not asked for, and clips of one serve the other ----

def test_clips_of_one_policy_serve_the_other(world, tmp_path):
    lean = cache(world, tmp_path, "ReCamMaster")  # neither CLIP nor cameras, nor a model of either
    assert sorted(lean["settings"]["without"]) == list(SOURCE) and "cameras" not in lean["settings"]
    first = load_clip(tmp_path / "a.mp4.safetensors")
    assert first.image is None and first.c2w is None and first.caption == "a bear"
    assert len(ClipCache(tmp_path, find_policy(world / "ReCamMaster").parts, **SIZE)) == 2
    with pytest.raises(ValueError, match="its clips lack image, c2w, intrinsics"):
        ClipCache(tmp_path, find_policy(world / "ReDirector").parts)
    before = (tmp_path / "a.mp4.safetensors").read_bytes()
    cache(world, tmp_path, "ReCamMaster")
    assert (tmp_path / "a.mp4.safetensors").read_bytes() == before
    full = cache(world, tmp_path, "ReDirector", **cameras(world))  # the same command adds what is lacking
    assert full["settings"]["without"] == [] and full["clips"] == lean["clips"]
    second = ClipCache(tmp_path, find_policy(world / "ReDirector").parts, **SIZE)[0]
    assert torch.equal(second.latents, first.latents) and torch.equal(second.text, first.text)
    for policy in ("ReCamMaster", "ReDirector"):
        log, trained = run(world, tmp_path / f"run {policy}", policy, tmp_path)
        assert log[0]["ratio_error"] == 0 and len(log) == 2
    with pytest.raises(ValueError, match="cameras = files of .*, wanted None"):
        cache(world, tmp_path, "ReCamMaster")  # its clips would lack what the others have
    given = cache(world, tmp_path / "given", "ReCamMaster", **cameras(world))  # what is given is kept
    assert given["settings"]["without"] == ["image"]


def test_a_clip_that_cannot_be_completed_leaves_the_index(world, tmp_path):
    cache(world, tmp_path, "ReCamMaster")
    np.savez(tmp_path / "a.npz", c2w=trajectories.recammaster(9, 9))
    index = cache(world, tmp_path, "ReDirector", cameras=str(tmp_path), fov=60.0)
    assert index["clips"] == ["a.mp4"] and list(index["skipped"]) == ["b.mp4"]
    assert len(ClipCache(tmp_path, find_policy(world / "ReDirector").parts)) == 1
    assert read_index(tmp_path)["settings"]["without"] == []


# ---- training ----

def test_recammaster_trains_and_goes_on(world, tmp_path):
    """Everything that trains moves and is saved; a checkpoint lies over the published file."""
    cache(world, tmp_path / "clips", "ReCamMaster")
    log, trained = run(world, tmp_path / "run", "ReCamMaster", tmp_path / "clips", "--guidance=2")
    assert all(record["ratio_error"] == 0 and record["grad_norm"] > 0 for record in log), log
    assert {name.split(".")[2] for name in trained} == {"self_attn", "cam_encoder", "projector"}
    base = open_policy(world / "ReCamMaster", None, torch.device("cpu")).state_dict()
    assert all(not torch.equal(x, base[name]) for name, x in trained.items())
    again = open_policy(world / "ReCamMaster", tmp_path / "run/iteration_000002/self_attn.safetensors",
                        torch.device("cpu")).state_dict()
    assert all(torch.equal(x, trained.get(name, base[name])) for name, x in again.items())
    with pytest.raises(ValueError, match="needs a base with control_adapter"):
        load_dit(world / "ReCamMaster/step20000.ckpt", world / "ReDirector/step20000.safetensors")
    half = ["--iterations=1", "--save_every=1"]
    run_again = [*half, "--guidance=2"]
    with pytest.raises(FileNotFoundError):
        run(world, tmp_path / "twice", "ReCamMaster", tmp_path / "clips", *run_again)  # has one checkpoint yet
    _, resumed = run(world, tmp_path / "twice", "ReCamMaster", tmp_path / "clips", "--guidance=2")
    assert all(torch.equal(x, resumed[name]) for name, x in trained.items())


def test_wan_trains_on_captions(world, tmp_path):
    log, trained = run(world, tmp_path / "run", "Wan", world / "prompts.txt", "--guidance=2")
    assert log[0]["ratio_error"] == 0 and all(record["grad_norm"] > 0 for record in log)
    assert {name.split(".")[2] for name in trained} == {"self_attn"}
    shown, fps = read_video(tmp_path / "run/samples/iteration_000002.mp4")
    assert fps == 16 and len(shown) == 9


@pytest.mark.parametrize("policy, flags, why", [
    ("Wan", ["--world=clips", "--clips={w}/c", "--trajectories={w}/ReDirector/paths", "--captions="],
     "Wan T2V takes no source video: expected world = captions"),
    ("Wan", ["--weights={w}/ReCamMaster"], "ReCamMaster takes a source video: expected world = clips"),
    ("Wan", ["--rewards=trans=1,exposure=1"], "rewards: trans=1: this world has no path"),
    ("Wan", ["--captions="], "--captions=FILE is needed"),
    ("Wan", ["--trajectories=x"], "trajectories: world = captions does not read it"),
    ("Wan", ["--captions={w}/empty.txt"], "empty.txt: expected UTF-8 text, one prompt a line"),
    ("ReCamMaster", ["--captions=x"], "captions: world = clips does not read it")])
def test_worlds_that_do_not_fit(world, tmp_path, policy, flags, why):
    (world / "empty.txt").write_text("\n \n")
    with pytest.raises((ValueError, OSError), match=why):
        run(world, tmp_path / "run", policy, world / "prompts.txt", *(flag.format(w=world) for flag in flags))
    assert not (tmp_path / "run").exists()


def test_plan_is_of_the_policy(world):
    for policy in tiny_weights.PARTS:
        config = plan.Plan(world="captions" if policy == "Wan" else "clips", weights=str(world / policy),
                           conditions=1, members=2, steps=6, **SIZE)
        lines = plan.describe(config, 1)
        dit = open_policy(world / policy, None, torch.device("cpu"))
        assert lines["parameters"].startswith(f"{sum(p.numel() for p in dit.parameters()):,}, of which")
        halves = ", as many of the source" if dit.takes_source else ""
        assert lines["tokens"] == f"{18 * (1 + dit.takes_source)} a network row: 18 of the target video{halves}"
        stay, peaks = plan.memory(config)
        trained = sum(p.nbytes for p in model.trainable(dit))
        assert stay["masters"] == trained and min(peaks.values()) > sum(stay.values())
    absent = plan.parts(plan.Plan(world="captions", weights=str(world / "none"), **SIZE))[0]
    assert absent == plan.WAN_T2V


# ---- retake and the evaluation ----

def test_retake_asks_for_no_cameras(world, tmp_path):
    file, beside = retake(Retake(clip=str(world / "videos/a.mp4"), weights=str(world / "ReCamMaster"),
                                 prompt="a bear", steps=1, out=str(tmp_path), **SIZE))
    assert read_video(file)[0].shape == (9, 32, 48, 3) and Path(beside).exists()
    with pytest.raises(ValueError, match="Wan T2V takes no source video"):
        retake(Retake(clip=str(world / "videos/a.mp4"), weights=str(world / "Wan"), **SIZE))


def test_recammaster_is_a_row_beside_redirector(world, tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "vbench", lambda *a: ({}, "not installed: VBench (x)"))
    rng = np.random.default_rng(0)
    for method in ("base", "ReCamMaster"):
        for name in "ab":
            path = trajectories.recammaster(9, 9)
            path[:, :3, 3] += 0.01 * rng.normal(size=(9, 3))
            save_poses(tmp_path / f"poses/{method}/{name}_camera_9_speed_1.npz", path)
    config = evaluate.Evaluate(
        videos=str(world / "videos"), weights=str(world / "ReDirector"), baselines=str(world / "ReCamMaster"),
        captions=str(world / "captions.csv"), paths="9", steps=1, estimator=str(tmp_path / "poses"),
        out=str(tmp_path / "out"), **SIZE, **cameras(world))
    evaluate.evaluate(config)
    methods = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    assert list(methods) == ["base", "ReCamMaster"]
    assert all("failed" not in case for m in methods.values() for case in m["cases"].values())
    read = {m: read_video(tmp_path / f"out/{m}/videos/a_camera_9_speed_1.mp4")[0] for m in methods}
    assert read["base"].shape == read["ReCamMaster"].shape == (9, 32, 48, 3)
    assert not np.array_equal(read["base"], read["ReCamMaster"])
    # the base of an evaluation of its own makes the same videos: same noise, and no cameras were needed
    alone = dataclasses.replace(config, weights=config.baselines, baselines="", cameras="", fov=0.0,
                                out=str(tmp_path / "alone"))
    evaluate.evaluate(alone)
    video = tmp_path / "alone/base/videos/a_camera_9_speed_1.mp4"
    assert np.array_equal(read_video(video)[0], read["ReCamMaster"])
    for changes, why in [(dict(baselines=f"{config.baselines},{config.baselines}"), "expected one ReCamMaster"),
                         (dict(baselines=str(world / "Wan")), "Wan T2V takes no source video"),
                         (dict(weights="", generated="x"), "ckpt and baselines: --weights=FOLDER is needed")]:
        with pytest.raises(ValueError, match=why):
            evaluate.evaluate(dataclasses.replace(config, out=str(tmp_path / "none"), **changes))
