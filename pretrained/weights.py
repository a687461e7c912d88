"""The published files: their names; reading, checking and filling of weights; where models live
between uses.

    python -m pretrained.weights FOLDER               what is there, whole, recognised, for whom
    python -m pretrained.weights merge BASE CKPT OUT  base and checkpoint as one, for other tools
"""
import importlib.util
import json
import os
import pickle
import re
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from plumbing.checkpoint import METADATA, find_checkpoint
from plumbing.files import digest
from plumbing.settings import run_command

VAE_FILE = "Wan2.1_VAE.pth"  # as published
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
DIT = "diffusion_pytorch_model.safetensors"  # of Wan-AI's T2V and of PAI's Fun-Control-Camera
REDIRECTOR = "step20000.safetensors"
RECAMMASTER = "step20000.ckpt"


# ---- a folder of published files ----

@dataclass
class Policy:
    """A policy that others published, and what it takes besides text."""
    name: str     # ReDirector, ReCamMaster or Wan T2V
    files: tuple  # of its DiT, the base first
    source: bool  # takes a source video
    parts: tuple  # of a prepared clip (data/clips.py), those that it cannot do without


def find_policy(weights):
    """Which policy a folder of weights holds, by its files and their keys -> Policy.

    ReCamMaster is a whole DiT, as published or the same keys in safetensors; ReDirector lies over
    its base; a base alone that takes no cameras is Wan T2V. Whether the files are there is for
    the reader to find out. ValueError for two policies in one folder.
    """
    weights = Path(weights)
    base = weights / DIT
    redirector = weights / REDIRECTOR
    recammaster = weights / RECAMMASTER

    def has(file, part):
        return file.is_file() and any(part in key for key in open_tensors(file)[0])

    whole = [file for file in (redirector, base) if has(file, ".cam_encoder.")]
    if recammaster.is_file():
        if redirector.is_file() and redirector not in whole:
            raise ValueError(f"{weights}: expected one policy, found {RECAMMASTER} (ReCamMaster) "
                             f"and {REDIRECTOR} (ReDirector)")
        whole = [recammaster]
    if whole:
        return Policy("ReCamMaster", (whole[0],), True, ("text", "latents"))
    if base.is_file() and not redirector.is_file() and not has(base, "control_adapter."):
        return Policy("Wan T2V", (base,), False, ("text",))
    return Policy("ReDirector", (base, redirector), True,
                  ("text", "latents", "image", "c2w", "intrinsics"))


def weights_sizes(weights):
    """{file: bytes} of the published files; FileNotFoundError for one that is missing."""
    policy = find_policy(weights)
    files = [*policy.files, Path(weights) / VAE_FILE, Path(weights) / TEXT_FILE]
    files += [Path(weights) / IMAGE_FILE] if "image" in policy.parts else []
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file, expected the published "
                                "weights")
    return {f"bytes of {file.name}": file.stat().st_size for file in files}


