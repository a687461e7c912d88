"""A video of your own, re-rendered along another camera path: `python evaluate.py retake`."""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data.cameras import check_fov, named_path, split_name
from data.clips import Clip
from data.draw import draw_paths, grid
from data.prepare import encode_clip
from data.video import write_video
from data.world import load_policy
from evaluation.cases import check_size
from evaluation.generate import Generating, rerender
from evaluation.scores import open_estimator
from evaluation.sources import find_cameras, read_clip
from plumbing.checkpoint import find_checkpoint
from plumbing.settings import at_least_1
from pretrained.encoders import (
    NEGATIVE_PROMPT, check_caption, describe_frame, load_captioner, open_encoders)
from pretrained.weights import find_policy, weights_sizes


@dataclass
class Retake(Generating):
    """python evaluate.py retake CLIP: your own video, re-rendered along another camera path."""
    clip: str = ""              # video file or folder of images; may be given as a plain argument
    camera: str = "arc_left"    # ReCamMaster's path by number or name, static, or a camera file
    speed: float = 1.0          # of the camera path
    prompt: str = ""            # what the video shows; empty: BLIP-2's caption of the middle frame
    estimator: str = "mapanything"  # of the clip's cameras: mapanything (in weights), or vipe
    out: str = "out/retake"     # folder for the videos
    frames: int = 81            # at most; the largest 4k + 1 that the clip has
    stride: int = 1             # take every n-th frame


def retake(config):
    """Write <clip>_<camera>_<speed>.mp4 and .._side_by_side.mp4 to config.out; returns the two
    paths."""
    # What can be refused is refused before big files are read: settings first, then the clip.
    if not config.clip or not config.weights:
        raise ValueError("retake: expected a clip and --weights=FOLDER")
    policy = find_policy(config.weights)
    weights_sizes(config.weights)  # all there?
    if not policy.source:
        raise ValueError(f"{config.weights}: {policy.name} takes no source video")
    if config.cameras and not split_name(config.cameras)[0].is_file():
        raise FileNotFoundError(f"{config.cameras}: no such camera file")
    check_caption(config.prompt, "--prompt")
    checkpoint = find_checkpoint(config.ckpt) if config.ckpt else None
    at_least_1(config, "frames", "height", "width", "stride", "steps")
    check_size(config.height, config.width)
    path = Path(config.clip)
    seen = read_clip(path, config.frames, (config.height, config.width), config.stride)
    video, fps, _ = seen
    if config.fov:
        check_fov(config.fov)
    target = named_path(config.camera, len(video), config.speed)

    # The source's cameras: from a file, or estimated in the video as the model sees it.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.mp4"
        write_video(source, video, fps)
        told = config.cameras or None
        if "c2w" in policy.parts and not told:
            told = open_estimator(config.estimator, config.weights, config.vipe,
                                  config.vipe_pipeline, device)
        cameras = find_cameras(seen, path, path.name, source, told, config.fov)
    del told  # makes room

    # Encoded, as one clip; the encoders make room for the policy.
    encoders = open_encoders(config.weights, device)
    codec = encoders[0]
    caption = config.prompt or describe_frame(video[len(video) // 2], config.blip, device,
                                              codec.conv1.weight.dtype)
    check_caption(caption, f"{config.blip} describes it")
    encoded = encode_clip(torch.from_numpy(video).to(device), caption, *encoders)
    clip = Clip(str(path), str(path), caption, fps, *encoded, *cameras)
    negative = encoders[1].embed([NEGATIVE_PROMPT])
    del encoders
    load_captioner.cache_clear()

    # Re-rendered along the new path.
    dit = load_policy(policy.files, checkpoint, device)
    title = f"{config.camera}, speed {config.speed:g}"
    print(f"{len(video)} frames of {config.height} x {config.width}, {title}: {clip.caption}")
    sampling = {"steps": config.steps, "shift": config.shift, "guidance": config.guidance,
                "seed": config.seed}
    new = rerender(dit, codec, clip, target, path.stem, negative, sampling, device)

    # Written: the new video, and both side by side with the paths drawn in.
    camera_file, camera, _ = split_name(config.camera)
    name = "_".join(filter(None, (camera_file.stem, camera)))  # of paths.json#cam03 too
    file = Path(config.out) / f"{path.stem}_{name}_{config.speed:g}.mp4"
    beside = file.with_name(f"{file.stem}_side_by_side.mp4")
    write_video(file, new, fps)
    known = torch.eye(4)[None] if clip.c2w is None else clip.c2w  # or only where it starts
    drawn = draw_paths(new, [known.numpy(), target])  # white: the source's; orange: the new one
    write_video(beside, grid([video, drawn], ["source", title]), fps)
    print(f"{file}\n{beside}")
    return file, beside
