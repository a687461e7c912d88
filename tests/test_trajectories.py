"""Camera paths: speeds and rescaling, the ten of evaluations, Pluecker maps, pose errors."""
import json
import math

import numpy as np
import pytest
import torch
import trajectories as tr
from conftest import ROOT
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from scenes import pose, walk, yawed
from scipy.spatial.transform import Rotation
from scipy.stats import truncnorm

from data.camera_files import check_path

GOLDEN = ROOT / "tests/golden"
pt = torch.from_numpy


def walks(n, frames, seed=0):
    """n random paths (n, frames, 4, 4), each in a world of its own."""
    rng = np.random.default_rng(seed)
    return np.stack([pose(rng) @ walk(rng, frames) for _ in range(n)])


def test_relative_paths_and_speeds_are_their_closed_form():
    """The inverse of the first pose applied; the speeds of a screw motion, in any world."""
    c2w = walks(3, 6)
    for found in (tr.relative(c2w), tr.relative(pt(c2w)).numpy()):
        assert_allclose(found, np.linalg.inv(c2w[:, :1]) @ c2w, atol=1e-12)
    c2w = yawed(0.02 * np.arange(9))
    c2w[:, 1, 3] = 0.3 * np.arange(9) ** 2  # steps 0.3 (2i + 1)
    for world in (np.eye(4), pose(np.random.default_rng(1))):
        assert_allclose(tr.speeds(world @ c2w), (0.3 * 15, 0.02), rtol=1e-9)
    assert tr.speeds(c2w[:1]) == (0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_rescaled_maximum_speeds_are_those_asked_for(seed):
    """Eq. 12-14: one factor for all positions, one for all turns, so that the shape stays."""
    rng = np.random.default_rng(seed)
    c2w = walk(rng, rng.integers(2, 200), 10 ** rng.uniform(-4, 3), 10 ** rng.uniform(-4, 0.2))
    before, wanted = tr.speeds(c2w), tr.draw_speeds(rng)
    out = tr.rescale(c2w, *wanted)
    assert_allclose(tr.speeds(out), wanted, rtol=1e-9)
    assert_allclose(check_path(out), out, atol=1e-12)
    assert_allclose(out[:, :3, 3], c2w[:, :3, 3] * (wanted[0] / before[0]), rtol=1e-9, atol=1e-12)
    turns = tr.increments(c2w)[0] * (wanted[1] / before[1])
    assert_allclose(tr.increments(out)[0], turns, atol=1e-12)
    rounded = (pose(rng) @ c2w).astype(np.float32)  # as files hold it: no less exact
    assert_allclose(tr.speeds(tr.rescale(rounded, *wanted)), wanted, rtol=1e-9)


def test_rescaling_keeps_turns_and_rest():
    """Turns of more than pi in all are kept, and made; what does not move does not then."""
    for total, omega, expected in ((5 * math.pi, 0.01 * math.pi, math.pi), (2.8, 0.05, 5)):
        out = tr.rescale(yawed(np.linspace(0, total, 101)), 0.1, omega)
        assert_allclose(out, yawed(np.linspace(0, expected, 101)), atol=1e-12)
    still = walks(1, 7)[0, [3] * 7]
    assert_allclose(tr.rescale(still, 0.05, 0.01), still, atol=1e-12)
    assert_allclose(tr.rescale(tr.relative(walks(1, 9)[0]), 0, 0), [np.eye(4)] * 9, atol=1e-12)


def test_drawn_speeds_follow_the_truncated_gaussians():
    """Eq. 10-11; also far from the mean, where a cumulative distribution rounds to 1."""
    rng = np.random.default_rng(0)
    draws = np.array([tr.draw_speeds(rng) for _ in range(5000)])
    for x, (low, high, mean, sd) in zip(draws.T, (tr.V_BOUNDS, tr.OMEGA_BOUNDS)):
        law = truncnorm((low - mean) / sd, (high - mean) / sd, mean, sd)
        assert low <= x.min() and x.max() <= high
        assert np.abs(np.sort(x) - law.ppf((np.arange(len(x)) + 0.5) / len(x))).max() < 0.1 * sd
    far = [tr.draw_speeds(rng, (0.05, 0.06, 0.025, 0.001), (0.05, 0.06, 0.085, 0.001)) for _ in range(99)]
    v, omega = np.transpose(far)  # 25 sd above and below their means
    assert 0.05 <= v.min() and v.max() < 0.051 and 0.059 < omega.min()


def test_resampling_follows_the_same_curve():
    def curve(n):
        c2w = yawed(np.linspace(0, 2, n))
        c2w[:, :3, 3] = np.outer(np.linspace(0, 2, n), [1, -2, 0.5])
        return c2w
    for frames in 1, 17, 41, 161:
        assert_allclose(tr.resample(curve(41), frames), curve(frames), atol=1e-12)
    assert_allclose(tr.resample(curve(41)[3:4], 5), curve(41)[[3] * 5], atol=0)


def test_evaluation_paths_agree_with_redirector():
    """Whose numbers are those of PATHS, from 1."""
    golden = np.load(GOLDEN / "recammaster_trajectories.npz")
    assert len(golden.files) == 120
    assert (tr.recammaster("arc_left") == tr.recammaster(9)).all()
    for key in golden.files:  # camNN_nFRAMES_sSPEED
        cam, n, s = key.split("_")
        c2w = tr.recammaster(int(cam[3:]), int(n[1:]), float(s[1:]))
        assert_allclose(c2w, golden[key], atol=1e-3, err_msg=key)


def test_camera_maps_agree_with_redirector():
    golden = load_file(GOLDEN / "redirector_io.safetensors")
    for which in ("target", "cond"):
        row = golden[f"traj_{which}"]  # (1, T, 19): 0, fx, fy, cx, cy, 0, 0, c2w 3x4
        c2w = torch.eye(4).repeat(1, 9, 1, 1)
        c2w[:, :, :3] = row[..., 7:].view(1, 9, 3, 4)
        with torch.autocast("cpu", torch.bfloat16):  # which rounds nothing here
            maps = tr.camera_maps(c2w, row[:, 0, 1:5], 32, 48)
        assert maps.dtype == torch.float32 and maps.is_contiguous()
        torch.testing.assert_close(maps, golden[f"camera_{which}"], atol=1e-5, rtol=0)


def test_camera_maps_are_the_rays_of_the_pixels():
    rng, c2w, (H, W) = np.random.default_rng(0), walks(3, 17), (6, 10)
    intrinsics = rng.uniform([0.6, 0.9, 0.3, 0.4], [1.2, 1.7, 0.7, 0.6], (3, 4))
    maps = tr.camera_maps(pt(c2w), pt(intrinsics), H, W).numpy()
    assert maps.shape == (3, 24, 5, H, W)
    for _ in range(100):
        b, f, k, j, i = (rng.integers(n) for n in (3, 5, 4, H, W))
        frame = 4 * (f - 1) + 1 + k if f else 0
        fx, fy, cx, cy = intrinsics[b] * [W, H, W, H]  # pixels
        d = c2w[b, frame, :3, :3] @ [(i + 0.5 - cx) / fx, (j + 0.5 - cy) / fy, 1]
        d /= np.linalg.norm(d)
        o = c2w[b, frame, :3, 3]  # within 50 m: single precision
        assert_allclose(maps[b, k::4, f, j, i], [*np.cross(o, d), *d], atol=5e-5)


def test_poses_are_recammasters():
    """As its code had them; and of two of the ten paths, of which its file has four decimals."""
    io = {key: x.float() for key, x in load_file(GOLDEN / "recammaster_io.safetensors").items()}
    assert torch.equal(tr.poses(io["c2w_target"][None]), io["camera"])
    for number in (5, 9):
        found = tr.poses(tr.relative(tr.published(number))[None])[0]
        assert_allclose(found, io[f"camera_cam0{number}"], atol=1e-4)


@pytest.mark.parametrize("angle", [0, 1e-12, 3e-7, 1, math.pi - 1e-7, math.pi])
def test_angles_are_exact_near_zero_and_near_pi(angle):
    axes = np.random.default_rng(0).normal(size=(50, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    A = Rotation.random(50, random_state=1)
    B = A * Rotation.from_rotvec(angle * axes)
    for x, y in ((A, B), (B, A)):
        found = tr.rotation_angle(pt(x.as_matrix()), pt(y.as_matrix()))
        assert_allclose(found, angle, rtol=1e-7, atol=5e-15)


@pytest.mark.parametrize("schedule, last, rest", [
    ("linear", 2 * 8 / (9 * 8), 1), ("uniform", 1 / 9, 8 / 9), ("quadratic", 64 / 204, 1)])
def test_errors_are_their_closed_form(schedule, last, rest):
    """Eq. 3-4: a constant offset of all frames but the first; a turn of the last frame alone."""
    offset, angle = np.array([0.3, -0.1, 0.2]), 1e-7
    target = np.tile(np.eye(4), (2, 9, 1, 1))
    pred = target.copy()
    pred[0, 1:, :3, 3] += offset
    pred[1, -1:, :3, :3] = yawed([angle])[:, :3, :3]
    trans, rot = tr.pose_errors(pt(pred), pt(target), schedule)
    assert_allclose(trans, [np.linalg.norm(offset) * rest, 0], rtol=1e-12)
    assert_allclose(rot, [0, angle * last], rtol=1e-7, atol=1e-20)
    assert tr.frame_weights(1, schedule) == [1]


def test_errors_do_not_depend_on_either_world_frame_but_on_size():
    rng, pred, target = np.random.default_rng(0), walks(4, 17), walks(4, 17, 1)
    before = tr.pose_errors(pt(pred), pt(target))
    moved = tr.pose_errors(pt(pose(rng) @ pred), pt(pose(rng) @ target))
    double = tr.relative(target)
    length = np.linalg.norm(double[..., :3, 3], axis=-1) @ tr.frame_weights(17)
    double[..., :3, 3] *= 2  # metric: the right shape at the wrong size is an error
    assert_allclose(tr.pose_errors(pt(double), pt(target))[0], length, rtol=1e-9)
    pred[1] = math.nan  # a video that failed touches no other
    for a, b, c in zip(tr.pose_errors(pt(pred), pt(target)), before, moved):
        assert a[1].isnan()
        torch.testing.assert_close(a[[0, 2, 3]], b[[0, 2, 3]], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(b, c, atol=1e-10, rtol=1e-10)
    assert np.isnan([error(pred[1], target[1]) for error in (tr.trans_err, tr.rot_err)]).all()


def test_gradients_are_those_of_the_errors():
    """And none where there is no error, where arccos of the trace has an infinite one."""
    target = pt(walks(3, 5))
    pred = target.clone().requires_grad_()
    trans, rot = tr.pose_errors(pred, target)
    assert trans.tolist() == rot.tolist() == [0, 0, 0]
    (trans + rot).sum().backward()
    assert (pred.grad == 0).all()
    other = pt(tr.relative(walks(1, 5, 1))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tr.pose_errors(x, target[:1]), other)


def test_evaluation_errors_agree_with_redirector():
    poses = np.load(GOLDEN / "pose_errors.npz")
    numbers = json.loads((GOLDEN / "pose_errors.json").read_text())
    assert len(numbers) == 6
    for k, expected in numbers.items():
        pred, target = poses[f"pred{k}"], poses[f"gt{k}"]
        assert tr.trans_err(pred, target) == pytest.approx(expected["TransErr"], abs=1e-6)
        assert tr.rot_err(pred, target) == pytest.approx(expected["RotErr_deg"], abs=1e-6)


def test_evaluation_errors_are_invariant_as_they_should_be():
    """Under a similarity of the estimate, whose mirror image is none; a turn on the spot has no position."""
    rng = np.random.default_rng(0)
    target, noise = walk(rng, 10), rng.normal(size=(10, 3))
    pred = target.copy()
    pred[:, :3, 3] += 0.1 * noise
    pred[:, :3, :3] = pred[:, :3, :3] @ Rotation.from_rotvec(0.1 * noise).as_matrix()

    def moved(path):
        path = pose(rng) @ path
        path[:, :3, 3] = 3.7 * path[:, :3, 3] + [5, -2, 1]
        return path
    for error in tr.trans_err, tr.rot_err:
        assert error(moved(pred), target) == pytest.approx(error(pred, target), rel=1e-8)
        assert error(moved(target), target) < 1e-9
    assert tr.trans_err(target * [[1, 1, 1, -1], *[[1, 1, 1, 1]] * 3], target) > 1e-3
    assert tr.trans_err(target, yawed(noise[:, 0])) < 1e-12 and tr.rot_err(pred[:1], pred[:1]) == 0
    still = pred[[3] * 10]
    assert tr.trans_err(still, target) == pytest.approx(tr.trans_err(still * 0, target), rel=1e-9)


@pytest.mark.parametrize("call, arguments, message", [
    *((tr.rescale, (yawed([0, 0.1]), *speeds), "rescale") for speeds in (
        (-1, 0.1), (math.inf, 0.1), (0.1, 3.2), (math.nan, 0.1))),
    (tr.resample, (np.eye(4)[None], 0), "at least 1 frame"),
    (tr.recammaster, (1, 0), "at least 1 frame"),
    *((tr.recammaster, (path,), "arc_left") for path in (0, 11, "left")),
    *((tr.camera_maps, (torch.zeros(c2w), torch.ones(intrinsics), 8, 8), "4k . 1") for c2w, intrinsics in (
        ((1, 4, 4, 4), (1, 4)), ((5, 4, 4), (1, 4)), ((1, 5, 4, 4), (4,)))),
    (tr.pose_errors, (*torch.zeros(2, 1, 4, 4), "cubic"), "linear, uniform, quadratic"),
    (tr.pose_errors, (torch.zeros(9, 4, 4), torch.zeros(8, 4, 4)), "expected poses"),
    (tr.trans_err, (np.zeros((9, 4, 4)), np.zeros((8, 4, 4))), "resample the target")])
def test_what_cannot_be_is_refused(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)
