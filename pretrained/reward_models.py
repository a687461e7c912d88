"""The published models that rewards.py asks: MapAnything for cameras, VideoAlign and HPSv3 for
looks.

Each is given what its official code gives it, bit for bit where that can be. Their files are
looked for in one folder, `weights`, each only if its reward is named:
  trans, rot   map-anything/{config.json, model.safetensors}, and the mapanything package
  vq, mq, ta   VideoReward/{model_config.json, checkpoint-<step>/model.pth}, or in the place of
               model.pth adapter_model.safetensors and non_lora_state_dict.pth;
               Qwen2-VL-2B-Instruct/{config.json, tokenizer.json, tokenizer_config.json} (with
               adapters its *.safetensors too)
  hpsv3        HPSv3/HPSv3.safetensors; Qwen2-VL-7B-Instruct/{config.json, tokenizer.json, ...},
               as above

Sources: MapAnything (Keetha et al., arXiv 2509.13414), VideoAlign (Liu et al., arXiv 2501.13918),
HPSv3 (Ma et al., arXiv 2508.03789), LongCat-Video (arXiv 2510.22200).
"""
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import trajectories
from pretrained.weights import expect, fill, on_device, read_weights


# ---- for all of them ----

FOLDERS = {  # names of rewards -> folders that they read
    ("trans", "rot"): ("map-anything",),
    ("vq", "mq", "ta"): ("VideoReward", "Qwen2-VL-2B-Instruct"),
    ("hpsv3",): ("HPSv3", "Qwen2-VL-7B-Instruct")}  # of the last the tokenizer, not its weights


def model_files(names, weights):
    """The files in the folder `weights` that rewards of these names read: what a run's scores
    depend on."""
    found = []
    for rewards, folders in FOLDERS.items():
        if not {*names}.isdisjoint(rewards):
            for folder in folders:
                files = sorted((Path(weights) / folder).rglob("*"))
                found += [file for file in files if file.is_file()]
    return [file for file in found
            if not ("7B" in file.parent.name and file.suffix == ".safetensors")]


def luma(videos):
    """uint8 (n, T, H, W, 3) -> brightness (n, T, H, W) in [0, 1] (Rec. 601)."""
    return videos.float() @ (torch.tensor([0.299, 0.587, 0.114], device=videos.device) / 255)


@functools.lru_cache(maxsize=64)
def _resampling(size, new, kernel):
    """Pillow's resampling of one axis, a matrix (new, size): weights times 2^22, integers in
    float64."""
    stretch = max(size / new, 1)  # shrinking widens the kernel
    reach = {"bicubic": 2, "lanczos": 3}[kernel] * stretch
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * size / new
    pixel = torch.arange(size)
    x = ((pixel + 0.5 - centre) / stretch).abs()
    if kernel == "lanczos":
        weight = torch.sinc(x) * torch.sinc(x / 3) * (x < 3)
    else:  # a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, far) * (x < 2)
    weight *= (pixel >= (centre - reach + 0.5).floor()) & (pixel < (centre + reach + 0.5).floor())
    weight *= 2 ** 22 / weight.sum(1, keepdim=True)
    return (weight + weight.sign() / 2).trunc()


def resize(frames, height, width, kernel):
    """uint8 (n, H, W, 3) -> (n, height, width, 3), bit for bit Pillow's resize; "bicubic" or
    "lanczos".

    It rounds and clips after each axis, the horizontal one first.
    """
    out = []
    for x in frames.split(8):  # bounds the float64 copies, whose sums of integers are exact
        for axis, new in ((2, width), (1, height)):
            if x.shape[axis] != new:
                weight = _resampling(x.shape[axis], new, kernel).to(x.device)
                x = torch.tensordot(weight, x.double(), ([1], [axis])).movedim(0, axis)
                x = (x / 2 ** 22 + 0.5).floor().clamp(0, 255).byte()
        out.append(x)
    return torch.cat(out)


# ---- MapAnything ----

def spread(count, frames):
    """`count` of `frames` frame indices, evenly spaced from the first to the last, rounded half
    to even."""
    return torch.linspace(0, frames - 1, count).round().long()


