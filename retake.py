"""A video of your own, filmed anew: `python evaluate.py retake`. Evaluations film by the same steps."""
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from cameras import named_path, split_name
from checkpoint import find_checkpoint
from clips import condition_of, open_encoders, open_policy, weights_sizes
from configurator import at_least_1
from scores import open_estimator
from train import generate


@dataclass
class Generating:
    """Settings of all that generates videos with the published weights."""
    weights: str = ""           # folder of the published weights
    ckpt: str = ""              # beside or in place of ReDirector's: files, checkpoints' or runs' folders
    cameras: str = ""           # source cameras: a file, or a folder of one for each video; empty: estimated
    fov: float = 0.0            # horizontal field of view, degrees, where camera files have no intrinsics
    blip: str = "Salesforce/blip2-opt-2.7b"  # BLIP-2's local folder or hub id, where captions are not given
    vipe: str = "vipe"          # ViPE's program
    vipe_pipeline: str = "default"  # its preset; only_pose where ReDirector's fork is installed
    height: int = 480           # pixels, a multiple of 16 (ReDirector)
    width: int = 832            # pixels, a multiple of 16 (ReDirector)
    steps: int = 50             # denoising steps (ReDirector)
    shift: float = 5.0          # of the schedule (Wan)
    guidance: float = 5.0       # classifier-free guidance (ReDirector); 1: off
    seed: int = 0               # of the noise


def read_clip(path, config, stride=1):
    """A video's largest 4k+1 frames, config.frames at most (0: all), scaled to cover and cropped -> uint8
    (T, H, W, 3), fps, and the frames' numbers (T,), rows of a camera file."""
    size = config.height, config.width
    if size[0] % 16 or size[1] % 16:
        raise ValueError(f"height and width: expected multiples of 16, found {size[0]} x {size[1]}")
    try:
        video, fps, rows = data.read_frames(path, config.frames or None, stride, size)
    except ValueError:
        if not config.frames:
            raise
        video, fps, rows = data.read_frames(path, None, stride, size)  # shorter; if broken, it raises again
    frames = (len(video) - 1) // 4 * 4 + 1
    if frames < 5:
        raise ValueError(f"{path}: too short, {len(video)} frames, expected at least 5")
    return video[:frames], fps, rows[:frames]


def source_cameras(path, name, clip, mp4, config, estimate):
    """Cameras of a clip as read_clip returns it: c2w (T, 4, 4), metres, relative to the first, and intrinsics
    (4,). From config.cameras, a file, or a folder that has one for the video called `name`; where that is
    empty, estimated from `mp4`, the clip as the model sees it."""
    video, _, rows = clip
    cameras = config.cameras
    if not cameras:
        def cameras(_):
            c2w, intrinsics = estimate(mp4)
            if len(c2w) != len(video) or intrinsics is None:
                raise ValueError(f"source cameras: expected {len(video)} and intrinsics, found {len(c2w)}")
            return torch.from_numpy(c2w)[None], torch.from_numpy(intrinsics)[None]
    stored = data.read_video(path, frames=1)[0].shape[1:3]
    return data.source_cameras(video, rows, stored, name, cameras, config.fov or None)


def encode(clip, path, caption, cameras, encoders, config, device):
    """A clip as read_clip returns it, its caption (None: BLIP-2's) and cameras -> data.Clip."""
    video, fps, _ = clip
    if caption is None:
        from encoders import caption as describe
        caption = describe(video[len(video) // 2], config.blip, device, encoders[0].conv1.weight.dtype)
    latents, image, text = data.encode_clip(torch.from_numpy(video).to(device), caption, *encoders)
    return data.Clip(str(path), str(path), caption, fps, latents, image, text, *cameras)


def film(dit, codec, clip, target, name, negative, config, device):
    """A data.Clip filmed along a target path (T, 4, 4) -> uint8 (T, H, W, 3); its noise is named `name`."""
    condition = condition_of([clip], target[None], config, device)
    return generate(dit, codec, condition, [name], negative, steps=config.steps, shift=config.shift,
                    guidance=config.guidance, seed=config.seed)[0].cpu().numpy()


@dataclass
class Retake(Generating):
    """python evaluate.py retake CLIP: your own video, filmed anew along another camera path."""
    clip: str = ""              # video file or folder of images; may be given as a plain argument
    camera: str = "arc_left"    # ReCamMaster's path by number or name, static, or a camera file
    speed: float = 1.0          # of the camera path
    prompt: str = ""            # what the video shows; empty: BLIP-2's caption of the middle frame
    estimator: str = "mapanything"  # of the clip's cameras: mapanything (in weights), or vipe
    out: str = "out/retake"     # folder for the videos
    frames: int = 81            # at most; the largest 4k + 1 that the clip has
    stride: int = 1             # take every n-th frame


def retake(config):
    """Write <clip>_<camera>_<speed>.mp4 and .._side_by_side.mp4 to config.out; returns the two paths."""
    from encoders import NEGATIVE_PROMPT, load_captioner
    if not config.clip or not config.weights:
        raise ValueError("retake: expected a clip and --weights=FOLDER")
    at_least_1(config, "frames", "height", "width", "stride", "steps")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(config.clip)
    read = read_clip(path, config, config.stride)  # what can be refused is refused before big files are read
    video, fps, _ = read
    if config.fov:
        data.check_fov(config.fov)
    target = named_path(config.camera, len(video), config.speed)
    checkpoint = find_checkpoint(config.ckpt) if config.ckpt else None
    weights_sizes(config.weights)  # all there?
    if config.cameras and not split_name(config.cameras)[0].is_file():
        raise FileNotFoundError(f"{config.cameras}: no such camera file")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.mp4"
        data.write_video(source, video, fps)
        estimate = None if config.cameras else open_estimator(config, device)
        cameras = source_cameras(path, path.name, read, source, config, estimate)
    del estimate
    encoders = open_encoders(config.weights, device)
    clip = encode(read, path, config.prompt or None, cameras, encoders, config, device)
    codec, negative = encoders[0], encoders[1].embed([NEGATIVE_PROMPT])
    del encoders
    load_captioner.cache_clear()  # makes room
    dit = open_policy(config.weights, checkpoint, device)
    title = f"{config.camera}, speed {config.speed:g}"
    print(f"{len(video)} frames of {config.height} x {config.width}, {title}: {clip.caption}")
    new = film(dit, codec, clip, target, path.stem, negative, config, device)
    name = re.sub(r"\.\w+(?=#|$)", "", Path(config.camera).name).replace("#", "_")  # of paths.json#cam03 too
    file = Path(config.out) / f"{path.stem}_{name}_{config.speed:g}.mp4"
    beside = file.with_name(f"{file.stem}_side_by_side.mp4")
    data.write_video(file, new, fps)
    drawn = data.draw_paths(new, [clip.c2w.numpy(), target])  # white: the source's, orange: the new cameras
    data.write_video(beside, data.grid([video, drawn], ["source", title]), fps)
    print(f"{file}\n{beside}")
    return file, beside
