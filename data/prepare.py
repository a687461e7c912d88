"""Encodes a folder of videos for training: `python -m data.prepare`."""
import plumbing.early  # noqa: F401, first of all: a signal during imports ends this quietly

import csv
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from data.cameras import check_fov, source_cameras, split_name, suffix_of
from data.clips import Clip, INDEX, NEGATIVE, TENSORS, check_settings, read_index, save_clip
from data.video import (
    count_frames, find_videos, natural, read_frames, read_video, to_float, without_suffix)
from plumbing.files import (
    TEMPORARY, lock_folder, one_line, printable, write_file, write_json)
from plumbing.ranks import connect, rank_of
from plumbing.settings import run_command
from pretrained.encoders import (
    NEGATIVE_PROMPT, check_caption, describe_frame, load_captioner, load_image_encoder,
    load_text_encoder)
from pretrained.reward_models import mapanything
from pretrained.vae import load_vae
from pretrained.weights import IMAGE_FILE, TEXT_FILE, TOKENIZER, VAE_FILE, find_policy


def read_captions(path):
    """CSV with a header -> {file name without its suffix: caption}; rows without a caption are left
    out.
    Columns: file_name or videoFile, and text or caption (MultiCamVideo's and Sekai's names)."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 csv ({one_line(error)})") from None
    # strict: an open quote is an error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    rows = []
    try:
        for row in reader:
            rows.append((line, row))  # a quoted caption may take several lines
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line}: {one_line(error)}; a caption with quotes is "
                         'written as "a \"\"quoted\"\" word"') from None
    columns = rows[0][1] if rows else []
    name = next((c for c in columns if c in ("file_name", "videoFile")), None)
    text = next((c for c in columns if c in ("text", "caption")), None)
    if name is None or text is None:
        raise ValueError(f"{path}: needs columns file_name and text (or videoFile and caption), "
                         f"has {', '.join(columns) or 'none'}")
    captions = {}
    for line, row in rows[1:]:
        if len(row) > len(columns):
            raise ValueError(f"{path}: line {line}: {len(row)} fields, expected {len(columns)}; a "
                             'caption with commas is written in quotes, as "a man, walking"')
        row = dict(zip(columns, row))
        key = without_suffix(row.get(name, ""))
        caption = row.get(text, "").strip()
        check_caption(caption, f"{path}: line {line}")
        if caption and captions.setdefault(key, caption) != caption:
            raise ValueError(f"{path}: line {line}: another caption for {row[name]}")
    if not captions:
        raise ValueError(f"{path}: no row with a caption")
    return captions


def find_caption(name, captions):
    """A clip's caption by its name below the videos folder or by its file name alone, None without
    a row."""
    key = without_suffix(name)
    return captions.get(key, captions.get(key.rpartition("/")[2]))


def encode_clip(video, caption, vae, text_encoder, image_encoder):
    """uint8 (T, H, W, 3) and a caption -> bf16 latents (16, F, h, w), CLIP tokens (257, d) or,
    without their encoder, None, text (512, D). ValueError where one of them holds NaN or
    infinity."""
    x = to_float(video)[None]
    parts = {"the VAE": vae.encode(x), "the text encoder": text_encoder.embed([caption]),
             "the image encoder": image_encoder(x[:, :, 0]) if image_encoder else None}
    for name, part in parts.items():
        if part is not None and not part.isfinite().all():
            raise ValueError(f"{name} makes NaN or infinity of it")
    latents, text, image = (part if part is None else part[0].bfloat16() for part in parts.values())
    return latents, image, text


def up_to_date(path, caption, without):
    """Whether a clip was prepared before, with this caption (None: with any), and all but
    `without`."""
    try:
        with safe_open(path, "pt") as file:  # reads the header, which must fit the file's length
            facts = json.loads((file.metadata() or {})["clip"])
            whole = set(TENSORS) <= {*file.keys(), *without}
        return whole and caption in (None, facts["caption"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return False


def check_name(name):
    """ValueError where a video's name cannot be that of a clip's file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is no UTF-8") from None
    if len(f"{Path(name).name}.safetensors".encode()) > 255:
        raise ValueError("its name is too long: its clip's file has 12 bytes more, 255 at most")


def is_clip(path):
    """Whether a file is one of save_clip's, by its header."""
    try:
        with safe_open(path, "pt") as file:
            return "clip" in (file.metadata() or {})
    except (OSError, SafetensorError, ValueError):
        return False


def write_index(out, settings, skipped):
    files = [file for file in out.rglob("*.safetensors") if is_clip(file)]
    clips = [file.relative_to(out).as_posix().removesuffix(".safetensors") for file in files]
    clips = sorted((name for name in clips if name not in skipped), key=natural)
    index = {"settings": settings, "clips": clips, "skipped": skipped}
    write_json(out / INDEX, index)
    return index


def check_empty(out):
    """ValueError where a folder without an index holds anything, lest clips and a user's files are
    mixed."""
    others = [file.name for file in out.iterdir()] if out.is_dir() else []
    others = [name for name in others if name != "lock" and not fnmatch(name, TEMPORARY)]
    if others:
        raise ValueError(f"{out}: no {INDEX}, but {printable(others[0])}; expected an empty "
                         "folder, or one that data.prepare made")


