"""Where was each frame taken? Two answers from pixels: the reward's estimator and the independent judge."""
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from toy.rooms import HEIGHT, INTRINSICS, WIDTH, exp_so3, rays, render, to_c2w


# ---- the reward's estimator: metric poses from pixels alone, the miniature of MapAnything ----

def mlp(*sizes):
    """Linear layers with GELUs between."""
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (torch.nn.GELU(), torch.nn.Linear(a, b))]
    return torch.nn.Sequential(*layers[1:])


def pool(x):
    """(B, h, w, c) -> (B, h/2, w/2, 4 c), 2 x 2 places as one."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)


def unpool(x):
    """(B, h, w, 4 c) -> (B, 2 h, 2 w, c), pool undone."""
    return x.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def blur(x, sigma):
    """Gaussian blur of (..., H, W) with reflected borders; sigma in pixels."""
    r = int(3 * sigma)
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1).to(x) / sigma).square())
    k = k / k.sum()
    padded = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (r, r, r, r), mode="reflect")
    return F.conv2d(F.conv2d(padded, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1)).view(x.shape)


class Estimator(torch.nn.Module):
    """Video (n, 3, T, H, W) in [-1, 1] -> c2w (n, T, 4, 4), metres, relative to frame 0, from pixels alone.

    A network reads metric depth off frame 0 (tile size and eye level tell it); each next frame's camera is
    the one whose picture of these points differs least from frame 0, found by Gauss-Newton from where the
    frame before it was.
    """
    FIELD = 8         # pixels that a place (of 2 x 2) sees of its surroundings
    SIGMA = 1.5, 0.8  # pixels, blur
    STEPS = 4         # Gauss-Newton steps per frame, blurred and sharp each

    def __init__(self):
        super().__init__()
        self.fine = mlp(3 * self.FIELD ** 2 + 2, 96, 64)  # places of 2 x 2 pixels, of 4 x 4, of 8 x 8
        self.mid = mlp(256, 160)
        self.coarse = mlp(640, 192)
        self.room = mlp(192 * (HEIGHT // 8) * (WIDTH // 8), 384, 192)  # the whole picture
        self.uncoarse = mlp(384, 384, 4 * 96)  # and back to every pixel, with what was seen on the way
        self.unmid = mlp(256, 192, 4 * 48)
        self.out = mlp(112, 96, 4)
        self.register_buffer("ray", rays(INTRINSICS, HEIGHT, WIDTH), persistent=False)

    def depth(self, image):
        """Frame (n, 3, H, W) -> log-depth (n, H, W), metres along the optical axis."""
        seen = F.unfold(image, self.FIELD, padding=self.FIELD // 2 - 1, stride=2).transpose(1, 2)
        where = self.ray[::2, ::2, :2].flatten(0, 1).expand(len(image), -1, -1)  # (n, H/2 W/2, 2)
        fine = F.gelu(self.fine(torch.cat([seen, where], -1))).unflatten(1, (HEIGHT // 2, WIDTH // 2))
        mid = F.gelu(self.mid(pool(fine)))
        coarse = F.gelu(self.coarse(pool(mid)))
        room = self.room(coarse.flatten(1))[:, None, None].expand_as(coarse)
        mid = torch.cat([mid, F.gelu(unpool(self.uncoarse(torch.cat([coarse, room], -1))))], -1)
        fine = torch.cat([fine, F.gelu(unpool(self.unmid(mid)))], -1)
        return 1.2 + unpool(self.out(fine))[..., 0]

    def forward(self, video):
        n, _, frames, height, width = video.shape
        log_depth = self.depth(video[:, :, 0])
        point = log_depth.exp()[..., None] * self.ray                              # (n, H, W, 3)
        jump = torch.stack(torch.gradient(log_depth, dim=(1, 2))).square().sum(0)  # where surfaces meet,
        trust = (1 / (1 + jump / 0.05 ** 2)).flatten(1)                            # slopes mislead (n, P)

        # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
        near, zero = 1 / point[..., 2], torch.zeros_like(point[..., 2])
        u, v = self.ray[..., 0].expand_as(near), self.ray[..., 1].expand_as(near)
        flow = torch.stack([-near, zero, u * near, u * v, -1 - u * u, v,
                            zero, -near, v * near, 1 + v * v, -u * v, -u], -1)
        flow = flow.unflatten(-1, (2, 6)).flatten(1, 2)                            # (n, P, 2, 6), P = H W

        # frame 0 at each sharpness: its slopes, and J^T J of every pixel, are the same for all frames
        levels = []
        for sigma in self.SIGMA:
            seen = blur(video, sigma)
            gy, gx = torch.gradient(seen[:, :, 0], dim=(2, 3))
            slope = torch.stack([gx * INTRINSICS[0] * width, gy * INTRINSICS[1] * height], -1).flatten(2, 3)
            JtJ = torch.einsum("ncpa,ncpb->npab", slope, slope)                    # slope (n, 3, P, 2)
            JtJ = (flow.transpose(2, 3) @ JtJ @ flow).flatten(2)                   # (n, P, 36)
            levels.append((seen, seen[:, :, 0].flatten(2), slope, JtJ))

        point, to_grid = point.flatten(1, 2), 2 * torch.tensor(INTRINSICS[:2])
        pose = before = torch.eye(4).repeat(n, 1, 1)
        path = [pose]
        for i in range(1, frames):
            pose, before = pose @ torch.linalg.inv(before) @ pose, pose            # as fast as so far
            for seen, first, slope, JtJ in levels:
                for _ in range(self.STEPS):
                    y = (point - pose[:, None, :3, 3]) @ pose[:, :3, :3]           # in camera i
                    at = y[..., :2] / y[..., 2:].clamp(min=0.1) * to_grid          # (n, P, 2) in [-1, 1]
                    miss = F.grid_sample(seen[:, :, i], at[:, None], align_corners=False)[:, :, 0] - first
                    inside = at.abs().amax(-1) < 1
                    weight = trust * inside * 0.2 / miss.square().sum(1).sqrt().clamp(min=0.2)  # Huber
                    g = (miss[..., None] * slope).sum(1) * weight[..., None]
                    g = (g.flatten(1)[:, None] @ flow.flatten(1, 2))[:, 0]         # (n, 6)
                    H = (weight[:, None] @ JtJ).view(n, 6, 6)
                    damping = 1e-3 * torch.eye(6) * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
                    step = torch.linalg.solve(H + damping + 1e-9 * torch.eye(6), g).clamp(-0.2, 0.2)
                    pose = torch.linalg.solve(to_c2w(exp_so3(step[:, 3:]), step[:, :3]), pose)
            path.append(pose)
        return torch.stack(path, 1)


# ---- the judge: registers every frame to the true scene; no training ever sees it ----

def judge(video, room, guess, codec=None):
    """Where was each frame taken? video (n, 3, T, H, W) in [-1, 1] of rooms (n), guess (n, T, 4, 4) a path to
    search along -> c2w (n, T, 4, 4), metres, relative to the source's first camera, and the root mean square
    residual (n, T).

    The true room is rendered (through the codec, if given, as a perfect video would be), compared with the
    video, and the pose improved: from the best of standing still to 1.5 times the guess, by
    Levenberg-Marquardt on robust photometric residuals, first blurred, then sharp.
    """
    n, frames, (height, width) = *guess.shape[:2], video.shape[-2:]
    ray = rays(INTRINSICS, height, width)
    by_frame = lambda x: x.transpose(1, 2).flatten(3, 4)  # (n, 3, T, H, W, ...) -> (n, T, 3, P, ...), P = H W

    def look(pose, target, sigma):
        image, depth = render(room, pose, height=height, width=width)
        seen = image if codec is None else codec.decode(codec.encode(image))
        residual = blur(seen, sigma) - target  # (n, 3, T, H, W)
        residual = residual - residual.mean((2, 3, 4), keepdim=True)  # whatever the video's white balance
        weight = 0.1 / residual.abs().clamp_min(0.1)  # Huber: textures at occlusions do not pull
        cost = (weight * residual.square()).mean((1, 3, 4))  # (n, T)
        return blur(image, sigma), depth, residual, weight, cost

    # coarse search along the guess
    target = blur(video, 1.5)
    rotvec = Rotation.from_matrix(guess[..., :3, :3].flatten(0, 1).double()).as_rotvec()
    rotvec = torch.from_numpy(rotvec).view(n, frames, 3)
    poses = torch.stack([to_c2w(exp_so3(k * rotvec), k * guess[..., :3, 3])
                         for k in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)])  # (7, n, T, 4, 4)
    costs = torch.stack([look(pose, target, 1.5)[-1] for pose in poses])
    pose = poses.take_along_dim(costs.argmin(0)[None, ..., None, None], 0)[0]

    for sigma in (1.5, 1.0, 0.7):  # pixels
        target = blur(video, sigma)
        image, depth, residual, weight, cost = look(pose, target, sigma)
        damping = torch.full((n, 1, 1, 1), 1e-3)
        for _ in range(12):
            gy, gx = torch.gradient(image, dim=(-2, -1))
            slope = torch.stack([gx * (INTRINSICS[0] * width), gy * (INTRINSICS[1] * height)], -1)
            slope, w, r = by_frame(slope), by_frame(weight)[..., None], by_frame(residual)[..., None]

            # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
            point = (depth[..., None] * ray).flatten(2, 3)  # (n, T, P, 3) in camera axes
            x, y, z = point.unbind(-1)
            zero = torch.zeros_like(z)
            flow = torch.stack([1 / z, zero, -x / z ** 2, zero, 1 / z, -y / z ** 2], -1).unflatten(-1, (2, 3))
            flow = torch.cat([flow, torch.linalg.cross(point[..., None, :].expand_as(flow), flow)], -1)

            # normal equations a step = -b: J = slope flow, (n, T, 3, P, 2) and (n, T, P, 2, 6)
            a = torch.einsum("ntcpi,ntcpj->ntpij", slope * w, slope)
            a = torch.einsum("ntpai,ntpaj->ntij", flow, torch.einsum("ntpab,ntpbj->ntpaj", a, flow))
            b = torch.einsum("ntpai,ntpa->nti", flow, (slope * w * r).sum(2))
            a = a + damping * torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) + 1e-6 * torch.eye(6)
            step = -torch.linalg.solve(a, b)
            trial = pose @ to_c2w(exp_so3(step[..., 3:]), step[..., :3])

            seen = look(trial, target, sigma)
            better = seen[-1].mean(1) < cost.mean(1)  # (n,) of whole videos: the codec mixes frames
            pick = lambda new, old: torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
            pose, image, depth, residual, weight, cost = map(
                pick, (trial, *seen), (pose, image, depth, residual, weight, cost))
            damping = pick(damping * 0.3, damping * 8).clamp(1e-6, 1e3)
    return pose, residual.square().mean((1, 3, 4)).sqrt()
