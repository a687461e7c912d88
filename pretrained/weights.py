"""The published files: their names; reading, checking and filling of weights; where models live between uses."""
import pickle
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"  # as published
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
DIT, REDIRECTOR = "diffusion_pytorch_model.safetensors", "step20000.safetensors"  # as published


# ---- a folder of published files ----

def weights_sizes(weights):
    """{file: bytes} of the published files; FileNotFoundError for one that is missing."""
    names = DIT, REDIRECTOR, VAE_FILE, TEXT_FILE, IMAGE_FILE
    files = [Path(weights) / name for name in names]
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


def refuse_prefix(path, keys, known):
    """ValueError where a file's keys are known ones behind a prefix, as wrappers and converters leave it
    (module., model.diffusion_model., _orig_mod.). known: keys, or beginnings of keys, that tell."""
    for key in keys:
        for start in known:
            before = key.find("." + start) + 1
            if before and not any(key.startswith(x) for x in known):
                prefix, first = key[:before], ", ".join(sorted(keys)[:3])
                raise ValueError(f"{path}: its {len(keys)} keys begin with {prefix!r}, expected them without it: save "
                                 f"it with the keys renamed ({first:.150}, ...)")


def misfit(path, wrong, what):
    """The ValueError for a file whose keys do not fit a model: how many, and three, of each kind if they are of
    several (missing, unexpected, of another shape)."""
    firsts = {line.partition(" ")[0]: line for line in wrong[::-1] if line.startswith(("missing", "unexpected"))}
    shown = list(dict.fromkeys([*firsts.values(), *(x for x in wrong if " is " in x), *wrong]))[:3]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return ValueError(f"{path}: {len(wrong)} keys do not fit {what}: {'; '.join(shown):.180}{more}")


def refuse_nan(path, key, x):
    """ValueError where a tensor holds NaN or infinity: it would give black videos."""
    if x.is_meta or not x.numel():
        return
    low, high = x.aminmax()  # NaN where there is one, and no copy is made
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{path}: {key} holds NaN or infinity: the file is damaged, get it again")


def need(path, state, what, dims):
    """ValueError unless the keys of `dims`, from which a shape is read, are there with as many dimensions."""
    refuse_prefix(path, state, dims)
    wrong = [k for k in dims if k not in state or state[k].dim() != dims[k]]
    if wrong:
        raise ValueError(f"{path}: no {what}: missing or misshapen {', '.join(wrong[:3])}; the first of its "
                         f"{len(state)} keys are {', '.join(sorted(state)[:3]):.150}")


def fill(model, state, path, device, dtype):
    """Gives a model built on the meta device its weights, one by one, cast and moved; frozen, in eval mode.
    ValueError that counts the missing, unexpected and wrongly shaped keys, or names one that holds NaN."""
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
