"""The mathematics of camera paths: rescaling, the ten of evaluations, Pluecker maps, pose errors.

A path is c2w (T, 4, 4) float64: camera-to-world, OpenCV axes (x right, y down, z forward), metres
where the source is metric, one pose per frame. Angles are radians, speeds per frame.

Deviations from the paper: what does not move (maximum speed below 1e-8) is scaled by 1, where
Eq. 12 adds a small constant to the denominator, so that rescaled maxima are exact. Its speed bounds
are unpublished: those below are ours, for 24 to 30 frames per second.
"""
import numpy as np
import torch
from scipy.spatial.transform import Rotation, Slerp
from scipy.special import ndtr, ndtri

# lowest, highest, mean and standard deviation of the truncated Gaussians (Eq. 10-11)
V_BOUNDS = (0.005, 0.06, 0.025, 0.015)  # metres per frame
OMEGA_BOUNDS = tuple(np.radians([0.05, 0.8, 0.3, 0.2]))  # radians per frame
PATHS = ("pan_right", "pan_left", "tilt_up", "tilt_down", "zoom_in", "zoom_out",
         "translate_up", "translate_down", "arc_left", "arc_right")  # ReCamMaster's 1 to 10


# ---- path basics

def check(c2w, name="path"):
    """c2w as a valid path: float64 (T, 4, 4), T >= 1, rotations projected on SO(3).

    ValueError naming `name`, frame and reason unless all numbers are finite, last rows 0 0 0 1 and
    rotations orthonormal to 1e-4 with determinant +1.
    """
    c2w = np.array(c2w, np.float64)
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w):
        raise ValueError(f"{name}: wrong shape (expected (T, 4, 4), found {c2w.shape})")
    R = c2w[:, :3, :3]
    with np.errstate(invalid="ignore", over="ignore"):
        last_row_off = np.abs(c2w[:, 3] - [0, 0, 0, 1]).max(1)
        rotation_off = np.abs(R @ R.swapaxes(1, 2) - np.eye(3)).max((1, 2))
        faults = {"not finite": ~np.isfinite(c2w).all((1, 2)),
                  "last row is not 0 0 0 1": last_row_off > 1e-4,
                  "not a rotation": rotation_off > 1e-4,
                  "a reflection, not a rotation": np.linalg.det(R) < 0}
    for reason, bad in faults.items():
        if bad.any():
            i = bad.argmax()
            found = c2w[i, :3].round(4).tolist()
            raise ValueError(f"{name}: frame {i}: {reason} (found {found})")
    R[:] = Rotation.from_matrix(R).as_matrix()  # rounding in a file must not look like motion
    return c2w


def relative(c2w):
    """c2w (..., T, 4, 4), numpy or torch, relative to each path's first camera, which becomes I."""
    cat = torch.cat if torch.is_tensor(c2w) else np.concatenate
    Rt = c2w[..., :1, :3, :3].swapaxes(-1, -2)  # the inverse; of NaN poses (failed videos) NaN
    R = Rt @ c2w[..., :3, :3]
    t = Rt @ (c2w[..., :3, 3:] - c2w[..., :1, :3, 3:])
    return cat([cat([R, t], -1), c2w[..., 3:, :]], -2)


def increments(c2w):
    """Motion of c2w (T, 4, 4) to the next frame, in a frame's axes: rotvecs, steps (T-1, 3)."""
    if len(c2w) == 1:
        return np.zeros((0, 3)), np.zeros((0, 3))
    Rt = c2w[:-1, :3, :3].swapaxes(1, 2)
    rotvecs = Rotation.from_matrix(Rt @ c2w[1:, :3, :3]).as_rotvec()
    steps = Rt @ np.diff(c2w[:, :3, 3:], axis=0)
    return rotvecs, steps[..., 0]


def speeds(c2w):
    """Maximum speeds (v_max, omega_max) of c2w (T, 4, 4), in m and rad per frame; 0 if T = 1."""
    c2w = np.asarray(c2w, np.float64)
    rotvecs, _ = increments(c2w)
    distances = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)                    # Eq. 8
    angles = np.linalg.norm(rotvecs, axis=1)                                              # Eq. 9
    return float(distances.max(initial=0)), float(angles.max(initial=0))


def interpolate(c2w, at, where):
    """Poses c2w (T, 4, 4), T > 1, at times `at` (T,) -> (N, 4, 4) at times `where` (N,) in between,
    rotations on geodesics, positions on straight lines."""
    out = np.tile(np.eye(4), (len(where), 1, 1))
    out[:, :3, :3] = Slerp(at, Rotation.from_matrix(c2w[:, :3, :3]))(where).as_matrix()
    out[:, :3, 3] = np.stack([np.interp(where, at, x) for x in c2w[:, :3, 3].T], 1)
    return out