@dataclass
class Prepare:
    """`python -m data.prepare`"""
    videos: str = ""            # folder of video files, or of folders of images; or one video file
    out: str = ""               # folder for the clips; an interrupted run goes on there
    weights: str = ""           # folder of the published files of the policy to train
    captions: str = ""          # csv with columns file_name, text (or videoFile, caption)
    captioner: str = ""         # BLIP-2 by folder or hub id, for clips without a caption
    cameras: str = ""           # mapanything (in the weights' map-anything), a folder with a/b.npz
                                # for a/b.mp4, or one file for all; empty: mapanything, or none
                                # where the policy takes none (ReCamMaster). NAME@w2c tells a
                                # convention that files do not say (data/camera_files.py)
    fov: float = 0.0            # horizontal view, degrees, for camera files without intrinsics
    estimator_stride: int = 1   # estimate every n-th camera, interpolate the others
    frames: int = 81            # 4k + 1
    height: int = 480           # pixels
    width: int = 832            # pixels
    stride: int = 1             # take every n-th frame
    negative_prompt: str = NEGATIVE_PROMPT  # for classifier-free guidance (Wan's)


def prepare(config):
    """Encode every video below a folder into a cache that ClipCache reads; returns its index (on
    rank 0).

    Under torchrun the clips are shared out over the ranks. A clip that is itself at fault is
    skipped with the reason; ValueError or OSError for what concerns all, or where no clip is left.
    """
    for name in ("videos", "out", "weights"):
        if not getattr(config, name):
            raise ValueError(f"--{name}=FOLDER is needed")
    rank, world = rank_of()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if world > 1:  # only to share out the clips and to collect what was skipped, days later perhaps
        connect("gloo", timeout=30 * 24 * 3600)
    out = Path(config.out)
    weights = Path(config.weights)

    # What is asked for: which videos with which captions, and which parts the policy takes.
    policy = find_policy(weights)
    cameras = config.cameras or ("mapanything" if "c2w" in policy.parts else "")
    images = "image" in policy.parts or (weights / IMAGE_FILE).is_file()
    without = ([] if images else ["image"]) + ([] if cameras else ["c2w", "intrinsics"])
    folder, names = videos_of(config.videos)
    captions = captions_of(config, names)
    check_cameras(config, cameras)
    vae = load_vae(weights / VAE_FILE, device, dtype)
    check_shape(config, vae)
    settings = settings_of(config, cameras, without)
    begun = begun_with(out, settings)

    # The other models.
    text_encoder = load_text_encoder(weights / TEXT_FILE, weights / TOKENIZER, device, dtype)
    image_encoder = load_image_encoder(weights / IMAGE_FILE, device, dtype) if images else None
    if cameras == "mapanything":
        cameras = mapanything(weights / "map-anything", device, config.estimator_stride).cameras

    # Rank 0 claims the folder and says what is left to do.
    box = [None]
    if rank == 0:
        lock = lock_folder(out)  # noqa: F841, until this process ends
        for leftover in out.rglob(TEMPORARY):  # of a killed run
            leftover.unlink()
        write_index(out, begun, {})
        box = [[name for name in names
                if not up_to_date(out / f"{name}.safetensors", captions[name], without)]]
        tell_size(config, vae, len(names), len(box[0]), without, is_silent="" in captions.values())
    if world > 1:
        dist.broadcast_object_list(box)
    todo = box[0]
    if any(captions[name] is None for name in todo) and config.captioner:
        load_captioner(config.captioner, device, dtype)  # refused now, where there is none
    if rank == 0:
        negative = text_encoder.embed([config.negative_prompt])[0].bfloat16().cpu()
        write_file(out / NEGATIVE, save({"text": negative}))

    # Each rank makes its share.
    models = (vae, text_encoder, image_encoder)
    skipped = {}
    for name in tqdm(todo[rank::world], desc="prepare", unit="clip", disable=rank > 0):
        path = folder / name
        try:
            clip = make_clip(path, name, captions[name], cameras, models, config, device, dtype)
        except (ValueError, FileNotFoundError) as error:
            skipped[name] = str(error).removeprefix(f"{path}: ")
            tqdm.write(printable(f"skipped {name}: {skipped[name]}"))
        else:
            save_clip(out / f"{name}.safetensors", clip)
    if world > 1:
        dist.gather_object(skipped, parts := [None] * world if rank == 0 else None)
        skipped = {name: why for part in parts or () for name, why in part.items()}
        dist.destroy_process_group()
    if rank == 0:
        index = write_index(out, settings, skipped)
        print(f"{len(todo) - len(skipped)} clips made, {len(names) - len(todo)} were there, "
              f"{len(skipped)} skipped; {out} holds {len(index['clips'])}")
        tell_skipped(skipped)
        if not index["clips"]:
            raise ValueError(f"{folder}: no usable clip")
        return index


def videos_of(place):
    """A folder of videos, or one video file -> the folder, and the names of those meant in it."""
    place = Path(place)
    return (place.parent, [place.name]) if place.is_file() else (place, find_videos(place))