def expect(path, what):
    """The path, if it is there; else FileNotFoundError that says what was looked for."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected for {what} (rewards.py lists all "
                                "files)")
    return path


# ---- one file ----

def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def read_weights(path):
    """State dict of a .safetensors or .pth file, memory-mapped, on the CPU; nothing pickled is
    executed. FileNotFoundError; ValueError when the file is truncated, foreign, or holds more
    than tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL [\w.]+|Unsupported operand \d+", str(error))
        raise ValueError(f"{path}: refused: foreign, or holds pickled code instead of only tensors"
                         f"{f' ({what[0]})' if what else ''}") from None
    except Exception as error:  # readers raise anything on bytes that make no sense
        raise ValueError(f"{path}: truncated, or no checkpoint ({first_line(error)})") from None
    if (not isinstance(state, dict)
            or not all(type(k) is str and torch.is_tensor(state[k]) for k in state)):
        raise ValueError(f"{path}: holds other things than tensors; expected a dict of names and "
                         "tensors")
    return state


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def open_tensors(path):
    """A DiT's file -> ({key: shape}, function key -> tensor). Safetensors are opened anew for
    every key: closing the file gives its mapped memory back. .ckpt, .pth and .pt are read by
    read_weights. FileNotFoundError; ValueError if it is cut off, foreign, or holds other things
    than floats."""
    if Path(path).suffix in (".ckpt", ".pth", ".pt"):
        state = read_weights(path)
        shapes = {key: tuple(x.shape) for key, x in state.items()}
        strange = [f"{key} ({x.dtype})" for key, x in state.items() if not x.is_floating_point()]
        read = state.__getitem__
    else:
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                shapes = {key: tuple(x.get_shape()) for key, x in slices.items()}
                kinds = {key: x.get_dtype() for key, x in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
        strange = [f"{key} ({kind})" for key, kind in kinds.items() if kind not in FLOATS]

        def read(key):
            with safe_open(path, "pt") as file:
                return file.get_tensor(key)
    if strange:
        raise ValueError(f"{path}: expected types {', '.join(FLOATS)}, found {', '.join(strange)}")
    return shapes, read


def refuse_prefix(path, keys, known):
    """ValueError where a file's keys are known ones behind a prefix, as wrappers and converters
    leave it (module., model.diffusion_model., _orig_mod.). known: keys, or beginnings of keys,
    that tell."""
    for key in keys:
        for start in known:
            before = key.find("." + start) + 1
            if before and not any(key.startswith(x) for x in known):
                found = f"its {len(keys)} keys begin with {key[:before]!r}, expected without:"
                raise ValueError(with_three(f"{path}: {found}", sorted(keys)))


def with_three(message, lines):
    """A message and the first three lines, shortened where it would be longer than 285
    characters."""
    lines = lines[:3]
    room = 285 - len(message)
    if sum(len(line) + 2 for line in lines) > room:
        each = max(room // len(lines) - 2, 24)
        lines = [line if len(line) <= each else line[:each - 3] + "..." for line in lines]
    return f"{message} {'; '.join(lines)}"


def misfit(path, wrong, what):
    """The ValueError for a file whose keys do not fit a model: how many, and three, of each kind
    if they are of several (missing, unexpected, of another shape)."""
    firsts = {line.partition(" ")[0]: line for line in wrong[::-1]
              if line.startswith(("missing", "unexpected"))}
    shown = list(dict.fromkeys([*firsts.values(), *(x for x in wrong if " is " in x), *wrong]))[:3]
    return ValueError(with_three(f"{path}: {len(wrong)} keys do not fit {what}:", shown))


def refuse_misfit(path, shapes, expected, missing, what):
    """ValueError unless the {key: shape} of a file are among those `expected`, and no key is
    `missing`."""
    wrong = [f"unexpected {key}" for key in shapes if key not in expected]
    wrong += [f"{key} is {shape}, expected {expected[key]}"
              for key, shape in shapes.items() if expected.get(key, shape) != shape]
    wrong += [f"missing {key}" for key in missing]
    if wrong:
        raise misfit(path, wrong, what)


def refuse_nan(path, key, x):
    """ValueError where a tensor holds NaN or infinity: it would give black videos."""
    if x.is_meta or not x.numel():
        return
    low, high = x.aminmax()  # NaN where there is one, and no copy is made
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{path}: {key} holds NaN or infinity: the file is damaged, get it again")


def need(path, state, what, dims):
    """ValueError unless the keys of `dims`, from which a shape is read, are there with as many
    dimensions."""
    refuse_prefix(path, state, dims)
    wrong = [k for k in dims if k not in state or state[k].dim() != dims[k]]
    if wrong:
        message = (f"{path}: no {what}: missing or misshapen {', '.join(wrong[:2])}; the first of "
                   f"its {len(state)} keys:")
        raise ValueError(with_three(message, sorted(state)))


def fill(model, state, path, device, dtype):
    """Gives a model built on the meta device its weights, one by one, cast and moved; frozen, in
    eval mode. ValueError that counts the missing, unexpected and wrongly shaped keys, or names
    one that holds NaN."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype}, expected floating point")
    expected = model.state_dict()
    wrong = [f"missing {k}" for k in expected if k not in state]
    for k, v in state.items():
        if k not in expected:
            wrong.append(f"unexpected {k}")
        elif v.shape != expected[k].shape:
            wrong.append(f"{k} is {tuple(v.shape)}, expected {tuple(expected[k].shape)}")
        elif not v.is_floating_point():
            wrong.append(f"{k} is {v.dtype}, expected floating point")
    if wrong:
        raise misfit(path, wrong, type(model).__name__)
    placed = {}
    for k, v in state.items():
        placed[k] = v.to(device, dtype)
        refuse_nan(path, k, placed[k])
    model.load_state_dict(placed, assign=True)
    return model.eval().requires_grad_(False)


# ---- where models live ----

@contextmanager
def on_device(module, device):
    """Frozen weights that live elsewhere visit the device; none is copied back."""
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    home = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, data in home:
            tensor.data = data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data


# ---- python -m pretrained.weights FOLDER ----

def model_name(shapes):
    """Which published model a state dict's {key: shape} is of; ValueError where it is none that
    is known."""
    has = lambda part: any(part in key for key in shapes)
    blocks = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    widths = [shape[0] for key, shape in shapes.items() if key.endswith("self_attn.q.weight")]
    width = widths[0] if widths else 0
    if has(".cam_encoder."):
        return f"ReCamMaster's DiT, {blocks} blocks of width {width}"
    if has("patch_embedding.weight") and has(".self_attn."):
        camera = " with camera control" if has("control_adapter.") else ", plain"
        return f"Wan DiT{camera}, {blocks} blocks of width {width}"
    if shapes and all(".self_attn." in key for key in shapes):
        kind = "ReDirector's self-attention" if has("rope_phase") else "self-attention without RoCE"
        return f"{kind}, {blocks} blocks of width {width}"
    others = {"token_embedding.weight": "umT5 text encoder",
              "visual.pos_embedding": "CLIP image tower", "decoder.conv1.weight": "Wan VAE",
              "rm_head.0.weight": "HPSv3", "rm_head.weight": "VideoReward",
              "info_sharing": "MapAnything", "lora_A": "adapters"}
    for part, name in others.items():
        if has(part):
            return name
    raise ValueError(f"not recognised; its first keys are {', '.join(sorted(shapes)[:3])}")


QWEN = ("config.json", "tokenizer.json", "tokenizer_config.json")
CAMERAS = "trans, rot"  # rewards, by who gives them
GRADES = "vq, mq, ta"
FRAMES = "hpsv3"
POLICY = "policy"
ENCODERS = "encoders"

# What a folder holds beside its policy: (file, what it must be recognised as or None, the part it
# belongs to). * is any name.
LAYOUT = (
    (VAE_FILE, "Wan VAE", POLICY), (TEXT_FILE, "umT5 text encoder", ENCODERS),
    (f"{TOKENIZER}/tokenizer.json", None, ENCODERS),
    (f"{TOKENIZER}/tokenizer_config.json", None, ENCODERS),
    (IMAGE_FILE, "CLIP image tower", ENCODERS),
    ("map-anything/config.json", None, CAMERAS),
    ("map-anything/model.safetensors", "MapAnything", CAMERAS),
    ("VideoReward/model_config.json", None, GRADES),
    ("VideoReward/checkpoint-*/model.pth", "VideoReward", GRADES),
    *((f"Qwen2-VL-2B-Instruct/{name}", None, GRADES) for name in QWEN),
    ("HPSv3/HPSv3.safetensors", "HPSv3", FRAMES),
    *((f"Qwen2-VL-7B-Instruct/{name}", None, FRAMES) for name in QWEN))
DITS = {  # policy -> what its files must be recognised as
    "ReDirector": ("Wan DiT with camera control", "ReDirector's self-attention"),
    "ReCamMaster": ("ReCamMaster's DiT",), "Wan T2V": ("Wan DiT, plain",)}
NEEDS = {  # command -> the parts it needs
    "train": (POLICY,), "data.prepare": (POLICY, ENCODERS, CAMERAS),
    "evaluate": (POLICY, ENCODERS), "evaluate retake": (POLICY, ENCODERS, CAMERAS)}


def inspect_file(path, wanted):
    """What a published file is and its size, in words; ValueError where it is damaged or
    something else.

    Only headers are read: a file cut off does not fit its header, a changed byte in a tensor is
    not seen.
    """
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"damaged: {first_line(error)}") from None
        return "readable"
    if path.suffix == ".safetensors":
        shapes = open_tensors(path)[0]
    else:
        shapes = {key: tuple(x.shape) for key, x in read_weights(path).items()}
    name = model_name(shapes)
    if wanted and not name.startswith(wanted):
        raise ValueError(f"expected {wanted}, found {name}")
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = path.stat().st_size
    size = f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
    return f"{name}, {count:,} parameters, {size}"


def adapters_of(folder):
    """The files of VideoReward's other published layout, without model.pth; None where it is not
    that one."""
    steps = sorted((folder / "VideoReward").glob("checkpoint-*/adapter_model.safetensors"))
    if not steps:
        return None
    qwen = sorted((folder / "Qwen2-VL-2B-Instruct").glob("*.safetensors"))
    return [steps[-1], steps[-1].with_name("non_lora_state_dict.pth"),
            *(qwen or [folder / "Qwen2-VL-2B-Instruct/model.safetensors"])]


def look_at(folder):
    """A folder against its policy's files and LAYOUT -> rows (name, part, "ok", "missing" or
    "damaged", words).
    """
    rows = []

    def look(path, wanted, part):
        name = path.relative_to(folder).as_posix()
        try:
            if not path.is_file():
                rows.append((name, part, "missing", ""))
            else:
                rows.append((name, part, "ok", inspect_file(path, wanted)))
        except (ValueError, OSError) as error:
            rows.append((name, part, "damaged", str(error).removeprefix(f"{path}: ")))

    try:
        policy = find_policy(folder)
    except ValueError as error:
        rows.append(("the policy", POLICY, "damaged", str(error).removeprefix(f"{folder}: ")))
        policy = Policy("ReDirector", (folder / DIT, folder / REDIRECTOR), True, ("image",))
    dits = [(file.name, name, POLICY) for file, name in zip(policy.files, DITS[policy.name])]
    needless = () if "image" in policy.parts else (IMAGE_FILE,)
    for name, wanted, part in (*dits, *(row for row in LAYOUT if row[0] not in needless)):
        step = lambda path: [int(x) for x in re.findall(r"\d+", path.parent.name)]
        found = sorted(folder.glob(name), key=step)
        others = adapters_of(folder) if "checkpoint-*" in name and not found else None
        for path in others or [found[-1] if found else folder / name]:
            look(path, None if others else wanted, part)
    is_there = importlib.util.find_spec("mapanything") is not None
    url = "git+https://github.com/facebookresearch/map-anything"
    words = "importable" if is_there else f"pip install {url}"
    rows.append(("the mapanything package", CAMERAS, "ok" if is_there else "missing", words))
    return rows


@dataclass
class Check:
    """python -m pretrained.weights FOLDER"""
    folder: str = ""            # of published weights; may be given plainly
    rewards: str = "trans=1,rot=1,vq=1,mq=1,hpsv3=1"  # those that training will name


def check(config):
    """Print what a folder of published weights holds; exit code 1 where one is damaged or train
    lacks one."""
    folder = Path(config.folder)
    if not config.folder or not folder.is_dir():
        raise FileNotFoundError(f"{config.folder or '(no name)'}: no such folder of published "
                                "weights")
    rows = look_at(folder)
    width = max(len(row[0]) for row in rows)
    for name, part, state, words in rows:
        print(f"{state:<8} {name:<{width}}  {words or f'needed for {part}'}")
    wanted = {item.rpartition("=")[0].strip() for item in config.rewards.split(",")}
    asked = tuple(part for part in (CAMERAS, GRADES, FRAMES) if wanted & set(part.split(", ")))
    lacks = {}
    for command, parts in NEEDS.items():
        needed = parts + (asked if command == "train" else ())
        lacks[command] = [row for row in rows if row[1] in needed and row[2] != "ok"]
    for command, missing in lacks.items():
        extra = ""
        if command == "train":
            extra = f" with --rewards={config.rewards}"
        elif CAMERAS in NEEDS[command]:
            extra = " (map-anything not needed with --cameras)"
        names = ", ".join(row[0] for row in missing)
        print(f"{command + ':':<17} {f'lacks {names}' if missing else 'all there'}{extra}")
    if lacks["train"] or any(row[2] == "damaged" for row in rows):
        sys.exit(1)


# ---- python -m pretrained.weights merge BASE CKPT OUT ----

@dataclass
class Merge:
    """python -m pretrained.weights merge BASE CKPT OUT"""
    files: str = ""             # BASE (a folder of published weights, or a DiT's file), CKPT (a
                                # checkpoint or its run's folder), OUT (the .safetensors file to
                                # write); may be given plainly


def merge(config):
    """Write a DiT's whole weights: a checkpoint's laid over the base's, keys and types as the
    base's."""
    names = config.files.split(",")
    if len(names) != 3 or not all(names):
        raise ValueError("merge: expected BASE CKPT OUT, without commas in them, found "
                         f"{config.files!r}")
    base = Path(names[0])
    out = Path(names[2])
    checkpoint = find_checkpoint(names[1])
    sources = list(find_policy(base).files) if base.is_dir() else [base]
    for file in sources:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, expected the base's")
    if out.exists() or out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected the name of a new .safetensors file")
    state = {}
    for file in (*sources, checkpoint):
        adds = file != checkpoint or len(sources) == 1
        lay_over(state, file, is_first=file == sources[0], adds=adds)
    with safe_open(checkpoint, "pt") as file:
        made = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    made["what"] = "a whole DiT: its base with self-attention trained by Geo-Align"
    made["base"] = [f"{file.name}, {file.stat().st_size} bytes" for file in sources]
    made["checkpoint"] = f"{checkpoint.parent.name}, digest {digest(checkpoint.read_bytes())}"
    temporary = out.with_name(f"{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(state, temporary, {"format": "pt", METADATA: json.dumps(made)})
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    kinds = Counter(str(x.dtype).removeprefix("torch.") for x in state.values())
    print(f"{out}: {len(state)} tensors ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
          f"{out.stat().st_size / 1e9:.2f} GB")


def lay_over(state, file, is_first, adds):
    """Put a file's tensors over those of `state`, in the types that are there; ValueError for
    strange ones.

    adds: whether the file may bring keys of its own (ReDirector's RoCE), which get the commonest
      type.
    """
    shapes, read = open_tensors(file)
    usual = Counter(x.dtype for x in state.values()).most_common(1)
    for key in shapes:
        x = read(key)
        if not x.isfinite().all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
        if is_first:
            state[key] = x
        elif key in state and state[key].shape == x.shape:
            state[key] = x.to(state[key].dtype)
        elif key not in state and adds and "rope_phase" in key:
            state[key] = x.to(usual[0][0])
        else:
            expected = tuple(state[key].shape) if key in state else "no such tensor in the base"
            raise ValueError(f"{file}: {key} is {tuple(x.shape)}, expected {expected}")


if __name__ == "__main__":
    COMMANDS = {"check": (Check, check, "folder"), "merge": (Merge, merge, "files")}
    run_command("pretrained.weights", __doc__, COMMANDS, sys.argv[1:] or ["--help"])
