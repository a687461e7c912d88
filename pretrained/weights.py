"""The published files: their names; reading, checking and filling of weights; where models live between uses."""
import pickle
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"  # as published
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
DIT = "diffusion_pytorch_model.safetensors"  # of Wan-AI's T2V and of PAI's Fun-Control-Camera
REDIRECTOR, RECAMMASTER = "step20000.safetensors", "step20000.ckpt"


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

    ReCamMaster is a whole DiT, as published or the same keys in safetensors; ReDirector lies over its base;
    a base alone that takes no cameras is Wan T2V. Whether the files are there is for the reader to find out.
    ValueError for two policies in one folder.
    """
    base, redirector, recammaster = (Path(weights) / name for name in (DIT, REDIRECTOR, RECAMMASTER))

    def has(file, part):
        return file.is_file() and any(part in key for key in open_tensors(file)[0])

    whole = [file for file in (redirector, base) if has(file, ".cam_encoder.")]
    if recammaster.is_file():
        if redirector.is_file() and redirector not in whole:
            raise ValueError(f"{weights}: expected one policy, found {RECAMMASTER} (ReCamMaster) and "
                             f"{REDIRECTOR} (ReDirector)")
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
        raise FileNotFoundError(f"{', '.join(missing)}: no such file, expected the published weights")
    return {f"bytes of {file.name}": file.stat().st_size for file in files}


def expect(path, what):
    """The path, if it is there; else FileNotFoundError that says what was looked for."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected for {what} (rewards.py lists all files)")
    return path


# ---- one file ----

def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def read_weights(path):
    """State dict of a .safetensors or .pth file, memory-mapped, on the CPU; nothing pickled is executed.
    FileNotFoundError; ValueError when the file is truncated, foreign, or holds more than tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL [\w.]+|Unsupported operand \d+", str(error))
        raise ValueError(f"{path}: refused: foreign, or holds pickled code instead of only tensors"
                         f"{f' ({what[0]})' if what else ''}") from None
    except Exception as error:  # readers raise anything on bytes that make no sense
        raise ValueError(f"{path}: truncated, or no checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(type(k) is str and torch.is_tensor(state[k]) for k in state):
        raise ValueError(f"{path}: holds other things than tensors; expected a dict of names and tensors")
    return state


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def open_tensors(path):
    """A DiT's file -> ({key: shape}, function key -> tensor). Safetensors are opened anew for every key:
    closing the file gives its mapped memory back. .ckpt, .pth and .pt are read by read_weights.
    FileNotFoundError; ValueError if it is cut off, foreign, or holds other things than floats."""
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


def need(path, state, what, dims):
    """ValueError unless the keys of `dims`, from which a shape is read, are there with as many dimensions."""
    wrong = [k for k in dims if k not in state or state[k].dim() != dims[k]]
    if wrong:
        raise ValueError(f"{path}: no {what}: missing or misshapen {', '.join(wrong)}; its first keys are "
                         f"{', '.join(sorted(state)[:3])}")


def fill(model, state, path, device, dtype):
    """Gives a model built on the meta device its weights, one by one, cast and moved; frozen, in eval mode.
    ValueError that lists every missing, unexpected and wrongly shaped key."""
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
        raise ValueError(f"{path}: {len(wrong)} keys do not fit {type(model).__name__}: " + "; ".join(wrong))
    model.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
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
