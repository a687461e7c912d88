"""The loop: settings, two ranks against one process, exact resume, interruption, bad input."""
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from plumbing import checkpoint
import train
from train import Config
from data.world import clip_numbers
from toy import world as toy_world
from evaluation import toy as toy_evaluation
from grpo import policy_loss
from plumbing.ranks import Stop
from plumbing.settings import parse

SMALL = ["--conditions=2", "--members=4", "--sample_every=1000", "--save_every=1", "--rooms=0", "--validate=0",
         "--rewards=trans=1,rot=1,sharpness=0.1"]


def run(*args, ranks=1, wait=True, env=None, script="train.py"):
    command = [sys.executable, script, *SMALL, *args]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={ranks}", *command[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | (env or {}))
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def patched(folder, change):
    """A script that is train.py after a change."""
    script = folder / "patched.py"
    script.write_text(f"import os, runpy, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\n{change}\n"
                      f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    return script


def weights(out):
    newest = sorted(out.glob("iteration_??????"))[-1]
    return load_file(newest / "self_attn.safetensors")


# ---- settings ----

def test_file_then_flags(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""A run."""\nlr = 1e-3  # high\nseed = 3\n'
                    'v = (0.1, 0.2, 0.15, 0.05)\nreweight = False\n')
    config = parse(Config, [str(file), "--seed=4", "--out=x=y", "--compile"])
    assert (config.lr, config.seed, config.out) == (1e-3, 4, os.path.abspath("x=y"))
    assert (config.reweight, config.compile, config.v) == (False, True, (0.1, 0.2, 0.15, 0.05))


@pytest.mark.parametrize("text, arg, message", [
    ("", "--lrr=1", "no setting 'lrr'; did you mean lr?"),
    ("", "--lr=fast", "--lr=fast: expected float, found 'fast'"),
    ("", "--seed=1.5", "expected int, found 1.5"),
    ("", "--reweight=1", "expected bool, found 1"),
    ("", "--lr", "expected --name=value"),
    ("import os\n", "", "line 1: expected name = value"),
    ("lr = open('x')\n", "", "line 1: expected a constant"),
    ("lr = = 3\n", "", "expected lines of name = value"),
    ("size, stride = 1, 2\n", "", "expected name = value"),
])
def test_bad_settings(tmp_path, text, arg, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        parse(Config, [str(file)] + ([arg] if arg else []))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings, message", [
    (dict(conditions=3), "do not divide over 2 ranks"), (dict(frames=80), "4k . 1"),
    (dict(size=30), "window size"), (dict(members=8, updates=3), "do not divide"),
    (dict(world="moon"), "toy, clips or captions"), (dict(members=0), "at least 1"),
    (dict(shift=0.0), "shift: expected > 0"), (dict(grad_clip=0.5), "grad_clip: expected more than 1"),
    (dict(tau=-0.1), "tau: expected >= 0"), (dict(betas=(0.9, 1.0)), "betas: expected two numbers"),
    (dict(log_to="paper"), "log_to: expected tensorboard or wandb"),
    (dict(window_per_condition=True), "window_per_condition: expected strategy random"),
    (dict(height=100, world="clips"), "multiples of 16"), (dict(world="clips"), "--clips=FOLDER is needed"),
])
def test_settings_that_cannot_work(settings, message):
    config = Config()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.check(2)


def test_every_clip_once_an_epoch():
    numbers = [n for iteration in range(7) for n in clip_numbers(iteration, 4, 14, 0)]
    assert sorted(numbers[:14]) == sorted(numbers[14:]) == list(range(14)) and numbers[:14] != numbers[14:]
    assert clip_numbers(3, 4, 14, 0) == numbers[12:16] != clip_numbers(3, 4, 14, 1)


# ---- running ----

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    code, stdout, err = run("--iterations=3", f"--out={out}")
    assert code == 0, err
    return out, stdout


def test_on_policy_ratio_is_one(straight):
    out, stdout = straight
    assert "on-policy ratio 1 + " in stdout and "as it should be" in stdout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in log] == [0, 1, 2]
    assert all(record["ratio_error"] < 1e-6 and record["failed"] == 0 for record in log)
    assert all(record["spread/trans"] > 0 and record["grad_norm"] > 0 for record in log)


def test_it_says_when_complete(straight):
    code, stdout, _ = run("--iterations=3", f"--out={straight[0]}")
    assert code == 0 and "3 of 3 iterations done" in stdout


@pytest.mark.parametrize("options", [[], ["--window_per_condition", "--first=4", "--conditions=4", "--seed=3"]])
def test_two_ranks_equal_one_process(tmp_path, options):
    """The largest group deviation (Eq. 5) included. Every call is of one condition, the reward goes in steps:
    batches of another size round otherwise, and that is not what is compared."""
    script = patched(tmp_path, """
import model
prepare = model.DiT.prepare
def one_by_one(self, condition):
    parts = [prepare(self, condition[i:i + 1]) for i in range(len(condition))]
    return parts[0].cat(parts)
model.DiT.prepare = one_by_one
""")
    logs, gradients, reward = [], [], tmp_path / "steps.py"
    reward.write_text("def steps(videos, scene):\n"
                      "    return (videos.long().sum((1, 2, 3, 4)) // 300).float()\n")
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        code, _, err = run("--iterations=1", "--micro_batch=4", "--reward_batch=4", "--share_prefix=False",
                           f"--rewards={reward}:steps=1", f"--out={out}", *options, ranks=ranks, script=script)
        assert code == 0, err
        moments = load_file(out / "iteration_000001/optimizer.safetensors")
        gradients.append(torch.cat([x.flatten() for name, x in moments.items()
                                    if name.startswith("exp_avg.")]))  # a tenth of the gradient
        logs.append(json.loads((out / "log.jsonl").read_text()))
    print("relative difference", float((gradients[0] - gradients[1]).norm() / gradients[0].norm()))
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()
    assert logs[0]["window"] == logs[1]["window"] and logs[0]["evaluations"] == logs[1]["evaluations"]
    assert len(set(map(str, logs[0]["window"]))) == (2 if options else 1)  # within a rank too
    for name in ("reward/steps", "spread/steps", "grad_norm", "loss", "advantage_std"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6, abs=1e-9), name


def test_resume_is_bitwise_also_after_kill(straight, tmp_path):
    process = run("--iterations=3", f"--out={tmp_path}", wait=False)
    while process.poll() is None and not (tmp_path / "iteration_000001/state.json").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    code, _, err = run("--iterations=3", f"--out={tmp_path}")
    assert code == 0, err
    one, two = weights(straight[0]), weights(tmp_path)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_signal_saves_and_says_so(tmp_path):
    process = run("--iterations=1000", f"--out={tmp_path}", "--save_every=1000", wait=False)
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "the same command goes on" in err
    assert len(list(tmp_path.glob("iteration_??????/state.json"))) == 1


def test_damaged_checkpoint_is_skipped_loudly(straight, tmp_path):
    code, _, _ = run("--iterations=2", f"--out={tmp_path}")
    assert code == 0
    file = tmp_path / "iteration_000002/self_attn.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, stdout, err = run("--iterations=3", f"--out={tmp_path}")
    assert code == 0 and "going on from iteration_000001" in err and "checksum" in err and "1 of 3 iterations done" in stdout
    one, two = weights(straight[0]), weights(tmp_path)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_damaged_checkpoints_cost_no_good_ones_and_are_not_evaluated(main, tmp_path, capsys):
    main(tmp_path, "--iterations=3", "--keep=2", "--max_skips=1")
    file = tmp_path / "iteration_000003/self_attn.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    main(tmp_path, "--iterations=2", "--keep=2", "--max_skips=1")  # 3 is later, and no reason to drop 2
    assert [f.name[-1] for f in sorted(tmp_path.glob("iteration_*"))] == ["2", "3"]
    assert checkpoint.find_checkpoint(tmp_path).parent.name == "iteration_000002"
    assert "iteration_000003/self_attn.safetensors: skipped, its checksum" in capsys.readouterr().err
    for named in (file, file.parent):
        with pytest.raises(ValueError, match="no checkpoint that is whole"):
            checkpoint.find_checkpoint(named)


def test_a_damaged_log_stops_nothing(main, tmp_path):
    main(tmp_path, "--iterations=1")
    with open(tmp_path / "log.jsonl", "ab") as log:
        for line in (b"{}", b'{"iteration": null}', b'{"iteration": "x"}', b'{"iteration": -1}',
                     b'{"iteration": 1, "x{"iteration": 2}', b"\xff\xfe\x00", b"[" * 9999,
                     b'{"iteration": 0, "half'):
            log.write(line + b"\n")
    main(tmp_path, "--iterations=2")
    assert [record["iteration"] for record in log_of(tmp_path)] == [0, 1]


def test_other_settings_are_refused(straight):
    code, _, err = run("--iterations=4", f"--out={straight[0]}", "--lr=0.1")
    assert code == 1 and "lr = " in err and "Traceback" not in err


MEET = """
import os, sys, time, torch, torch.distributed as dist
from plumbing.ranks import connect
rank, meeting, missing = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2])
time.sleep(meeting if rank == 0 else 0)  # who is early must not take what the last meeting left in the store
if rank != missing:
    try:
        connect("gloo", 60 if missing < 0 else 2)
    except TimeoutError as error:
        sys.exit(str(error))
    dist.all_reduce(x := torch.ones(1) + rank)
    print(int(x), flush=True)
