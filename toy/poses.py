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


def half(video):
    """(n, 3, T, H, W) -> (n, 3, T, H/2, W/2): 2 x 2 pixels as one."""
    return F.avg_pool2d(video.flatten(1, 2), 2).unflatten(1, (3, -1))


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
    the one whose picture of these points differs least from frame 0, searched from where the motion so far
    leads. All on pictures of half the size, which are cheap and in which the codec hardly errs.
    """
    FIELD = 8           # pixels that a place (of 2 x 2) sees of its surroundings
    FASTEST = 0.4, 0.2  # metres, radians a frame: more is no camera's way, but a search that went astray

    def __init__(self):
        super().__init__()
        self.height = HEIGHT // 2
        self.width = WIDTH // 2
        self.fine = mlp(3 * self.FIELD ** 2 + 2, 96, 64)  # places of 2 x 2 pixels, of 4 x 4, of 8 x 8
        self.mid = mlp(256, 160)
        self.coarse = mlp(640, 192)
        self.room = mlp(192 * (self.height // 8) * (self.width // 8), 384, 192)  # the whole picture
        self.uncoarse = mlp(384, 384, 4 * 96)  # and back to every pixel, with what was seen on the way
        self.unmid = mlp(256, 192, 4 * 48)
        self.out = mlp(112, 96, 4)
        self.register_buffer("ray", rays(INTRINSICS, self.height, self.width), persistent=False)

    def depth(self, image):
        """Frame (n, 3, H/2, W/2) -> log-depth (n, H/2, W/2), metres along the optical axis."""
        seen = F.unfold(image, self.FIELD, padding=self.FIELD // 2 - 1, stride=2).transpose(1, 2)
        where = self.ray[::2, ::2, :2].flatten(0, 1).expand(len(image), -1, -1)  # a place's direction
        fine = F.gelu(self.fine(torch.cat([seen, where], -1)))
        fine = fine.unflatten(1, (self.height // 2, self.width // 2))
        mid = F.gelu(self.mid(pool(fine)))
        coarse = F.gelu(self.coarse(pool(mid)))
        room = self.room(coarse.flatten(1))[:, None, None].expand_as(coarse)
        mid = torch.cat([mid, F.gelu(unpool(self.uncoarse(torch.cat([coarse, room], -1))))], -1)
        fine = torch.cat([fine, F.gelu(unpool(self.unmid(mid)))], -1)
        return 1.2 + unpool(self.out(fine))[..., 0]

    def forward(self, video):
        video = half(video)
        first = Reference(video[:, :, 0], self.depth(video[:, :, 0]).exp(), self.ray)
        pose = torch.eye(4).repeat(len(video), 1, 1)
        before = pose
        path = [pose]
        for seen in video.unbind(2)[1:]:
            guess = pose @ torch.linalg.inv(before) @ pose  # as fast as so far
            before = pose
            found = first.find(seen, guess, steps=2)
            # who jumps is lost, and one lost video would outweigh its group, by Eq. 5 all groups
            jump = torch.linalg.inv(before) @ found
            angle = ((jump[:, :3, :3].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()
            kept = (jump[:, :3, 3].norm(dim=1) <= self.FASTEST[0]) & (angle <= self.FASTEST[1])
            pose = torch.where(kept[:, None, None], found, before)
            path.append(pose)
        return torch.stack(path, 1)


class Reference:
    """A picture (n, 3, h, w) whose depth (n, h, w) is known, to which others are registered."""
    SIGMA = 1.5, 0.8  # pixels, blur: coarse, then fine

    def __init__(self, picture, depth, ray):
        """ray: `rays` of the picture."""
        height, width = depth.shape[1:]
        self.point = (depth[..., None] * ray).flatten(1, 2)                        # (n, P, 3), P = h w
        jump = torch.stack(torch.gradient(depth.log(), dim=(1, 2))).square().sum(0)  # where surfaces meet,
        self.trust = (1 / (1 + jump / 0.05 ** 2)).flatten(1)                         # slopes mislead (n, P)

        # moving the camera by rho and turning it by theta moves a point by -(rho + theta x point)
        near = 1 / depth
        zero = torch.zeros_like(depth)
        u = ray[..., 0].expand_as(near)
        v = ray[..., 1].expand_as(near)
        flow = torch.stack([-near, zero, u * near, u * v, -1 - u * u, v,
                            zero, -near, v * near, 1 + v * v, -u * v, -u], -1)
        self.flow = flow.unflatten(-1, (2, 6)).flatten(1, 2)                       # (n, P, 2, 6)

        # its slopes at each sharpness, and J^T J of every pixel, are the same for all pictures
        self.levels = []
        for sigma in self.SIGMA:
            seen = blur(picture, sigma)
            gy, gx = torch.gradient(seen, dim=(2, 3))
            slope = torch.stack([gx * INTRINSICS[0] * width, gy * INTRINSICS[1] * height], -1).flatten(2, 3)
            JtJ = torch.einsum("ncpa,ncpb->npab", slope, slope)                    # slope (n, 3, P, 2)
            JtJ = (self.flow.transpose(2, 3) @ JtJ @ self.flow).flatten(2)         # (n, P, 36)
            self.levels.append((sigma, seen.flatten(2), slope, JtJ))

    def find(self, picture, pose, steps):
        """The camera (n, 4, 4) of another picture (n, 3, h, w), in the reference's axes, near a first guess:
        Gauss-Newton, so many steps at each blur."""
        n = len(pose)
        to_grid = 2 * torch.tensor(INTRINSICS[:2])
        for sigma, reference, slope, JtJ in self.levels:
            seen = blur(picture, sigma)
            for _ in range(steps):
                y = (self.point - pose[:, None, :3, 3]) @ pose[:, :3, :3]          # in the other camera
                at = y[..., :2] / y[..., 2:].clamp(min=0.1) * to_grid              # (n, P, 2) in [-1, 1]
                miss = F.grid_sample(seen, at[:, None], align_corners=False)[:, :, 0] - reference
                inside = at.abs().amax(-1) < 1
                weight = self.trust * inside * 0.2 / miss.square().sum(1).sqrt().clamp(min=0.2)  # Huber
                g = (miss[..., None] * slope).sum(1) * weight[..., None]
                g = (g.flatten(1)[:, None] @ self.flow.flatten(1, 2))[:, 0]        # (n, 6)
                H = (weight[:, None] @ JtJ).view(n, 6, 6)
                damping = 1e-3 * torch.eye(6) * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
                step = torch.linalg.solve(H + damping + 1e-9 * torch.eye(6), g).clamp(-0.2, 0.2)
                pose = torch.linalg.solve(to_c2w(exp_so3(step[:, 3:]), step[:, :3]), pose)
        return pose


# ---- the judge: registers every frame to the true scene; no training ever sees it ----

def judge(video, room, guess, codec=None):
    """Where was each frame taken? video (n, 3, T, H, W) in [-1, 1] of rooms (n), guess (n, T, 4, 4) a path to
    search along -> c2w (n, T, 4, 4), metres, relative to the source's first camera, and the root mean square
    residual (n, T).

    Tries places along the guess first, from standing still to 1.5 times as far, and takes the one whose picture
    is most alike. Then, three times, renders the true scene from there (through the codec, if given, as a
    perfect video would be), registers the frame to that picture, and moves there if that is better.
    """
    n, frames = guess.shape[:2]
    height = video.shape[-2]
    width = video.shape[-1]
    ray = rays(INTRINSICS, height // 2, width // 2)
    here = torch.eye(4).repeat(n * frames, 1, 1)
    by_frame = lambda x: x.transpose(1, 2).flatten(0, 1)  # (n, 3, T, h, w) -> (n T, 3, h, w)
    seen = by_frame(half(video))

    def look(path):  # -> pictures (n T, 3, h, w), depth (n T, h, w)
        image, depth = render(room, path, height, width)
        image = image if codec is None else codec.decode(codec.encode(image))
        return by_frame(half(image)), F.avg_pool2d(depth, 2).flatten(0, 1)

    def cost(picture):
        miss = blur(picture - seen, 1.5).square().sum(1)
        return (miss / (miss + 0.04)).mean((1, 2)).unflatten(0, (n, frames))

    # coarse search along the guess
    rotvec = Rotation.from_matrix(guess[..., :3, :3].flatten(0, 1).double()).as_rotvec()
    rotvec = torch.from_numpy(rotvec).float().view(n, frames, 3)
    paths = torch.stack([to_c2w(exp_so3(k * rotvec), k * guess[..., :3, 3])
                         for k in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)])  # (7, n, T, 4, 4)
    small = [by_frame(render(room, path, height // 2, width // 2)[0]) for path in paths]
    costs = torch.stack([cost(picture) for picture in small])
    path = paths.take_along_dim(costs.argmin(0)[None, ..., None, None], 0)[0]

    picture, depth = look(path)
    for _ in range(3):
        there = Reference(picture, depth.clamp(min=0.05), ray)
        trial = path @ there.find(seen, here, steps=4).unflatten(0, (n, frames))
        trial = torch.where(trial.isfinite().all(-1).all(-1)[..., None, None], trial, path)
        new, depth_there = look(trial)
        better = cost(new) < cost(picture)  # (n, T)
        path = torch.where(better[..., None, None], trial, path)
        picture = torch.where(better.flatten()[:, None, None, None], new, picture)
        depth = torch.where(better.flatten()[:, None, None], depth_there, depth)
    miss = picture - seen
    return path, miss.square().mean((1, 2, 3)).sqrt().unflatten(0, (n, frames))
