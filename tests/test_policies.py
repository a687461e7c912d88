"""ReDirector, ReCamMaster and plain Wan T2V by naming a folder of (tiny) weights: every step of the way."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file

import evaluate
import model
import train
import trajectories
from benchmarks import plan
from data.clips import ClipCache
from data.prepare import Prepare, prepare
from data.video import read_video
from data.world import open_policy
from evaluation import outside
from evaluation.ablation import without_geometry
from evaluation.retake import Retake, retake
from evaluation.scores import save_poses
from pretrained.weights import DIT, RECAMMASTER, REDIRECTOR, find_policy, weights_sizes

SIZE = dict(frames=5, height=32, width=48)
CPU = torch.device("cpu")
POLICIES = "ReDirector", "ReCamMaster", "Wan"


@pytest.fixture(scope="module")
def world(published, tmp_path_factory):
    """Weights of the three policies, with videos and captions; cameras, prompts, a reward."""
    w = tmp_path_factory.mktemp("policies")
    for policy in POLICIES:
        (w / policy).symlink_to(published(policy))
    np.savez(w / "cameras.npz", c2w=trajectories.recammaster(9, 13))
    (w / "prompts.txt").write_text("a bear walks\n\na man dances\n")
    (w / "bright.py").write_text("def bright(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n")
    return w


def videos(world):
    folder = f"{world}/ReDirector/videos"
    return dict(videos=folder, captions=f"{folder}/captions.csv", **SIZE)


def cache(world, out, policy, **options):
    return prepare(Prepare(out=str(out), weights=f"{world}/{policy}", **videos(world), **options))


def run(world, out, policy, clips, *more):
    """Two iterations of train.py, on policy and with gradients -> the trained tensors."""
    data = ["--world=clips", f"--clips={clips}", f"--trajectories={world}/ReDirector/paths"]
    data = ["--world=captions", f"--captions={clips}"] if policy == "Wan" else data
    size = [f"--{name}={x}" for name, x in SIZE.items()]
    train.main([*data, *size, f"--weights={world}/{policy}", "--conditions=2", "--members=2", "--steps=4",
                "--size=2", "--lr=0.01", "--iterations=2", "--validate=1", "--sample_every=2", f"--out={out}",
                f"--rewards={world}/bright.py:bright=1", "--guidance=2", *more])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [record for record in log if "grad_norm" in record]  # others are of the validation
    assert log and all(record["ratio_error"] == 0 and record["grad_norm"] > 0 for record in log), log
    return load_file(out / "iteration_000002/self_attn.safetensors")


def test_policies_are_told_by_their_files(world, tmp_path):
    found = [find_policy(world / policy) for policy in POLICIES]
    assert [p.name for p in found] == ["ReDirector", "ReCamMaster", "Wan T2V"]
    assert [p.source for p in found] == [True, True, False] and found[1].parts == ("text", "latents")
    assert not any("clip" in name for name in weights_sizes(world / "ReCamMaster"))
    save_file(torch.load(world / "ReCamMaster" / RECAMMASTER), tmp_path / REDIRECTOR)  # the same keys
    assert find_policy(tmp_path).files == (tmp_path / REDIRECTOR,)
    (tmp_path / RECAMMASTER).touch()
    (tmp_path / DIT).symlink_to(world / "Wan" / DIT)  # its base's own file beside it does no harm
    assert find_policy(tmp_path).files == (tmp_path / RECAMMASTER,)
    assert find_policy(tmp_path / "empty").name == "ReDirector"  # and its files are found missing
    refused(lambda: weights_sizes(tmp_path / "empty"), REDIRECTOR, error=FileNotFoundError)


def test_plan_is_of_the_policy(world):
    for policy, said in (("ReCamMaster", "24 a network row: 12 of the target video, as many of the source"),
                         ("Wan", "12 a network row: 12 of the target video")):
        lines = plan.describe(plan.Plan(world="captions" if policy == "Wan" else "clips", steps=3, size=1,
                                        weights=f"{world}/{policy}", conditions=1, members=2, **SIZE), 1)
        count = sum(p.numel() for p in open_policy(world / policy, None, CPU).parameters())
        assert lines["parameters"].startswith(f"{count:,}, of which") and lines["tokens"] == said


def test_clips_of_one_policy_serve_the_other(world, tmp_path):
    """What a policy does not take is not asked for, and added where another takes it, which then trains."""
    lean = cache(world, tmp_path, "ReCamMaster")  # neither CLIP nor cameras, nor a model of either
    assert sorted(lean["settings"]["without"]) == ["c2w", "image", "intrinsics"]
    first = ClipCache(tmp_path, ("text", "latents"), **SIZE)[0]
    parts = find_policy(world / "ReDirector").parts
    refused(lambda: ClipCache(tmp_path, parts), "its clips lack image, c2w, intrinsics")
    part = shutil.copytree(tmp_path, tmp_path.with_name("part"))  # with a camera for one clip of two
    np.savez(part / "clip0.npz", c2w=trajectories.recammaster(9, 13))
    index = cache(world, part, "ReDirector", cameras=str(part), fov=60.0)
    assert index["clips"] == ["clip0.mp4"] and list(index["skipped"]) == ["clip1.mp4"]
    full = cache(world, tmp_path, "ReDirector", cameras=f"{world}/cameras.npz", fov=60.0)
    assert full["settings"]["without"] == [] and full["clips"] == lean["clips"]
    second = ClipCache(tmp_path, parts, **SIZE)[0]
    assert torch.equal(second.latents, first.latents) and torch.equal(second.text, first.text)
    refused(lambda: cache(world, tmp_path, "ReCamMaster"), "cameras = files of", "wanted None")
    assert run(world, tmp_path / "run", "ReDirector", tmp_path)


def test_recammaster_trains(world, tmp_path):
    """All that trains moves and is saved; a checkpoint lies over the file."""
    cache(world, tmp_path / "clips", "ReCamMaster", cameras=f"{world}/cameras.npz", fov=60.0)
    trained = run(world, tmp_path / "run", "ReCamMaster", tmp_path / "clips")
    assert {name.split(".")[2] for name in trained} == {"self_attn", "cam_encoder", "projector"}
    base = open_policy(world / "ReCamMaster", None, CPU).state_dict()
    assert all(not torch.equal(x, base[name]) for name, x in trained.items())
    ours = open_policy(world / "ReCamMaster", tmp_path / "run/iteration_000002/self_attn.safetensors", CPU)
    assert all(torch.equal(x, trained.get(name, base[name])) for name, x in ours.state_dict().items())


def test_wan_trains_on_captions(world, tmp_path):
    trained = run(world, tmp_path / "run", "Wan", world / "prompts.txt")
    assert {name.split(".")[2] for name in trained} == {"self_attn"}
    shown, fps = read_video(tmp_path / "run/samples/iteration_000002.mp4")
    assert fps == 16 and len(shown) == 5


def test_recammaster_is_a_row_beside_redirector(world, tmp_path, monkeypatch):
    """The same noise and captions: alone, as base, it makes the videos that it makes as a baseline.
    No cameras are needed for it, nor for a retake."""
    monkeypatch.setattr(outside, "vbench", lambda *a: ({}, "not installed: VBench (x)"))
    path = trajectories.recammaster(9, 5)
    for case in (f"{method}/clip{i}" for method in ("base", "ReCamMaster") for i in range(2)):
        save_poses(tmp_path / f"poses/{case}_camera_9_speed_1.npz", path)
    config = evaluate.Evaluate(
        weights=f"{world}/ReDirector", baselines=f"{world}/ReCamMaster", paths="9", steps=1, fov=60.0,
        estimator=f"{tmp_path}/poses", out=f"{tmp_path}/out", cameras=f"{world}/cameras.npz", **videos(world))
    evaluate.evaluate(config)
    evaluate.evaluate(dataclasses.replace(config, weights=config.baselines, baselines="", cameras="", fov=0.0,
                                          out=f"{tmp_path}/alone"))
    base, beside, alone = (read_video(tmp_path / f"{run}/videos/clip0_camera_9_speed_1.mp4")[0]
                           for run in ("out/base", "out/ReCamMaster", "alone/base"))
    assert np.array_equal(alone, beside) and not np.array_equal(base, beside)
    file, _ = retake(Retake(clip=f"{world}/Wan/videos/clip0.mp4", weights=f"{world}/ReCamMaster",
                            prompt="a bear", steps=1, out=f"{tmp_path}/retake", **SIZE))
    assert read_video(file)[0].shape == (5, 32, 48, 3)


def trained(policy, *flags):
    return lambda w, out: run(w, out, policy, w / "prompts.txt", *(flag.format(w=w) for flag in flags))


def evaluated(**settings):
    given = dict(weights="{w}/ReDirector", estimator="{w}", cameras="{w}/cameras.npz") | settings
    return lambda w, out: evaluate.evaluate(evaluate.Evaluate(
        out=str(out), fov=60.0, **videos(w), **{name: value.format(w=w) for name, value in given.items()}))


@pytest.mark.parametrize("call, why", [
    (lambda w, out: model.load_dit(w / "ReCamMaster" / RECAMMASTER, w / "ReDirector" / REDIRECTOR),
     "needs a base with control_adapter"),
    (lambda w, out: retake(Retake(clip=f"{w}/Wan/videos/clip0.mp4", weights=f"{w}/Wan", **SIZE)),
     "Wan T2V takes no source video"),
    (trained("Wan", "--world=clips", "--clips={w}/c", "--trajectories={w}/ReDirector/paths", "--captions="),
     "Wan T2V takes no source video: expected world = captions"),
    (trained("Wan", "--weights={w}/ReCamMaster"), "ReCamMaster takes a source video: expected world = clips"),
    (trained("Wan", "--rewards=trans=1,exposure=1"), "rewards: trans=1: this world has no path"),
    (trained("Wan", "--captions="), "--captions=FILE is needed"),
    (trained("Wan", "--trajectories=x"), "trajectories: world = captions does not read it"),
    (trained("Wan", "--captions={w}/empty.txt"), "empty.txt: expected UTF-8 text, one prompt a line"),
    (evaluated(baselines="{w}/ReCamMaster,{w}/ReCamMaster"), "expected one ReCamMaster"),
    (evaluated(baselines="{w}/Wan"), "Wan T2V takes no source video"),
    (evaluated(baselines="{w}/ReCamMaster", weights="", generated="x"),
     "ckpt and baselines: --weights=FOLDER is needed")])
def test_what_does_not_fit_is_refused_at_once(world, tmp_path, call, why):
    (world / "empty.txt").write_text("\n \n")
    refused(lambda: call(world, tmp_path / "out"), why, error=(ValueError, OSError))
    assert not (tmp_path / "out").exists()


def test_geometry_is_what_the_ablation_leaves_out():
    assert without_geometry("trans=1, rot=1,sharpness=0.01,my.py:f=2") == "sharpness=0.01,my.py:f=2"
    refused(lambda: without_geometry("vq=1"), "expected some of trans, rot and some of quality")