os._exit(0)  # nothing is cleared away
"""


def test_ranks_meet_anew_in_a_store_that_outlives_them(tmp_path):
    """As torchrun's does over a restart; and a rank that does not come is named."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2",
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
    for meeting, missing in ((0, -1), (1, -1), (0, 0), (0, 1)):
        command = [sys.executable, script, str(meeting), str(missing)]
        ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
                 for rank in range(2)]
        said = [process.communicate(timeout=60) for process in ranks]
        if missing < 0:
            assert [out for out, _ in said] == ["3\n", "3\n"], said
        else:
            assert f"rank {missing} did not start in 2 s" in said[1 - missing][1], said


def test_ranks_that_differ_are_caught(tmp_path):
    script = patched(tmp_path, """
step = torch.optim.AdamW.step
def astray(self, *args):
    step(self, *args)
    if os.environ["RANK"] == "1":
        self.param_groups[0]["params"][0].data.flatten()[0] += 1e-3
torch.optim.AdamW.step = astray
""")
    code, _, err = run("--iterations=3", f"--out={tmp_path / 'out'}", ranks=2, script=script)
    assert code != 0 and "after the first update: weights of rank 1 differ from rank 0's" in err
    assert not list((tmp_path / "out").glob("iteration_*"))


# ---- numbers that are none, in this process ----