def fill_in(c2w, kept, frames):
    """Poses (n, K, 4, 4) at frames `kept` -> (n, frames, 4, 4): positions linear, rotations on
    geodesics."""
    out = torch.full((len(c2w), frames, 4, 4), math.nan, dtype=torch.float64)
    for poses, row in zip(c2w.double().cpu().numpy(), out.numpy()):
        if np.isfinite(poses).all():
            if frames > 1:  # a single frame has its own pose: nothing lies between two
                poses = trajectories.interpolate(poses, kept, np.arange(frames))
            row[:] = poses
    return out.to(c2w.device)


# MapAnything's sizes (width, height), multiples of its patch, 14, by aspect ratio as its package
# rounds them, from the smallest: of two that are as near, its package takes the first.
MAPANYTHING_SIZES = {
    0.486: (252, 518), 0.567: (294, 518), 0.649: (336, 518), 0.757: (392, 518), 1.0: (518, 518),
    1.321: (518, 392), 1.542: (518, 336), 1.762: (518, 294), 2.056: (518, 252), 3.083: (518, 168)}


def mapanything_size(H, W):
    """MapAnything's (height, width) for frames of H x W, and (h, w), their size before the crop."""
    width, height = MAPANYTHING_SIZES[min(MAPANYTHING_SIZES, key=lambda ratio: abs(ratio - W / H))]
    scale = max(width / W, height / H) + 1e-8
    return (height, width), (int(H * scale), int(W * scale))


def mapanything_views(frames):
    """uint8 (..., H, W, 3) -> float32 (..., 3, height, width), bit for bit MapAnything's
    preprocess_inputs: Pillow's Lanczos (bicubic where enlarged), centre crop, ImageNet mean and
    deviation."""
    H, W = frames.shape[-3:-1]
    (height, width), (h, w) = mapanything_size(H, W)
    kernel = "lanczos" if max(height / H, width / W) < 1 else "bicubic"
    x = resize(frames.reshape(-1, H, W, 3), h, w, kernel)
    top = (h - height) // 2
    left = (w - width) // 2
    x = x[:, top:top + height, left:left + width].permute(0, 3, 1, 2).float() / 255
    mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return ((x - mean) / std).unflatten(0, frames.shape[:-3])


def mapanything(folder, device="cpu", stride=1):
    """MapAnything as a pose estimator: uint8 (n, T, H, W, 3) -> metric c2w (n, T, 4, 4), all n in
    one pass.

    Its attribute cameras(videos) -> (c2w, intrinsics (n, 4) fx/W fy/H 0.5 0.5 of the first
    frame). stride > 1 estimates every stride-th frame only (evenly spread, first and last
    included) and interpolates the rest: on the ten evaluation paths at up to double speed that
    alone costs at most 0.22 mm at stride 3.
    folder: config.json and model.safetensors. bfloat16 autocast on a GPU (its own default), else
    float32. Its constructor asks torch.hub for DINOv2: offline, that must be in torch.hub's cache
    and config.json must say "torch_hub_pretrained": false. FileNotFoundError without the files,
    ValueError without the package. It answers for any video, featureless ones too: only poses
    that are not finite count as failed.
    """
    for file in ("config.json", "model.safetensors"):
        expect(Path(folder) / file, "MapAnything")
    try:
        from mapanything.models import MapAnything
    except ImportError as error:
        url = "git+https://github.com/facebookresearch/map-anything"
        raise ValueError(f"trans and rot need MapAnything: pip install {url} ({error})") from None
    try:
        model = MapAnything.from_pretrained(str(folder), strict=True)
        model = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{folder}: no MapAnything checkpoint ({why})") from error

    @torch.no_grad()
    def cameras(videos):
        frames, H, W = videos.shape[1:4]
        kept = spread(math.ceil((frames - 1) / stride) + 1, frames)
        images = mapanything_views(videos[:, kept.to(videos.device)])
        views = [{"img": image, "data_norm_type": ["dinov2"]} for image in images.unbind(1)]
        # masks take time and touch no pose; 8 dense maps take 5 GB
        with on_device(model, videos.device):
            views = model.infer(views, use_amp=videos.is_cuda, apply_mask=False, mask_edges=False,
                                minibatch_size=8)
        # a copy: theirs are inference tensors
        c2w = torch.stack([view["camera_poses"] for view in views], 1)
        h, w = mapanything_size(H, W)[1]
        fx, fy = (views[0]["intrinsics"][:, i, i].double() / size for i, size in ((0, w), (1, h)))
        half = torch.full_like(fx, 0.5)
        return fill_in(c2w, kept.numpy(), frames), torch.stack([fx, fy, half, half], 1)

    def estimator(videos, scene=None):
        return cameras(videos)[0]

    estimator.module = model
    estimator.cameras = cameras
    return estimator


