"""The cache of conditioning clips that training reads: one safetensors file a clip, and an
index."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from plumbing.files import one_line, write_file
from pretrained.encoders import check_caption

INDEX = "index.json"                      # a cache's, beside its clips
NEGATIVE = "negative_prompt.safetensors"  # likewise


@dataclass
class Clip:
    """A conditioning clip, encoded: all that training needs of it. Not every policy needs the last
    three."""
    name: str                 # its video's path below the videos folder
    video: str                # that video's full path, its first frame being frame 0 here
    caption: str
    fps: float                # frames per second
    latents: torch.Tensor     # (16, F, h, w) normalised latents
    image: torch.Tensor | None  # (257, 1280) CLIP tokens of the first frame
    text: torch.Tensor        # (512, 4096) caption's embedding, zero beyond its length
    c2w: torch.Tensor | None  # (T, 4, 4) float64 source path, metres, relative to its first camera
    intrinsics: torch.Tensor | None  # (4,) fx/W, fy/H of the first frame; cx/W = cy/H = 0.5


TENSORS = ("latents", "image", "text", "c2w", "intrinsics")
FACTS = ("name", "video", "caption", "fps")


def save_clip(path, clip):
    """Clip -> one safetensors file; the text embedding's zeros, most of it, are left out."""
    tensors = {key: getattr(clip, key) for key in TENSORS}
    tensors = {key: x.detach().cpu() for key, x in tensors.items() if x is not None}
    used = tensors["text"].any(1).nonzero().flatten().tolist()
    tensors["text"] = tensors["text"][:max(used, default=0) + 1]
    facts = {key: getattr(clip, key) for key in FACTS} | {"text_length": len(clip.text)}
    tensors = {key: x.contiguous() for key, x in tensors.items()}
    write_file(path, save(tensors, {"clip": json.dumps(facts)}))


def load_clip(path, needs=("latents", "text")):
    """File written by save_clip -> Clip on the CPU. needs: the tensors that it must have.
    ValueError naming the file and what is wrong with it."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("clip", "{}"))
            missing = [key for key in (*FACTS, "text_length") if key not in facts]
            missing += [key for key in needs if key not in file.keys()]
            if missing:
                raise ValueError(f"{path}: no prepared clip, lacks {', '.join(missing)}")
            tensors = {key: file.get_tensor(key) if key in file.keys() else None for key in TENSORS}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or no safetensors file ({one_line(error)})") from None
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from None
    facts = {key: facts[key] for key in (*FACTS, "text_length")}
    check_caption(str(facts["caption"]), path)
    length = facts.pop("text_length")
    text = tensors["text"]
    if type(length) is not int or not len(text) <= length <= 1 << 16 or text.ndim != 2:
        raise ValueError(f"{path}: damaged (text_length {length!r} of {tuple(text.shape)})")
    for key, x in tensors.items():
        if x is not None and not x.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; prepare it again")
    tensors["text"] = F.pad(text, (0, 0, 0, length - len(text)))
    return Clip(**facts, **tensors)


class ClipCache:
    """What `python -m data.prepare` wrote: cache[i] reads clip i as a Clip.
    names: the clips' names; settings: what they were made with; negative: (512, 4096), the negative
    prompt's embedding. needs: the tensors that every clip must have. expected: settings that must
    agree, as in ClipCache(folder, frames=81, height=480, width=832). FileNotFoundError where there
    is none; ValueError where it is empty, damaged or made with other settings or without what is
    needed.
    """

    def __init__(self, folder, needs=("latents", "text"), **expected):
        self.folder = Path(folder)
        self.needs = needs
        index = read_index(self.folder)
        if index is None:
            raise FileNotFoundError(f"{folder}: no {INDEX}: expected clips made by python -m "
                                    "data.prepare")
        self.settings = index["settings"]
        self.names = index["clips"]
        check_settings(folder, self.settings, expected)
        lacks = [name for name in needs if name in self.settings.get("without", ())]
        if lacks:
            raise ValueError(f"{folder}: its clips lack {', '.join(lacks)}, which this policy "
                             "takes: python -m data.prepare with this policy's weights adds them")
        if not self.names:
            raise ValueError(f"{folder}: {INDEX} lists no clip: prepare has not finished, run it "
                             "again")
        try:
            self.negative = load_file(self.folder / NEGATIVE)["text"]
        except (SafetensorError, KeyError) as error:
            why = f"no embedding ({one_line(error)})"
            raise ValueError(f"{self.folder / NEGATIVE}: {why}") from None

    def __len__(self):
        return len(self.names)

    def files(self):
        names = [f"{name}.safetensors" for name in self.names]
        return [self.folder / name for name in (INDEX, NEGATIVE, *names)]

    def __getitem__(self, i):
        return load_clip(self.folder / (self.names[i] + ".safetensors"), self.needs)


def read_index(folder):
    """A cache's index: {"settings": {..}, "clips": [names], "skipped": {name: why}}, or None
    without one."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text())
        kinds = {"settings": dict, "clips": list, "skipped": dict}
        index = {key: kind(index[key]) for key, kind in kinds.items()}
        for name in index["clips"]:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"clips: expected names below this folder, found {name!r}")
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"no index of prepared clips ({one_line(error)})"
        raise ValueError(f"{folder / INDEX}: {why}") from None


def check_settings(folder, made, wanted):
    """ValueError naming every setting in which a cache differs from what is wanted."""
    differ = [key for key in wanted if key not in made or made[key] != wanted[key]]
    if differ:
        what = [f"{key} = {made.get(key, 'unknown')}, wanted {wanted[key]}" for key in differ]
        raise ValueError(f"{folder}: its clips were made with {'; '.join(what)}")