@pytest.fixture
def main(monkeypatch):
    """train.main in a small world; signals are put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(toy_world, "TRAIN_ROOMS", 4)
    always = [*SMALL, "--keep=9", f"--weights={ROOT / 'toy/weights'}"]
    yield lambda out, *args: train.main([*always, f"--out={out}", *args])
    for s, handler in handlers.items():
        signal.signal(s, handler)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


REWARD = """
import itertools, torch

turns = itertools.count()

def grumpy(videos, scene):
    turn = next(turns) % 4 if len(videos) == 1 else 0  # of four videos, one raises and one gets no score
    if turn == 0:
        raise ValueError("I do not like it")
    return videos.float().mean((1, 2, 3, 4)) * (float("nan") if turn == 1 else 1)
"""


def test_help_lists_every_setting(capsys):
    train.main(["--help"])
    words = capsys.readouterr().out
    assert "torchrun" in words and all(f"    {f.name}: " in words for f in dataclasses.fields(train.Config))


def test_failed_rewards_are_masked_and_counted_or_stop_the_run(main, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(REWARD)
    rewards = f"--rewards={tmp_path}/mine.py:grumpy=1"
    main(tmp_path / "a", "--iterations=2", rewards, "--max_failures=0.95")
    log = log_of(tmp_path / "a")
    assert [record["failed"] for record in log] == [4, 4] and all(record["grad_norm"] > 0 for record in log)
    assert [record["failed/grumpy"] for record in log] == [4, 4] and "failed/trans" not in log[0]
    heard = capsys.readouterr().err
    assert heard.count("warning: reward grumpy failed for 4 of 8 videos, ValueError: I do") == 1
    assert all(x.isfinite().all() for x in weights(tmp_path / "a").values())
    for record in log:  # a failed video is no video with score 0
        assert 0 < record["spread/grumpy"] < record["reward/grumpy"] / 4
    with pytest.raises(RuntimeError, match=r"rewards failed for \d of 8 videos \(grumpy: .*(like it|NaN)"):
        main(tmp_path / "b", "--iterations=2", rewards, "--max_failures=0.1")
    assert not list((tmp_path / "b").glob("iteration_*"))


def test_an_edited_reward_does_not_resume(main, tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "a"
    code = "def bright(videos, scene):\n    return videos.float().mean((1, 2, 3, 4))\n"
    rewards = f"--rewards=sharpness=1,{file}:bright=1"
    file.write_text(code)
    main(out, "--iterations=1", rewards)
    file.write_text(code + "# another\n")
    with pytest.raises(RuntimeError, match="iteration_000001: made with code of rewards = {'bright': "):
        main(out, "--iterations=2", rewards)
    file.write_text(code)
    main(out, "--iterations=2", rewards)
    state = out / "iteration_000002/state.json"
    told = json.loads(state.read_text())
    del told["config"]["code of rewards"]  # as before it was kept
    state.write_text(json.dumps(told))
    main(out, "--iterations=3", rewards)
    assert [record["iteration"] for record in log_of(out)] == [0, 1, 2]


CLAIM = "import pathlib, sys; from plumbing import checkpoint; held = checkpoint.lock_folder(pathlib.Path(sys.argv[1]), 0)"


def test_one_run_a_folder(main, tmp_path, monkeypatch):
    """From before checkpoints are read to the evaluation's end; a run that has ended keeps nothing."""
    refused = []

    def probe(real, *args, **options):
        other = subprocess.run([sys.executable, "-c", CLAIM, tmp_path], cwd=ROOT, stderr=subprocess.PIPE)
        refused.append(b"another process is writing there; wait for it" in other.stderr)
        return real(*args, **options)
    for module, name in ((checkpoint, "resume"), (checkpoint, "save_checkpoint"), (toy_evaluation, "finish")):
        monkeypatch.setattr(module, name, functools.partial(probe, getattr(module, name)))
    main(tmp_path, "--iterations=1", "--rooms=1")
    assert refused == [True] * 3
    held = subprocess.Popen([sys.executable, "-c", CLAIM + "; print(1, flush=True); sys.stdin.read()",
                             str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    lock = checkpoint.lock_folder
    monkeypatch.setattr(checkpoint, "lock_folder", functools.partial(lock, patience=0.5))
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="is writing there; wait for it or choose another --out"):
        main(tmp_path, "--iterations=2")
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    monkeypatch.setattr(checkpoint, "lock_folder", lock)
    threading.Timer(1, held.kill).start()
    main(tmp_path, "--iterations=2")  # waits for it
    held.communicate()
    assert [record["iteration"] for record in log_of(tmp_path)] == [0, 1]


def test_a_dead_alarm_is_heard(main, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(REWARD.replace("turn = next", "turn = 0 * next"))
    main(tmp_path / "a", "--iterations=1", f"--rewards=sharpness=1,{tmp_path}/mine.py:grumpy=0")
    text, = (tmp_path / "a/log.jsonl").read_text().splitlines()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["failed"], record["failed/grumpy"], record["reward/grumpy"]) == (0, 8, None)
    assert "warning: reward grumpy failed for 8 of 8 videos" in capsys.readouterr().err


def test_the_ratio_of_the_first_update_is_logged(main, tmp_path):
    main(tmp_path, "--iterations=2", "--updates=2", "--lr=1e-3")  # after a step it is no longer 1
    assert all(record["ratio_error"] < 1e-5 for record in log_of(tmp_path))


@pytest.mark.parametrize("eps, same", [(1e-15, True), (1e-8, False)])
def test_the_objectives_scale_does_not_matter(main, tmp_path, monkeypatch, capsys, eps, same):
    """Log-probs are means over latent elements: the gradient is a million times smaller in a large video."""
    ends = []
    for scale in 1.0, 1e-6:
        monkeypatch.setattr(train, "policy_loss", lambda *args, scale=scale, **options: (
            lambda loss, stats: (loss * scale, stats))(*policy_loss(*args, **options)))
        main(tmp_path / str(scale), "--iterations=3", f"--eps={eps}", "--weight_decay=0")
        ends.append(weights(tmp_path / str(scale)))
    start = load_file(ROOT / "toy/weights/toy_base.safetensors")
    moved = torch.cat([(x - start[name].float()).flatten() for name, x in ends[0].items()])
    apart = torch.cat([(x - ends[1][name]).flatten() for name, x in ends[0].items()])
    assert (apart.norm() < 1e-2 * moved.norm()) == same
    logs = [log_of(tmp_path / str(scale)) for scale in (1.0, 1e-6)]
    assert logs[0][0]["update_rms"] == pytest.approx(1, abs=0.02)
    assert logs[1][0]["grad_rms"] == pytest.approx(1e-6 * logs[0][0]["grad_rms"], rel=1e-4)
    assert (logs[1][0]["update_rms"] > 0.9) == same
    assert capsys.readouterr().err.count("below 10 times eps") == (0 if same else 1)


def test_an_outlier_is_cut_to_a_multiple_of_the_median_at_any_scale():
    for scale in 1.0, 1e-9:
        p = torch.nn.Parameter(torch.zeros(4))
        norms = []
        for norm in (1, 2, 3, 2, 2, 100, 2):
            p.grad = torch.tensor([0.0, 0.6, 0.0, 0.8]) * norm * scale
            found = train.clip_gradient([p], norms, 3.0)
            assert float(found) == pytest.approx(norm * scale, rel=1e-5)
            assert float(p.grad.norm()) == pytest.approx(min(norm, 6) * scale, rel=1e-5)


def test_kl_is_against_the_base_and_holds_the_policy_back(main, tmp_path):
    for kl in 1.0, 1e-4:
        main(tmp_path / str(kl), "--iterations=3", f"--kl={kl}", "--lr=1e-3")
    far, near = log_of(tmp_path / "0.0001"), log_of(tmp_path / "1.0")
    assert far[0]["kl"] == near[0]["kl"] == 0 < near[2]["kl"] < far[2]["kl"]


def test_validation_is_of_fixed_conditions_before_and_after(main, tmp_path):
    main(tmp_path / "a", "--iterations=3", "--validate=3", "--sample_every=2")
    found = [(r["iteration"], r["valid/trans"]) for r in log_of(tmp_path / "a") if "valid/trans" in r]
    assert [i for i, _ in found] == [0, 2, 3]
    main(tmp_path / "b", "--iterations=2", "--validate=3", "--sample_every=2", "--lr=1e-12", "--micro_batch=2")
    still = [r["valid/trans"] for r in log_of(tmp_path / "b") if "valid/trans" in r]
    assert still == pytest.approx([found[0][1]] * 2, rel=1e-3) and found[2][1] != found[0][1]


def test_non_finite_gradients_change_nothing_and_stop_in_a_row(main, tmp_path, monkeypatch):
    calls, bad, right = [0], {1}, policy_loss  # with one step in the window, one call an iteration

    def wrong(*args, **options):
        loss, stats = right(*args, **options)
        calls[0] += 1
        return loss * float("nan" if calls[0] - 1 in bad else 1), stats
    monkeypatch.setattr(train, "policy_loss", wrong)
    main(tmp_path, "--iterations=3")
    assert [record["skipped"] for record in log_of(tmp_path)] == [0, 1, 0]
    assert not (tmp_path / "iteration_000002").exists()  # nothing is saved while updates are skipped
    one, three = (load_file(tmp_path / f"iteration_00000{k}/self_attn.safetensors") for k in (1, 3))
    assert any(not torch.equal(one[k], three[k]) for k in one)
    calls[0], bad = 0, {0}
    with pytest.raises(RuntimeError, match="the last 1 updates were skipped.*3 of 4 iterations are saved"):
        main(tmp_path, "--iterations=4")
    calls[0], bad = 0, range(100)
    with pytest.raises(RuntimeError, match="iteration 4: gradient norm nan, 2 updates skipped in a row"):
        main(tmp_path, "--iterations=9", "--max_skips=2")
    assert all(torch.equal(three[k], x) for k, x in weights(tmp_path).items())


def test_a_signal_never_saves_half_an_update(main, straight, tmp_path, monkeypatch):
    monkeypatch.undo()  # with all rooms, as in `straight`
    step, count = torch.optim.AdamW.step, []

    def interrupted(self, *args):
        count.append(1)
        step(self, *args)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(Stop):
        main(tmp_path, "--iterations=3", "--save_every=100", "--weights=toy/weights")
    assert [f.name for f in tmp_path.glob("iteration_*")] == ["iteration_000002"]
    main(tmp_path, "--iterations=3", "--save_every=100", "--weights=toy/weights")
    one, two = weights(straight[0]), weights(tmp_path)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [record["iteration"] for record in log_of(tmp_path)][-1] == 2


@pytest.mark.parametrize("args, message", [
    (["--weights=nowhere"], "nowhere"), (["nothing.py"], "nothing.py"),
    (["--rewards=tran=1"], "did you mean trans"), (["--rewards=mine.py:f=1"], "mine.py"),
    (["--config=a"], "no setting 'config'"),
])
def test_bad_input_is_one_line(args, message, tmp_path):
    code, _, err = run(*args, f"--out={tmp_path / 'o'}")
    assert code == 1 and message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()