# ---- Qwen2-VL, the body of VideoAlign and HPSv3 ----

def smart_size(height, width, least, most):
    """Qwen2-VL's size for an image: multiples of 28, aspect ratio about kept, `least` to `most`
    pixels."""
    h, w = (max(28, round(x / 28) * 28) for x in (height, width))
    if h * w > most:
        beta = math.sqrt(height * width / most)
        h, w = (math.floor(x / beta / 28) * 28 for x in (height, width))
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = (math.ceil(x * beta / 28) * 28 for x in (height, width))
    return h, w


def patchify(clip):
    """uint8 (t, H, W, 3) -> Qwen2-VL's patches, uint8 (t/2 * H/14 * W/14, 3*2*14*14), and (t/2,
    H/14, W/14).

    Patches of 2 x 14 x 14 pixels, in 2 x 2 groups; a single image counts as two equal frames.
    """
    if len(clip) == 1:
        clip = clip.expand(2, -1, -1, -1)
    t = len(clip) // 2
    h = clip.shape[1] // 14
    w = clip.shape[2] // 14
    x = clip.permute(0, 3, 1, 2).reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def normalise(patches):
    """uint8 patches (N, 3*2*14*14) -> float32, by CLIP's mean and deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    # as the official code rounds it
    grey = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
    table = ((grey - mean[:, None]) / std[:, None]).to(patches.device)
    channels = patches.view(len(patches), 3, -1).int().unbind(1)
    return torch.cat([row[x] for row, x in zip(table, channels)], 1)


def merge_lora(state, scale, file):
    """State dict of a checkpoint (PEFT's or plain) -> keys of transformers' Qwen2VLModel and
    rm_head.*, adapters folded in: W + scale B A, in float32. The language-model head is dropped.
    file: for the error."""
    plain = {}
    for key, x in state.items():
        key = key.removeprefix("base_model.model.")
        key = key.replace(".base_layer", "").replace(".default", "")
        if not key.startswith("lm_head."):
            plain[re.sub(r"^model\.", "language_model.", key)] = x
    for key in [key for key in plain if ".lora_A." in key]:
        weight = key.replace(".lora_A", "")
        a = plain.pop(key)
        b = plain.pop(key.replace("lora_A", "lora_B"), None)
        if b is None or weight not in plain:
            raise ValueError(f"{file}: {key} lacks {weight if b is not None else 'its lora_B'}")
        plain[weight] = plain[weight].float() + scale * b.float() @ a.float()
    return plain


def reward_head(state):
    """Takes rm_head.* out of a state dict: its Linear layers in float32, ReLU between them, no
    dropout."""
    layers = []
    for key in sorted(key for key in state if re.fullmatch(r"rm_head\.(\d\.)?weight", key)):
        weight = state.pop(key).float()
        bias = state.pop(key.replace("weight", "bias"), None)
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.float())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def qwen2vl(base, state, file, template, tokens, media, device="cpu", dtype=torch.float32):
    """A Qwen2-VL that reads a clip and a prompt and scores its hidden state at each of `tokens`.

    base: folder with config.json and the tokenizer; state: as merge_lora gives it; file: where it
    came from, for errors; template: text file in prompts/; media: "image" or "video". Returns
    read(clips, prompts, batch=8) -> float32 logits (n, tokens, outputs), clips a list of uint8
    (t, H, W, 3) of any size divisible by 28 (t even for video, 1 for image). The body runs in
    `dtype`, the head in float32.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        expect(Path(base) / name, "a reward model's sizes and tokenizer")
    template = (Path(__file__).parent / "prompts" / template).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    token_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))
    head = reward_head(state)
    rows = len(state.get("language_model.embed_tokens.weight", ()))
    if not len(head) or rows != len(tokenizer):
        raise ValueError(f"{file}: expected rm_head and {len(tokenizer)} embeddings (the tokenizer "
                         f"of {base} and {', '.join(tokens)}), found {len(head)} head layers and "
                         f"{rows} embeddings")
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config.text_config.vocab_size = rows
    with torch.device("meta"):
        body = Qwen2VLModel(config)
    fill(body, state, file, device, dtype)
    for name, module in list(body.named_modules()):
        if hasattr(module, "inv_freq"):  # no part of a checkpoint, so still on the meta device
            body.set_submodule(name, type(module)(module.config).to(device))
    both = nn.ModuleList([body, head.to(device)]).eval()
    pad = f"<|{media}_pad|>"

    def tokenize(prompts, grids):
        """Official chat template -> right-padded ids and mask (n, L); one media token per 2 x 2
        patches."""
        texts = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                 f"<|vision_start|>{pad * (math.prod(grid) // 4)}<|vision_end|>"
                 f"{template.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
                 for prompt, grid in zip(prompts, grids)]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return inputs["input_ids"], inputs["attention_mask"]

    @torch.no_grad()
    def read(clips, prompts, batch=8):
        if len(clips) > batch:
            return torch.cat([read(clips[i:i + batch], prompts[i:i + batch])
                              for i in range(0, len(clips), batch)])
        patches, grids = zip(*map(patchify, clips))
        ids, mask = tokenize(prompts, grids)
        at = (ids[..., None] == token_ids).nonzero()  # (n * tokens, 3): row, position, which token
        once = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(tokens)))
        if not torch.equal(at[:, ::2], once):
            raise RuntimeError(f"a prompt holds a special token of the reward model: {prompts}")
        device = patches[0].device
        with on_device(both, device):
            hidden = body(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False,
                # Plain positions, as both were trained; transformers' default, 3-D ones, is off by
                # 0.1-0.5.
                position_ids=torch.arange(ids.shape[1], device=device).expand(3, *ids.shape),
                **{f"{media}_grid_thw": torch.tensor(grids, device=device),
                   {"image": "pixel_values", "video": "pixel_values_videos"}[media]:
                   normalise(torch.cat(patches)).to(dtype)}).last_hidden_state
            rows, columns = at[:, :2].to(device).unbind(1)
            return head(hidden[rows, columns].float()).view(len(ids), len(tokens), -1)

    read.module = both
    read.tokenize = tokenize
    return read


