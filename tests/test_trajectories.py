import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import pose, walk
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from scipy.stats import truncnorm

import trajectories as tr
from data.camera_files import check_path

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = Path(__file__).parents[2] / "shared" / "clips" / "recammaster_camera_extrinsics.json"


def yaw(angles):
    """A path (T, 4, 4) that turns about y by the given total angles."""
    c2w = np.tile(np.eye(4), (len(angles), 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(np.outer(angles, [0, 1, 0])).as_matrix()
    return c2w


# ---- path basics and rescaling

def test_relative_is_what_the_inverse_of_the_first_pose_does():
    rng = np.random.default_rng(0)
    c2w = np.stack([pose(rng) @ walk(rng, 6) for _ in range(3)])
    expected = np.linalg.inv(c2w[:, :1]) @ c2w
    np.testing.assert_allclose(tr.relative(c2w), expected, atol=1e-12)
    np.testing.assert_allclose(tr.relative(torch.from_numpy(c2w)).numpy(), expected, atol=1e-12)


def test_speeds_of_a_screw_motion_are_its_closed_form():
    c2w = yaw(0.02 * np.arange(9))
    c2w[:, 1, 3] = 0.3 * np.arange(9) ** 2  # steps 0.3 (2i + 1)
    np.testing.assert_allclose(tr.speeds(c2w), (0.3 * 15, 0.02), rtol=1e-12)
    rng = np.random.default_rng(1)
    np.testing.assert_allclose(tr.speeds(pose(rng) @ c2w), tr.speeds(c2w), rtol=1e-9)  # in any world
    assert tr.speeds(c2w[:1]) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_rescaled_maximum_speeds_are_those_asked_for(seed):
    rng = np.random.default_rng(seed)
    c2w = walk(rng, rng.integers(2, 200), 10 ** rng.uniform(-4, 3), 10 ** rng.uniform(-4, 0.2))
    v, omega = tr.draw_speeds(rng)
    out = tr.rescale(c2w, v, omega)
    np.testing.assert_allclose(tr.speeds(out), (v, omega), rtol=1e-9)
    R = out[:, :3, :3]
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.broadcast_to(np.eye(3), R.shape), atol=1e-12)
    # one factor for all positions, one for all increments: shape and the directions of turning stay
    np.testing.assert_allclose(out[:, :3, 3], c2w[:, :3, 3] * (v / tr.speeds(c2w)[0]), rtol=1e-9, atol=1e-12)
    a, b = tr.increments(out)[0], tr.increments(c2w)[0]
    np.testing.assert_allclose(a, b * (omega / tr.speeds(c2w)[1]), atol=1e-12)
    np.testing.assert_allclose(tr.rescale(out, *tr.speeds(c2w)), c2w, atol=1e-9 * np.abs(c2w).max())


def test_rescaling_is_as_exact_for_a_path_rounded_to_float32():
    rng = np.random.default_rng(0)
    c2w = (pose(rng) @ walk(rng, 50)).astype(np.float32)
    for path in (c2w, tr.relative(c2w)):
        np.testing.assert_allclose(tr.speeds(tr.rescale(path, 0.03, 0.004)), (0.03, 0.004), rtol=1e-9)


def test_rescaling_keeps_turns_of_more_than_pi():
    out = tr.rescale(yaw(np.linspace(0, 5 * math.pi, 101)), 0.1, 0.01 * math.pi)  # from 0.05 pi a frame
    np.testing.assert_allclose(tr.increments(out)[0], np.tile([0, 0.01 * math.pi, 0], (100, 1)), atol=1e-13)
    np.testing.assert_allclose(out, yaw(np.linspace(0, math.pi, 101)), atol=1e-12)
    out = tr.rescale(yaw(np.linspace(0, 0.9 * math.pi, 11)), 0.1, 0.5)  # and makes them: 5 rad in all
    np.testing.assert_allclose(out, yaw(np.linspace(0, 5, 11)), atol=1e-12)


def test_what_is_still_stays_still_under_rescaling():
    rng = np.random.default_rng(3)
    still = np.tile(pose(rng), (7, 1, 1))
    np.testing.assert_allclose(tr.rescale(still, 0.05, 0.01), still, atol=1e-12)
    out = tr.rescale(yaw(np.linspace(0, 1, 9)), 0.05, 0.01)  # a pure rotation gains no translation
    assert tr.speeds(out)[0] == 0 and tr.speeds(out)[1] == pytest.approx(0.01, rel=1e-9)
    line = np.tile(np.eye(4), (9, 1, 1))
    line[:, 2, 3] = np.linspace(0, 3, 9)
    out = tr.rescale(line, 0.05, 0.01)
    assert tr.speeds(out)[1] == 0 and tr.speeds(out)[0] == pytest.approx(0.05, rel=1e-9)
    np.testing.assert_array_equal(tr.rescale(np.eye(4)[None], 1, 1), np.eye(4)[None])
    np.testing.assert_allclose(tr.rescale(walk(rng, 9), 0, 0), np.tile(np.eye(4), (9, 1, 1)), atol=1e-12)


@pytest.mark.parametrize("v, omega", [(-1, 0.1), (math.nan, 0.1), (math.inf, 0.1), (0.1, -1), (0.1, 3.2),
                                      (0.1, math.nan)])
def test_rescaling_to_impossible_speeds_is_refused(v, omega):
    with pytest.raises(ValueError, match="rescale"):
        tr.rescale(yaw(np.arange(5) * 0.1), v, omega)


def test_drawn_speeds_follow_the_truncated_gaussians():
    rng = np.random.default_rng(0)
    draws = np.array([tr.draw_speeds(rng) for _ in range(20000)])
    for x, (low, high, mean, sd) in zip(draws.T, (tr.V_BOUNDS, tr.OMEGA_BOUNDS)):
        law = truncnorm((low - mean) / sd, (high - mean) / sd, mean, sd)
        assert low <= x.min() and x.max() <= high
        assert abs(x.mean() - law.mean()) < 5 * law.std() / math.sqrt(len(x))
        assert np.abs(np.sort(x) - law.ppf((np.arange(len(x)) + 0.5) / len(x))).max() < 0.05 * sd
    above, below = (0.05, 0.06, 0.025, 0.001), (0.05, 0.06, 0.085, 0.001)  # their means, by 25 sd
    far = np.array([tr.draw_speeds(rng, above, below) for _ in range(999)])
    assert 0.05 <= far[:, 0].min() and far[:, 0].max() < 0.051 and 0.059 < far[:, 1].min()
    np.testing.assert_allclose(np.degrees(tr.OMEGA_BOUNDS), (0.05, 0.8, 0.3, 0.2))
    assert tr.draw_speeds(rng, (0.02, 0.02, 0.5, 0.1), (0.1, 0.2, 0.15, 1)) <= (0.02, 0.2)
    with pytest.raises(ValueError, match="speed bounds"):
        tr.draw_speeds(rng, (0.2, 0.1, 0.1, 0.1))


def test_resampling_follows_the_same_curve():
    angles = np.linspace(0, 2, 41)
    c2w = yaw(angles)
    c2w[:, :3, 3] = np.outer(angles, [1, -2, 0.5])
    for frames in (1, 2, 17, 81, 161):
        out = tr.resample(c2w, frames)
        expected = yaw(np.linspace(0, 2, frames))
        expected[:, :3, 3] = np.outer(np.linspace(0, 2, frames), [1, -2, 0.5])
        np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_array_equal(tr.resample(c2w, 41), c2w)
    with pytest.raises(ValueError, match="at least 1 frame"):
        tr.resample(c2w, 0)
    np.testing.assert_array_equal(tr.resample(c2w[3:4], 5), np.tile(c2w[3], (5, 1, 1)))


# ---- the ten evaluation paths

def test_evaluation_paths_agree_with_redirector():
    golden = np.load(GOLDEN / "recammaster_trajectories.npz")
    assert len(golden.files) == 120
    for key in golden.files:  # camNN_nFRAMES_sSPEED
        cam, n, s = key.split("_")
        c2w = tr.recammaster(int(cam[3:]), int(n[1:]), float(s[1:]))
        assert c2w.dtype == np.float64
        np.testing.assert_allclose(c2w, golden[key], atol=1e-3, err_msg=key)


def test_evaluation_paths_by_name():
    for number, name in enumerate(tr.PATHS, 1):
        np.testing.assert_array_equal(tr.recammaster(name, 17, 1.5), tr.recammaster(number, 17, 1.5))
    end = {name: tr.recammaster(name)[-1] for name in tr.PATHS}  # OpenCV: x right, y down, z forward
    assert end["pan_right"][0, 2] > 0.3 and end["pan_left"][0, 2] < -0.3  # third column: looks along
    assert end["tilt_up"][1, 2] < -0.1 and end["tilt_down"][1, 2] > 0.1
    assert end["zoom_in"][2, 3] > 1.9 and end["zoom_out"][2, 3] < -1.9
    assert end["translate_up"][1, 3] < -0.9 and end["translate_down"][1, 3] > 0.9
    assert end["arc_left"][0, 3] < -1.9 and end["arc_right"][0, 3] > 1.9


def test_published_paths_look_at_their_point_and_have_the_published_speeds():
    for number in range(7, 11):
        c2w = tr.published(number)
        point = ([0, 0, 4] - c2w[:, :3, 3])[:, None] @ c2w[:, :3, :3]  # in camera axes
        np.testing.assert_allclose(point[:, 0, :2], 0, atol=1e-12)
        assert (point[:, 0, 2] > 0).all()
    rates = np.array([tr.speeds(tr.recammaster(n)) for n in range(1, 11)])
    assert 0.012 < rates[4:, 0].min() and rates[:, 0].max() < 0.027
    turns = np.degrees(rates[[0, 1, 2, 3, 6, 7, 8, 9], 1])
    assert 0.12 < turns.min() and turns.max() < 0.40


@pytest.mark.parametrize("frames", [1, 2, 5, 81, 200])
def test_evaluation_paths_at_any_length_and_speed(frames):
    for number in range(1, 11):
        slow, fast = tr.recammaster(number, frames), tr.recammaster(number, frames, 2)
        assert slow.shape == (frames, 4, 4)
        np.testing.assert_array_equal(slow[0], np.eye(4))
        check_path(slow)
        np.testing.assert_allclose(tr.speeds(fast), np.multiply(2, tr.speeds(slow)), rtol=1e-6, atol=1e-9)
    for bad in (0, 11, "left", "", 2.5, None):
        with pytest.raises(ValueError, match="arc_left"):
            tr.recammaster(bad, frames)
    with pytest.raises(ValueError, match="frame"):
        tr.recammaster(1, 0)


# ---- Pluecker maps

def test_camera_maps_agree_with_redirector():
    golden = load_file(GOLDEN / "redirector_io.safetensors")
    for which in ("target", "cond"):
        row = golden[f"traj_{which}"]  # (1, T, 19): 0, fx, fy, cx, cy, 0, 0, c2w 3x4
        c2w = np.tile(np.eye(4, dtype=np.float32), (1, 9, 1, 1))
        c2w[:, :, :3] = row[..., 7:].reshape(1, 9, 3, 4)
        maps = tr.camera_maps(torch.from_numpy(c2w), torch.from_numpy(row[:, 0, 1:5]), 32, 48)
        assert maps.dtype == torch.float32 and maps.is_contiguous()
        np.testing.assert_allclose(maps.numpy(), golden[f"camera_{which}"], atol=1e-5)


@pytest.mark.parametrize("B, T, H, W", [(1, 1, 3, 5), (2, 5, 7, 4), (3, 17, 6, 10)])
def test_camera_maps_are_the_rays_of_the_pixels(B, T, H, W):
    rng = np.random.default_rng(T)
    c2w = np.stack([pose(rng) @ walk(rng, T) for _ in range(B)])
    intrinsics = rng.uniform([0.6, 0.9, 0.3, 0.4], [1.2, 1.7, 0.7, 0.6], (B, 4))
    maps = tr.camera_maps(torch.from_numpy(c2w), torch.from_numpy(intrinsics), H, W).numpy()
    F = (T - 1) // 4 + 1
    assert maps.shape == (B, 24, F, H, W)
    for _ in range(200):
        b, f, k, j, i = (rng.integers(n) for n in (B, F, 4, H, W))
        frame = 0 if f == 0 else 4 * (f - 1) + 1 + k
        fx, fy, cx, cy = intrinsics[b] * [W, H, W, H]  # pixels
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        d = c2w[b, frame, :3, :3] @ np.linalg.inv(K) @ [i + 0.5, j + 0.5, 1]
        d /= np.linalg.norm(d)
        o = c2w[b, frame, :3, 3]
        tolerance = 1e-6 * (1 + np.abs(o).max())
        np.testing.assert_allclose(maps[b, k::4, f, j, i], [*np.cross(o, d), *d], atol=tolerance)
        point = o + 3.7 * d  # the moment is that of the whole ray
        np.testing.assert_allclose(maps[b, k:12:4, f, j, i], np.cross(point, d), atol=2 * tolerance)


def test_camera_maps_keep_their_precision_under_autocast():
    c2w, K = torch.from_numpy(tr.recammaster(9, 5))[None], torch.tensor([[0.9, 1.3, 0.5, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        maps = tr.camera_maps(c2w, K, 8, 8)
    assert maps.dtype == torch.float32 and torch.equal(maps, tr.camera_maps(c2w, K, 8, 8))


@pytest.mark.parametrize("c2w, intrinsics", [((1, T, 4, 4), (1, 4)) for T in (0, 2, 3, 4, 80)]
                         + [((5, 4, 4), (1, 4)), ((1, 5, 3, 4), (1, 4)), ((2, 5, 4, 4), (1, 4)),
                            ((1, 5, 4, 4), (4,))])
def test_camera_maps_refuse_other_shapes(c2w, intrinsics):
    with pytest.raises(ValueError, match="4k \\+ 1"):
        tr.camera_maps(torch.zeros(c2w), torch.ones(intrinsics), 8, 8)


# ---- ReCamMaster's poses

def test_poses_are_recammasters():
    """Of a path as its training code had it: as a file of its own kind, relative to the *source's* first camera;
    and of two of the ten paths, of which its file has four decimals."""
    io = {key: x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
          for key, x in load_tensors(GOLDEN / "recammaster_io.safetensors").items()}
    np.testing.assert_array_equal(tr.poses(io["c2w_target"][None]).numpy(), io["camera"])
    frames = json.loads((GOLDEN / "recammaster_cameras.json").read_text())
    absolute = []
    for name in ("cam02", "cam01"):  # the source's camera and the target's, in Unreal's axes and centimetres
        texts = [frames[f"frame{i}"][name].replace("[", "").replace("]", "").split() for i in range(len(frames))]
        c2w = np.array(texts, float).reshape(-1, 4, 4).swapaxes(1, 2)[..., [1, 2, 0, 3]] * [1, -1, 1, 1]
        c2w[:, :3, 3] /= 100
        absolute.append(c2w)
    source, target = absolute
    np.testing.assert_allclose(tr.poses((np.linalg.inv(source[0]) @ target)[None]).numpy(), io["camera"], atol=1e-6)
    for number in (5, 9):
        found = tr.poses(tr.relative(tr.published(number))[None])[0].numpy()
        np.testing.assert_allclose(found, io[f"camera_cam0{number}"], atol=1e-4)
    assert tr.poses(torch.zeros(2, 81, 4, 4)).shape == (2, 21, 12)


# ---- pose errors

@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-7, 3e-7, 1e-4, 0.1, 1.0, 3.0,
                                   math.pi - 1e-4, math.pi - 1e-7, math.pi])
def test_angles_are_exact_near_zero_and_near_pi(angle):
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(50, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    A = Rotation.random(50, random_state=1)
    B = A * Rotation.from_rotvec(angle * axes)
    for x, y in ((A, B), (B, A)):
        found = tr.rotation_angle(torch.from_numpy(x.as_matrix()), torch.from_numpy(y.as_matrix())).numpy()
        np.testing.assert_allclose(found, angle, rtol=1e-7, atol=5e-15)


def test_errors_are_their_closed_form():
    T, offset, angle = 9, np.array([0.3, -0.1, 0.2]), 1e-7
    target = np.tile(np.eye(4), (2, T, 1, 1))
    pred = target.copy()
    pred[0, 1:, :3, 3] += offset  # all frames but the first
    pred[1, -1, :3, :3] = Rotation.from_rotvec([0, angle, 0]).as_matrix()  # the last only
    expected = {"linear": 2 * 8 / (9 * 8), "uniform": 1 / 9, "quadratic": 64 / 204}  # the last frame's
    for schedule, last in expected.items():
        trans, rot = tr.pose_errors(torch.from_numpy(pred), torch.from_numpy(target), schedule)
        rest = 8 / 9 if schedule == "uniform" else 1
        np.testing.assert_allclose(trans, [np.linalg.norm(offset) * rest, 0], rtol=1e-12)
        np.testing.assert_allclose(rot, [0, angle * last], rtol=1e-7, atol=1e-20)
    with pytest.raises(ValueError, match="linear, uniform, quadratic"):
        tr.pose_errors(torch.from_numpy(pred), torch.from_numpy(target), "cubic")
    with pytest.raises(ValueError, match="expected poses"):
        tr.pose_errors(torch.from_numpy(pred[:, 1:]), torch.from_numpy(target))


@pytest.mark.parametrize("n", [1, 2, 9, 81])
def test_frame_weights_sum_to_one_and_never_fall(n):
    for schedule in ("linear", "uniform", "quadratic"):
        w = tr.frame_weights(n, schedule)
        assert w.shape == (n,) and w.sum() == pytest.approx(1) and (np.diff(w) >= 0).all()


def test_errors_do_not_depend_on_either_world_frame():
    rng = np.random.default_rng(0)
    pred, target = np.stack([walk(rng, 17) for _ in range(4)]), np.stack([walk(rng, 17) for _ in range(4)])
    before = tr.pose_errors(torch.from_numpy(pred), torch.from_numpy(target))
    moved = tr.pose_errors(torch.from_numpy(pose(rng) @ pred), torch.from_numpy(pose(rng) @ target))
    one = tr.pose_errors(torch.from_numpy(pred[2]), torch.from_numpy(target[2]))
    for a, b, c in zip(before, moved, one):
        assert a.shape == (4,)
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(a[2], c, atol=1e-14, rtol=1e-14)
    double = torch.from_numpy(target.copy())
    double[..., :3, 3] *= 2  # metric: the right shape at the wrong size is an error
    length = np.linalg.norm(target[..., :3, 3], axis=-1) @ tr.frame_weights(17)
    np.testing.assert_allclose(tr.pose_errors(double, torch.from_numpy(target))[0], length, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_poses_have_no_error_and_no_gradient(dtype):
    rng = np.random.default_rng(0)
    target = torch.from_numpy(np.stack([pose(rng) @ walk(rng, 17) for _ in range(3)])).to(dtype)
    pred = target.clone().requires_grad_()
    trans, rot = tr.pose_errors(pred, target)
    assert trans.tolist() == [0, 0, 0] and rot.tolist() == [0, 0, 0]
    (trans + rot).sum().backward()
    assert (pred.grad == 0).all()


def test_gradients_are_those_of_the_errors():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(walk(rng, 5))[None]
    pred = torch.from_numpy(walk(rng, 5))[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tr.pose_errors(x, target), pred)
    turn = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)  # d angle / d turn = 1
    x, o, i = turn.cos(), torch.zeros_like(turn), torch.ones_like(turn)
    R = torch.stack([x, o, turn.sin(), o, i, o, -turn.sin(), o, x]).view(3, 3)
    tr.rotation_angle(R, torch.eye(3, dtype=torch.float64)).backward()
    assert turn.grad.item() == pytest.approx(1, rel=1e-12)


def test_a_failed_video_is_nan_and_touches_no_other():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(np.stack([walk(rng, 9) for _ in range(3)]))
    pred = torch.from_numpy(np.stack([walk(rng, 9) for _ in range(3)]))
    clean = tr.pose_errors(pred, target)
    pred[1] = math.nan
    for a, b in zip(tr.pose_errors(pred, target), clean):
        assert a.isnan().tolist() == [False, True, False]
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert math.isnan(tr.trans_err(pred[1], target[1])) and math.isnan(tr.rot_err(pred[1], target[1]))


def test_evaluation_errors_agree_with_redirector():
    poses = np.load(GOLDEN / "pose_errors.npz")
    numbers = json.loads((GOLDEN / "pose_errors.json").read_text())
    assert len(numbers) == 6
    for k, expected in numbers.items():
        pred, target = poses[f"pred{k}"], poses[f"gt{k}"]
        assert tr.trans_err(pred, target) == pytest.approx(expected["TransErr"], abs=1e-6)
        assert tr.rot_err(pred, target) == pytest.approx(expected["RotErr_deg"], abs=1e-6)


@pytest.mark.parametrize("seed, frames", [(0, 3), (1, 10), (2, 93)])
def test_evaluation_errors_are_invariant_as_they_should_be(seed, frames):
    rng = np.random.default_rng(seed)
    target, noise = walk(rng, frames), rng.normal(size=(frames, 3))
    pred = target.copy()
    pred[:, :3, 3] += 0.1 * noise
    pred[:, :3, :3] = pred[:, :3, :3] @ Rotation.from_rotvec(0.1 * noise).as_matrix()
    moved = pose(rng) @ pred
    moved[:, :3, 3] = 3.7 * moved[:, :3, 3] + [5, -2, 1]
    assert tr.trans_err(moved, target) == pytest.approx(tr.trans_err(pred, target), rel=1e-8)
    assert tr.rot_err(moved, target) == pytest.approx(tr.rot_err(pred, target), rel=1e-8)
    assert tr.rot_err(pred, target) == pytest.approx(tr.rot_err(target, pred), rel=1e-9)
    assert tr.trans_err(target, target) < 1e-12 and tr.rot_err(target, target) < 1e-12
    world = pose(rng) @ target
    world[:, :3, 3] *= 0.2
    assert tr.trans_err(world, target) < 1e-10 and tr.rot_err(world, target) < 1e-9
    if frames > 3:  # (three points lie in a plane) a mirror image is not a similarity of cameras
        mirror = target.copy()
        mirror[:, 0, 3] *= -1
        assert tr.trans_err(mirror, target) > 1e-3


def test_rotation_error_against_brute_force():
    rng = np.random.default_rng(7)
    pred, target = walk(rng, 7, turn=2), walk(rng, 7, turn=2)
    angles = []
    for i in range(7):
        for j in range(7):
            if i != j:
                P, Q = (x[i, :3, :3].T @ x[j, :3, :3] for x in (pred, target))
                angles.append(np.degrees(Rotation.from_matrix(P.T @ Q).magnitude()))
    assert tr.rot_err(pred, target) == pytest.approx(np.mean(angles), rel=1e-10)
    angles = np.linspace(0, 0.5, 6)  # one path turns twice as fast: |i - j| times 0.1 rad apart
    expected = np.degrees(0.1) * sum(2 * (6 - k) * k for k in range(1, 6)) / 30
    assert tr.rot_err(yaw(2 * angles), yaw(angles)) == pytest.approx(expected, rel=1e-10)


def test_translation_error_uses_the_best_similarity():
    rng = np.random.default_rng(7)
    pred, target = walk(rng, 7), walk(rng, 7)
    p, t = (x[:, :3, 3] - x[:, :3, 3].mean(0) for x in (pred, target))

    def aligned(x):  # rotation vector, log of the scale
        return math.exp(x[3]) * p @ Rotation.from_rotvec(x[:3]).as_matrix()

    starts = np.c_[2 * rng.normal(size=(8, 3)), np.zeros(8)]
    fits = [minimize(lambda x: ((aligned(x) - t) ** 2).sum(), start) for start in starts]
    best = min(fits, key=lambda fit: fit.fun)
    extent = np.linalg.norm(t[:, None] - t, axis=-1).max()
    expected = np.linalg.norm(aligned(best.x) - t, axis=1).mean() / (extent + 1e-6)
    assert tr.trans_err(pred, target) == pytest.approx(expected, abs=1e-5)


def test_translation_error_where_nothing_moves():
    rng = np.random.default_rng(0)
    target = tr.recammaster("pan_left", 21)
    assert tr.trans_err(walk(rng, 21), target) < 1e-12  # a pure rotation: 0 for any estimate
    line = tr.recammaster("zoom_in", 21)
    still = np.tile(pose(rng), (21, 1, 1))
    centre = np.linalg.norm(line[:, :3, 3] - line[:, :3, 3].mean(0), axis=1).mean()
    assert tr.trans_err(still, line) == pytest.approx(centre / (line[-1, 2, 3] + 1e-6), rel=1e-9)
    assert tr.trans_err(still * 0, line) == pytest.approx(centre / (line[-1, 2, 3] + 1e-6), rel=1e-9)
    with pytest.raises(ValueError, match="resample the target"):
        tr.trans_err(line[:9], line)
    assert tr.trans_err(line[:9], tr.resample(line, 9)) < 1e-12  # the same straight line at another speed
    assert tr.rot_err(line[:1], line[:1]) == 0