def captions_of(config, names):
    """Clips' names -> captions. None: there is no row for it; empty: no caption is asked for."""
    rows = read_captions(config.captions) if config.captions else {}
    nothing = None if config.captions or config.captioner else ""
    return {name: find_caption(name, rows) or nothing for name in names}


def check_cameras(config, cameras):
    """ValueError or FileNotFoundError where cameras and frames cannot be taken as they are set."""
    if cameras not in ("", "mapanything") and not split_name(cameras)[0].exists():
        raise FileNotFoundError(f"{cameras}: expected mapanything, a camera file or a folder of "
                                "them")
    if config.fov:
        check_fov(config.fov)
    stride = min(config.stride, config.estimator_stride)
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, found {stride}")


def check_shape(config, vae):
    """ValueError where the VAE and the policy cannot encode so many frames of that size."""
    unit = 2 * vae.space  # the policy's patches are two latents wide
    if (min(config.frames, config.height, config.width) < 1 or (config.frames - 1) % vae.time
            or config.height % unit or config.width % unit):
        raise ValueError(f"{config.frames} frames of {config.height}x{config.width}: expected "
                         f"{vae.time}k+1 frames, height and width divisible by {unit}")


def settings_of(config, cameras, without):
    """What the index says of how its clips were made. Files' sizes tell sets of weights apart."""
    settings = dict(frames=config.frames, height=config.height, width=config.width,
                    stride=config.stride, negative_prompt=config.negative_prompt, without=without)
    if cameras:
        files = f"files of {split_name(cameras)[0].resolve()}{suffix_of(cameras)}"
        settings["cameras"] = cameras if cameras == "mapanything" else files
        settings |= dict(fov=config.fov or None, estimator_stride=config.estimator_stride)
    for file in (VAE_FILE, TEXT_FILE, *([] if "image" in without else [IMAGE_FILE])):
        settings[f"bytes of {file}"] = (Path(config.weights) / file).stat().st_size
    return settings


def begun_with(out, settings):
    """The settings of a folder's clips before this command has added what they lack. ValueError
    where they were made with others, or the folder holds anything else."""
    index = read_index(out)
    if index is None:
        check_empty(out)
        return settings
    begun = settings | {"without": index["settings"].get("without", [])}
    check_settings(out, index["settings"], {key: begun.get(key) for key in index["settings"]})
    return begun


def make_clip(path, name, caption, cameras, models, config, device, dtype):
    """A video -> its Clip. models: VAE, text encoder, image encoder or None; caption: None where
    BLIP-2 is to describe the middle frame. ValueError where the video, or what is told of it, is at
    fault."""
    check_name(name)
    if caption is None and not config.captioner:
        raise ValueError(f"no caption in {config.captions}")
    size = (config.height, config.width)
    video, fps, numbers = read_frames(path, config.frames, config.stride, size)
    shown = read_video(path, frames=1)[0].shape[1:3]
    video = torch.from_numpy(video).to(device)
    c2w = None
    intrinsics = None
    if cameras:
        count = partial(count_frames, path)
        fov = config.fov or None
        c2w, intrinsics = source_cameras(video, numbers, shown, name, cameras, fov, count)
    if caption is None:
        caption = describe_frame(video[config.frames // 2], config.captioner, device, dtype)
    check_caption(caption, f"{config.captioner} describes it")
    encoded = encode_clip(video, caption, *models)
    return Clip(name, str(path.resolve()), caption, fps, *encoded, c2w, intrinsics)


def tell_size(config, vae, videos, todo, without, is_silent):
    """Print how many clips are to be made, without what, and the room that they take at most."""
    frames = 1 + (config.frames - 1) // vae.time
    latents = vae.z * frames * (config.height // vae.space) * (config.width // vae.space)
    tokens = 0 if "image" in without else 257 * 1280
    size = 2 * (latents + tokens + 512 * 4096) + 128 * config.frames  # bytes
    lacks = ["captions"] * is_silent
    lacks += ["CLIP tokens"] * ("image" in without)
    lacks += ["cameras"] * ("c2w" in without)
    free = shutil.disk_usage(config.out).free
    print(f"{videos} videos, {todo} to do{', without ' * bool(lacks)}{', '.join(lacks)}: "
          f"{config.frames} frames of {config.height}x{config.width}, at most {size / 1e6:.1f} MB "
          f"each, {todo * size / 1e9:.2f} GB together, {free / 1e9:.1f} GB free", flush=True)


def tell_skipped(skipped):
    """Print why clips were skipped, the ten commonest reasons, whatever the numbers in them."""
    kinds = {name: re.sub(r"\d[\d.]*", "N", why) for name, why in skipped.items()}
    for kind, count in Counter(kinds.values()).most_common(10):
        first = next(name for name in kinds if kinds[name] == kind)
        print(printable(f"  {count} like {first}: {skipped[first]}"))


if __name__ == "__main__":
    commands = {"prepare": (Prepare, prepare, None)}
    run_command("data.prepare", __doc__, commands, sys.argv[1:] or ["--help"])
