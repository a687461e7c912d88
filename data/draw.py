"""Pictures for people: captions, videos side by side, and a map of camera paths."""
import base64
import textwrap

import numpy as np
import torch
import torch.nn.functional as F

# 95 glyphs from space to ~, each 8 rows of 5 pixels, one bit a pixel
FONT = (
    "AAAAAAAhCEIAgFKAAAAAUr6vqUAj6OL4gM5ERE5gZKiKyaAhAAAAABEQhBBAQQQhEQABKuqQAAEJ8hAAAAAAEIgAAfAA"
    "AAAAAACAAEREQAB0Z1zFwCMIQhHAdEIiI+D4iCDFwBGVL4hA/DwQxcAyIejFwPhERCEAdGLoxcB0YvCJgAAIAACAAAgA"
    "EIgREQQQQAA+D4AAQQQREQB0QiIAgHRvW8HgdGP4xiD0Y+jHwHRhCEXA9GMYx8D8IehD4Pwh6EIAdGF4xeCMY/jGIHEI"
    "QhHAOIQhSYCMqYpKIIQhCEPgjutYxiCMc1nGIHRjGMXA9GPoQgB0YxrJoPRj6kogfCDgh8D5CEIQgIxjGMXAjGMYqICM"
    "Y1rVQIxURUYgjFRCEID4RERD4HIQhCHABBBBBABwhCEJwCKiAAAAAAAAAB9BAAAAAAAcF8XghD0Yx8AAHwhB4AhfGMXg"
    "AB0fwcAyPIQhAAAfGLwuhD0YxiAgGEIRwBAMIQpMhCVMUkBhCEIRwAA1WtagAD0YxiAAHRjFwAA9GPoQAB8YvCEALYhC"
    "AAAfBwfAQjyEIMAAIxjF4AAjGKiAACMa1UAAIqIqIAAjGLwuAD4iI+ARCIIQQCEIQhCAQQgiEQAAEVEAAA==")
GLYPHS = np.unpackbits(np.frombuffer(base64.b64decode(FONT), np.uint8)).reshape(95, 8, 5)


def text_mask(text, scale=1):
    """A line of text -> bool (8 scale, 6 scale len(text)); what isn't printable ASCII is ?."""
    codes = [ord(c) - 32 if " " <= c <= "~" else ord("?") - 32 for c in text]
    mask = np.pad(GLYPHS[codes], ((0, 0), (0, 0), (0, 1))).transpose(1, 0, 2).reshape(8, -1)
    return mask.repeat(scale, 0).repeat(scale, 1).astype(bool)


def upscale(video, factor):
    """uint8 (T, H, W, 3) -> (T, factor H, factor W, 3), bicubic: for the toy's tiny videos."""
    if factor == 1:
        return np.asarray(video)
    x = torch.from_numpy(np.asarray(video)).movedim(-1, 1).float()
    x = F.interpolate(x, scale_factor=factor, mode="bicubic")
    return x.round().clamp(0, 255).byte().movedim(1, -1).numpy()


def grid(videos, labels):
    """Videos side by side, each under its caption -> uint8 (max T_i, strip + H, W, 3), W being the
    sum of widths and of 4-pixel gaps.

    videos: list of uint8 (T_i, H, W_i, 3); a shorter one holds its last frame
    labels: as many strings, broken into lines where they are too long
    """
    if len(videos) != len(labels):
        raise ValueError(f"{len(videos)} videos, {len(labels)} labels")
    videos = [np.asarray(video) for video in videos]
    length = max(len(video) for video in videos)
    size = max(1, videos[0].shape[1] // 240)  # of the font: twice its pixels at 480 lines
    lines = []
    for video, label in zip(videos, labels):
        letters = video.shape[2] // (6 * size) - 1  # that fit into a line
        lines.append(textwrap.wrap(label, max(1, letters)))
    strip = size * (10 * max(map(len, lines)) + 4)
    columns = []
    for video, rows in zip(videos, lines):
        column = np.full((length, strip + video.shape[1], video.shape[2] + 4, 3), 20, np.uint8)
        for row, text in enumerate(rows):
            mask = text_mask(text, size)
            top = size * (10 * row + 2)
            column[:, top:top + len(mask), 2 * size:2 * size + mask.shape[1]][:, mask] = 235
        column[:, strip:, :-4] = video[np.minimum(np.arange(length), len(video) - 1)]
        columns.append(column)
    return np.concatenate(columns, 2)[:, :, :-4]


def line_alpha(points, start, end, width):
    """Opacity (P,) in [0, 1] at points (P, 2) of anti-aliased lines from start to end, (S, 2)."""
    along = end - start  # (S, 2)
    offset = points[:, None] - start  # (P, S, 2)
    u = ((offset * along).sum(-1) / np.maximum((along ** 2).sum(-1), 1e-12)).clip(0, 1)
    distance = np.linalg.norm(offset - u[..., None] * along, axis=-1).min(1)
    return (width / 2 + 0.5 - distance).clip(0, 1)


# white, orange, blue, green
PATH_COLORS = ((255, 255, 255), (255, 150, 30), (60, 200, 255), (120, 230, 90))


def draw_paths(video, paths, colors=PATH_COLORS):
    """A map of camera paths in the lower right corner of every frame -> a new uint8 (T, H, W, 3).

    video: uint8 (T, H, W, 3); paths: list of c2w (T_i, 4, 4), all relative to the same frame;
    colors: of the paths. Seen from above: x to the right, z (forward) upwards, fitted to all paths,
    its width written in metres. Each camera stands where it is at that frame and points where it
    looks.
    """
    video = np.array(video)
    paths = [np.asarray(path, dtype=np.float64) for path in paths]
    side = min(video.shape[1:3]) // 3
    ground = np.concatenate([path[:, [0, 2], 3] for path in paths])  # x, z
    middle = (ground.max(0) + ground.min(0)) / 2
    extent = max(1.4 * np.ptp(ground, axis=0).max(), 0.2)  # metres

    def pixel(xz):
        return ((xz - middle) / extent * [1, -1] + 0.5) * side

    points = np.stack(np.meshgrid(*2 * [np.arange(side)]), -1)  # (side, side, 2) x, y
    points = points.reshape(-1, 2) + 0.5
    width = max(1.0, side / 60)
    routes = []
    for path in paths:
        corners = pixel(path[[*range(len(path)), -1]][:, [0, 2], 3])  # one camera has a line too
        routes.append(line_alpha(points, corners[:-1], corners[1:], width))
    for t, frame in enumerate(video):
        corner = frame[-side:, -side:]
        inset = 0.35 * corner.reshape(-1, 3)
        for path, route, color in zip(paths, routes, colors):
            c2w = path[min(t, len(path) - 1)]
            here = pixel(c2w[[0, 2], 3])
            look = c2w[[0, 2], 2] * [1, -1] * side / 6
            arrow = line_alpha(points, here[None], (here + look)[None], width)
            dot = line_alpha(points, here[None], here[None], 4 * width)
            alpha = np.maximum(np.maximum(0.6 * route, arrow), dot)[:, None]
            inset = inset * (1 - alpha) + np.array(color) * alpha
        corner[:] = inset.reshape(side, side, 3).round()
    if side >= 48:
        mask = text_mask(f"{extent:.2g} m", max(1, side // 80))[:, :side - 2]
        video[:, -side:, -side:][:, -len(mask) - 1:-1, 2:2 + mask.shape[1]][:, mask] = 200
    return video
