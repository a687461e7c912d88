"""A video of one's own: as the model sees it, its cameras, and encoded for a policy."""
from functools import partial

import torch
from safetensors.torch import save
from tqdm import tqdm

from data.cameras import source_cameras
from data.clips import NEGATIVE, Clip, save_clip
from data.prepare import encode_clip, find_caption, read_captions
from data.video import count_frames, read_frames, read_video, write_video
from evaluation.cases import case_digest
from plumbing.files import printable, write_file
from pretrained.encoders import (
    NEGATIVE_PROMPT, check_caption, describe_frame, load_captioner, open_encoders)


def read_clip(path, frames, size, stride=1):
    """A video's largest 4k+1 frames, `frames` at most (0: all), scaled to cover `size` (H, W) and
    cropped -> uint8 (T, H, W, 3), fps, and the frames' numbers (T,), rows of a camera file."""
    try:
        video, fps, rows = read_frames(path, frames or None, stride, size)
    except ValueError:
        if not frames:
            raise
        # It is shorter; if it is broken, this raises again.
        video, fps, rows = read_frames(path, None, stride, size)
    whole = (len(video) - 1) // 4 * 4 + 1
    if whole < 5:
        raise ValueError(f"{path}: too short, {len(video)} frames, expected at least 5")
    return video[:whole], fps, rows[:whole]


def find_cameras(clip, path, name, mp4, cameras, fov):
    """Cameras of a clip as read_clip returns it: c2w (T, 4, 4), metres, relative to the first, and
    intrinsics (4,).

    cameras: a camera file, or a folder that has one for the video called `name`; or an estimator as
    scores.open_estimator returns it, which is shown `mp4`, the clip as the model sees it; where it
    is None, so are both. fov: see source_cameras.
    """
    if cameras is None:
        return None, None
    video, _, rows = clip

    def estimated(_):
        c2w, intrinsics = cameras(mp4)
        if intrinsics is None:
            raise ValueError("source cameras: expected intrinsics too, found none")
        return torch.from_numpy(c2w)[None], torch.from_numpy(intrinsics)[None]

    told = estimated if callable(cameras) else cameras
    shown = read_video(path, frames=1)[0].shape[1:3]
    return source_cameras(video, rows, shown, name, told, fov or None, partial(count_frames, path))


def prepare_sources(clips, videos, sources, model, read, captions, blip, cameras, fov, device,
                    quiet):
    """Write every clip as the model sees it to the folder `sources` and encoded to the conditions
    of a cases.Model (None: nothing is made of it).

    clips: clip -> video below the folder `videos`; read: read_clip, told all but the path;
    captions: a csv, empty: BLIP-2's; cameras, fov: see find_cameras. What is wrong with a clip is
    written as <clip>.failed, in its place; what is there already is not made again.
    """
    conditions = model.conditions if model else sources
    if model and callable(cameras) and "c2w" not in model.policy.parts:
        cameras = None  # not worth estimating

    def is_done(clip):
        seen = all((sources / f"{clip}{end}").exists() for end in (".mp4", ".digest"))
        return seen and (not model or (conditions / f"{clip}.safetensors").exists())

    todo = {clip: name for clip, name in clips.items() if not is_done(clip)}
    texts = read_captions(captions) if captions else {}
    given = {clip: find_caption(name, texts) for clip, name in todo.items()}
    if model and (todo or not (conditions / NEGATIVE).exists()):
        encoders = open_encoders(model.weights, device)
        dtype = encoders[0].conv1.weight.dtype
        if todo and not captions:  # refused now, where there is none
            load_captioner(blip, str(device), dtype)
    for clip, name in tqdm(todo.items(), "sources", unit="clip", disable=quiet or not todo):
        path = videos / name
        mp4 = sources / f"{clip}.mp4"
        failed = conditions / f"{clip}.failed"
        try:
            seen = read(path)
            video, fps, _ = seen
            if not mp4.exists():
                write_video(mp4, video, fps)
            write_file(mp4.with_suffix(".digest"), case_digest(video).encode())
            if model:
                caption = given[clip]
                if caption is None and captions:
                    raise ValueError(f"no caption in {captions}")
                if caption is None:
                    caption = describe_frame(video[len(video) // 2], blip, device, dtype)
                    check_caption(caption, f"{blip} describes it")
                known = find_cameras(seen, path, name, mp4, cameras, fov)
                encoded = encode_clip(torch.from_numpy(video).to(device), caption, *encoders)
                clip_file = conditions / f"{clip}.safetensors"
                save_clip(clip_file, Clip(str(path), str(path), caption, fps, *encoded, *known))
            failed.unlink(missing_ok=True)
        except (ValueError, FileNotFoundError) as error:
            write_file(failed, str(error).encode())
            tqdm.write(printable(f"{clip}: {error}"))
    if model and not (conditions / NEGATIVE).exists():
        unwanted = encoders[1].embed([NEGATIVE_PROMPT])[0].bfloat16().cpu()
        write_file(conditions / NEGATIVE, save({"text": unwanted}))
    if todo and model and not captions:
        load_captioner.cache_clear()  # makes room