# ---- VideoAlign ----

def frame_count(frames, fps, rate):
    """How many of `frames` frames at `fps` VideoAlign looks at: `rate` a second, even, at least
    4."""
    if frames < 2:
        raise ValueError(f"VideoAlign needs at least 2 frames, found {frames}")
    return round(min(max(frames / fps * rate, 4), frames // 2 * 2) / 2) * 2


def videoalign_frames(video, fps, rate=2.0, most=448 * 448):
    """uint8 (T, H, W, 3) -> the frames (t, h, w, 3) VideoAlign sees; resized as torchvision
    would."""
    x = video[spread(frame_count(len(video), fps, rate), len(video)).to(video.device)]
    size = smart_size(*video.shape[1:3], 128 * 28 * 28, most)
    x = F.interpolate(x.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)


def videoalign(folder, base, names=("vq", "mq"), grey_mq=False, device="cpu", dtype=torch.float32):
    """VideoAlign's reward model (VideoReward), either published layout, LoRA merged by hand.

    Scores are in standard deviations of its training set where model_config.json has
    inference_config, else raw. grey_mq: motion is judged without colour, in a second pass
    (LongCat-Video), since VideoAlign alone rewards over-exposed, over-saturated videos. Frames
    come from the tensor, where the official code decodes an mp4. On two real 480p clips, H.264 at
    crf 18-28 (41-33 dB) moved scores by up to 0.02, which lies between what +-1 grey level of
    noise does (0.003) and what tells the clips apart (0.04-0.19); measured with small random
    weights.
    """
    folder = Path(folder)
    base = Path(base)
    file = expect(folder / "model_config.json", "VideoAlign")
    try:
        config = json.loads(file.read_text())
        data = config["data_config"]
        lora = config["peft_lora_config"]
        found = (data["prompt_template_type"], data["num_frames"],
                 config["model_config"]["reward_token"], lora.get("use_rslora", False),
                 data.get("sample_type", "uniform"))
        scale = lora["lora_alpha"] / lora["lora_r"]
        norm = config.get("inference_config")
        rate = data["fps"]
        most = data["max_frame_pixels"]
        mean, std = ([norm[f"{name}_{what}"] for name in ("VQ", "MQ", "TA")] if norm else default
                     for what, default in (("mean", [0.0] * 3), ("std", [1.0] * 3)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not VideoAlign's ({type(error).__name__}: {error})") from None
    if found != ("detailed_special", None, "special", False, "uniform"):
        raise ValueError(f"{file}: expected prompt_template_type, num_frames, reward_token, "
                         "use_rslora, sample_type to be detailed_special, None, special, False, "
                         f"uniform, found {found}")
    steps = {int(path.name[11:]): path for path in folder.glob("checkpoint-*")
             if path.name[11:].isdigit()}
    if not steps:
        raise FileNotFoundError(f"{folder}/checkpoint-<step>: not found; expected there for "
                                "VideoAlign")
    step = steps[max(steps)]
    if (step / "model.pth").exists():
        state = read_weights(step / "model.pth")
    else:
        adapter = expect(step / "adapter_model.safetensors", "VideoAlign (or model.pth beside it)")
        others = expect(step / "non_lora_state_dict.pth", "VideoAlign")
        files = sorted(base.glob("*.safetensors"))
        files = files or [expect(base / "model.safetensors", "the adapters")]
        state = {}
        for file in [*files, adapter, others]:
            for key, x in read_weights(file).items():
                state[key.removeprefix("base_model.model.")] = x
    tokens = [f"<|{name}_reward|>" for name in ("VQ", "MQ", "TA")]
    state = merge_lora(state, scale, step)
    read = qwen2vl(base, state, step, "videoalign.txt", tokens, "video", device, dtype)

    def grade(videos, scene):
        frames = [videoalign_frames(video, fps, rate, most)
                  for video, fps in zip(videos, scene.fps.tolist())]
        x = read(frames, scene.prompt)
        x = x[..., 0] if x.shape[-1] == 1 else x.diagonal(dim1=1, dim2=2)
        x = (x - x.new_tensor(mean)) / x.new_tensor(std)
        return dict(zip(("vq", "mq", "ta"), x.unbind(1)))

    def reward(videos, scene):
        scores = grade(videos, scene) if set(names) - {"mq"} or not grey_mq else {}
        if grey_mq and "mq" in names:
            grey = (luma(videos) * 255).round().byte()[..., None].expand(videos.shape)
            scores["mq"] = grade(grey, scene)["mq"]
        return {name: scores[name] for name in names}

    reward.names = names
    reward.module = read.module
    reward.read = read
    return reward


# ---- HPSv3 ----

def hpsv3(file, base, prompt=None, device="cpu", dtype=torch.float32):
    """HPSv3's mean score mu over the frames.

    prompt: one fixed text for all frames in place of each video's own (LongCat-Video: "A
    high-quality image"), which leaves text alignment out. Pixels are bit for bit the official
    code's for image files (Pillow's bicubic).
    """
    state = merge_lora(read_weights(expect(Path(file), "HPSv3")), 1, file)
    read = qwen2vl(base, state, file, "hpsv3.txt", ["<|Reward|>"], "image", device, dtype)

    def reward(videos, scene):
        size = smart_size(*videos.shape[2:4], 448 * 448, 448 * 448)
        images = resize(videos.flatten(0, 1), *size, "bicubic").unsqueeze(1).unbind()
        prompts = [prompt or text for text in scene.prompt for _ in range(videos.shape[1])]
        mu = read(images, prompts)[:, 0, 0]  # the second output is a log deviation
        return {"hpsv3": mu.view(videos.shape[:2]).mean(1)}

    reward.names = ("hpsv3",)
    reward.module = read.module
    reward.read = read
    return reward