def resample(c2w, frames):
    """The path c2w (T, 4, 4) from start to end in `frames` frames (see interpolate)."""
    if frames < 1:
        raise ValueError(f"a path needs at least 1 frame, found {frames}")
    c2w = np.array(c2w, np.float64)
    T = len(c2w)
    if T in (1, frames):
        return np.tile(c2w, (frames // T, 1, 1))
    return interpolate(c2w, np.arange(T), np.linspace(0, T - 1, frames))


# ---- metric-aware rescaling (paper, section 3.4)

def scale_motion(c2w, s_t, s_r):
    """c2w (T, 4, 4), positions scaled by s_t (Eq. 13), each turn to the next frame by s_r (Eq. 14).

    Positions scale about the origin of their frame: give a path relative to its first camera.
    """
    c2w = np.array(c2w, np.float64)
    rotvecs, _ = increments(c2w)
    c2w[0, :3, :3] = Rotation.from_matrix(c2w[0, :3, :3]).as_matrix()  # as exact as what follows
    for i, rotvec in enumerate(rotvecs):  # turn by turn, so that totals of more than pi survive
        c2w[i + 1, :3, :3] = c2w[i, :3, :3] @ Rotation.from_rotvec(s_r * rotvec).as_matrix()
    c2w[:, :3, 3] *= s_t
    return c2w


def rescale(c2w, v, omega):
    """c2w (T, 4, 4) rescaled to maximum speeds v (m/frame) and omega (rad/frame). Eq. 12-14

    What does not move stays still. ValueError unless 0 <= v < inf and 0 <= omega <= pi.
    """
    if not (0 <= v < np.inf and 0 <= omega <= np.pi):
        raise ValueError(f"cannot rescale to v = {v}, omega = {omega}: "
                         "need 0 <= v and 0 <= omega <= pi")
    v_max, omega_max = speeds(c2w)
    s_t = v / v_max if v_max >= 1e-8 else 1                                               # Eq. 12
    s_r = omega / omega_max if omega_max >= 1e-8 else 1
    return scale_motion(c2w, s_t, s_r)


def draw_speeds(rng, v=V_BOUNDS, omega=OMEGA_BOUNDS):
    """Speeds (v, omega) for `rescale`, from truncated Gaussians, m and rad per frame. Eq. 10-11

    rng is a numpy Generator; v and omega are (lowest, highest, mean, standard deviation). By
    inverse CDF, two uniform numbers a call. ValueError for bounds out of order.
    """
    def draw(lowest, highest, mean, sd):
        if not (0 <= lowest <= highest and sd > 0):
            raise ValueError(f"speed bounds {lowest}, {highest}, sd {sd}: "
                             "need 0 <= low <= high, sd > 0")
        if lowest > mean:  # mirrored: far above the mean ndtr rounds to 1, below it never to 0
            sd = -sd
        a = ndtr((lowest - mean) / sd)
        b = ndtr((highest - mean) / sd)
        return float(np.clip(mean + sd * ndtri(a + (b - a) * rng.random()), lowest, highest))

    return draw(*v), draw(*omega)


# ---- the ten evaluation paths of ReCamMaster, resampled as ReDirector does

def published(number):
    """ReCamMaster's path 1-10, c2w (81, 4, 4), metres, in closed form; its file is rounded."""
    a = np.arange(81)[:, None] / 80.5
    kind = (number - 1) // 2  # pan, tilt, zoom, translate, arc
    sign = 1 if number % 2 else -1
    turn = ((0, 20, 0), (10, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))[kind]   # degrees about x, y, z
    move = ((0, 0, 0), (0, 0, 0), (0, 0, 2), (0, -1, 0), (-2, 0, 0))[kind]   # metres along them
    rotvec = sign * np.radians(turn) * a
    t = sign * np.array(move) * a
    if kind == 4:  # forward both ways
        t[:, 2:] = (4 - 2 * np.sqrt(3)) * a
    if kind >= 3:  # these keep looking at the point 4 m ahead of the first camera
        x, y, z = ([0, 0, 4] - t).T
        rotvec[:, 0] = -np.arctan2(y, z)
        rotvec[:, 1] = np.arctan2(x, z)
    c2w = np.tile(np.eye(4), (81, 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(rotvec).as_matrix()
    c2w[:, :3, 3] = t
    return c2w


def path_number(path):
    """The number 1-10 of an evaluation path given by number or name (PATHS), else ValueError."""
    number = int(path) if str(path).isdecimal() else 0
    if path in PATHS:
        number = PATHS.index(path) + 1
    if not 1 <= number <= 10:
        raise ValueError(f"no evaluation path {path!r}: expected 1-10 or one of {', '.join(PATHS)}")
    return number


def recammaster(path, frames=81, speed=1.0):
    """An evaluation path by number 1-10 or name (PATHS): c2w (frames, 4, 4), metres, first = I.

    As ReDirector makes them: increments are resampled to frames - 1, times speed, and integrated
    about one axis, at 81 frames and speed 1 too (7-10 then lie up to 0.013 m from the published).
    So another length keeps the speed, not the distance. ValueError: unknown path or frames < 1.
    """
    number = path_number(path)
    if frames < 1:
        raise ValueError(f"a path needs at least 1 frame, found {frames}")
    rotvecs, steps = increments(published(number))
    axis = rotvecs.sum(0) / max(np.linalg.norm(rotvecs.sum(0)), 1e-6)
    at = np.linspace(0, 1, 80)
    where = np.linspace(0, 1, frames - 1)
    angles = speed * np.interp(where, at, rotvecs @ axis)                        # (frames - 1,)
    steps = np.stack([speed * np.interp(where, at, x) for x in steps.T], 1)      # (frames - 1, 3)
    R = Rotation.from_rotvec(np.cumsum(np.append(0, angles))[:, None] * axis).as_matrix()
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = R
    c2w[1:, :3, 3] = np.cumsum((R[1:] @ steps[..., None])[..., 0], 0)  # turned first, as theirs
    return c2w


# ---- Pluecker maps for the model

def camera_maps(c2w, intrinsics, height, width):
    """Packed rays of c2w (B, T, 4, 4) and normalised fx fy cx cy (B, 4): (B, 24, F, H, W) float32.

    On c2w's device, F = (T-1)/4 + 1. The ray through pixel centre (i + 0.5, j + 0.5) has direction
    d = R normalise(K^-1 [u, v, 1]) and moment o x d. Channel 4c + k is channel c of (o x d, d) in
    the k-th of four consecutive frames, the first standing four times (ReDirector). ValueError
    unless T = 4k + 1.
    """
    c2w = torch.as_tensor(c2w).double()
    intrinsics = torch.as_tensor(intrinsics, device=c2w.device).double()
    B = len(c2w)
    T = c2w.shape[1] if c2w.ndim == 4 else 0
    if c2w.shape != (B, T, 4, 4) or T % 4 != 1 or intrinsics.shape != (B, 4):
        raise ValueError("camera_maps: expected c2w (B, T, 4, 4) with T = 4k + 1 and intrinsics "
                         f"(B, 4), found {tuple(c2w.shape)} and {tuple(intrinsics.shape)}")
    R = c2w[..., :3, :3]
    o = c2w[..., :3, 3:]
    moments = torch.linalg.cross(o.expand_as(R), R, dim=-2)
    M = torch.cat([moments, R], -2)  # (B, T, 6, 3): ray -> o x d, d
    pack = torch.arange(-3, T, device=c2w.device).clamp(min=0).view(-1, 4)  # 0 0 0 0 | 1 2 3 4 ...
    M = M[:, pack].permute(0, 3, 2, 1, 4).reshape(B, -1, 1, 1, 3)  # (B, 24 F, 1, 1, 3)
    fx, fy, cx, cy = intrinsics.view(B, 4, 1, 1, 1).unbind(1)
    column = torch.arange(width, dtype=torch.float64, device=c2w.device)
    row = torch.arange(height, dtype=torch.float64, device=c2w.device)[:, None]
    x = ((column + 0.5) / width - cx) / fx  # (B, 1, 1, W)
    y = ((row + 0.5) / height - cy) / fy    # (B, 1, H, 1)
    # M (x, y, 1) is separable: one sum and one product over the big array, and no matrix product
    # that TF32 or autocast would round.
    maps = (M[..., 0] * x).float() + (M[..., 1] * y + M[..., 2]).float()  # (B, 24 F, H, W)
    return maps.mul_((1 + x ** 2 + y ** 2).rsqrt().float()).view(B, 24, -1, height, width)


def poses(c2w):
    """What ReCamMaster takes of c2w (B, T, 4, 4), T = 4k + 1: three rows of every fourth frame as
    (B, F, 12) float32. Metres, relative to the *source's* first camera."""
    return torch.as_tensor(c2w)[:, ::4, :3].flatten(2).float()


# ---- pose errors

def rotation_angle(A, B):
    """Angle (...) in [0, pi] between rotations A and B (..., 3, 3), torch.

    From sine and cosine, both by way of A - B: accurate near 0 and pi, exactly 0 with gradient 0
    for A == B, where arccos of the trace loses half the digits and has an infinite gradient.
    """
    D = A - B
    S = D @ B.transpose(-1, -2)
    S = S - S.transpose(-1, -2)  # A B^T - B A^T = 2 sin(angle) [axis]x
    axis = torch.stack([S[..., 2, 1], S[..., 0, 2], S[..., 1, 0]], -1)
    sin = torch.linalg.vector_norm(axis, dim=-1) / 2
    cos = 1 - (D * D).sum((-1, -2)) / 4  # |A - B|^2 = 4 (1 - cos(angle))
    return torch.atan2(sin, cos)


def frame_weights(n, schedule="linear"):
    """Weights (n,) of frames i = 0 .. n-1 in Eq. 3-4, of sum 1: proportional to i ("linear"), to 1
    ("uniform") or to i^2 ("quadratic"). ValueError for another schedule."""
    power = {"linear": 1, "uniform": 0, "quadratic": 2}
    if schedule not in power:
        raise ValueError(f"no frame weights {schedule!r}: expected one of {', '.join(power)}")
    w = np.arange(n, dtype=np.float64) ** power[schedule]
    return w / w.sum() if n > 1 else np.ones(n)


def pose_errors(pred, target, schedule="linear"):
    """The reward's errors of torch pred, target (..., T, 4, 4): translation (...) metres, rotation
    (...) radians. Eq. 3-4 without the minus signs.

    Distance of positions and angle between rotations, both paths relative to their first frame, no
    scale alignment, averaged with frame_weights. float64; differentiable, gradient 0 where a pose
    is met exactly; NaN for a video with NaN poses. ValueError where shapes differ.
    """
    if pred.shape != target.shape:
        raise ValueError(f"pose_errors: expected poses {tuple(target.shape)}, "
                         f"found {tuple(pred.shape)}")
    pred = relative(pred.double())
    target = relative(target.to(pred.device).double())
    w = torch.as_tensor(frame_weights(pred.shape[-3], schedule), device=pred.device)
    distance = torch.linalg.vector_norm(pred[..., :3, 3] - target[..., :3, 3], dim=-1)    # Eq. 3
    angle = rotation_angle(pred[..., :3, :3], target[..., :3, :3])                        # Eq. 4
    return (distance * w).sum(-1), (angle * w).sum(-1)


def same_length(pred, target):
    """Both as float64; ValueError where one path is longer than the other."""
    pred = np.asarray(pred, np.float64)
    target = np.asarray(target, np.float64)
    if pred.shape != target.shape:
        raise ValueError(f"pose errors: pred {pred.shape}, target {target.shape}: "
                         "resample the target first")
    return pred, target


def trans_err(pred, target):
    """The evaluation's TransErr of pred, target (T, 4, 4): dimensionless, NaN if not finite.

    Mean distance of positions, after the similarity that best aligns pred to target (Umeyama 1991),
    over the largest distance of two target positions (+ 1e-6). 0 for any estimate of a rotation.
    """
    pred, target = same_length(pred, target)
    p = pred[:, :3, 3] - pred[:, :3, 3].mean(0)
    t = target[:, :3, 3] - target[:, :3, 3].mean(0)
    if not (np.isfinite(p).all() and np.isfinite(t).all()):
        return float("nan")
    U, S, Vt = np.linalg.svd(p.T @ t)
    signs = np.array([1, 1, np.linalg.det(U @ Vt)])  # a rotation, not its mirror image
    spread = (p ** 2).sum()
    scale = (S * signs).sum() / spread if spread > 1e-20 else 0  # an estimate that stands still
    aligned = scale * p @ (U * signs) @ Vt
    extent = np.linalg.norm(t[:, None] - t, axis=-1).max()
    return float(np.linalg.norm(t - aligned, axis=1).mean() / (extent + 1e-6))


def rot_err(pred, target):
    """The evaluation's RotErr of pred, target (T, 4, 4): degrees, NaN where not finite.

    Mean over ordered pairs of frames of the angle between pred's and target's relative rotations.
    """
    pred, target = same_length(pred, target)
    # The angle between P_i^T P_j and T_i^T T_j is that between P_i T_i^T and P_j T_j^T.
    E = torch.from_numpy(pred[:, :3, :3] @ target[:, :3, :3].swapaxes(1, 2))
    pairs = max(len(E) * (len(E) - 1), 1)
    return float(rotation_angle(E[:, None], E).sum().rad2deg() / pairs)
