"""ReDirector's own network, timed: run by bench.py as a program inside a checkout of
byeongjun-park/ReDirector.

    cd REDIRECTOR && python .../benchmarks/official.py FOLDER

FOLDER holds settings.json, weights.safetensors and inputs.safetensors, and gets
velocity.safetensors and seconds.json. It needs the checkout's own environment, and nothing of this
project's.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, os.getcwd())
from diffsynth.models.wan_video_dit import WanModel  # noqa: E402
from diffsynth.pipelines.wan_video_new import model_fn_wan_video  # noqa: E402
from model_utils import adjust_to_ReDirector  # noqa: E402


def main(folder):
    settings = json.loads((folder / "settings.json").read_text())
    device = torch.device(settings["device"])
    dtype = getattr(torch, settings["dtype"])
    with device:
        wan = WanModel(in_dim=32, out_dim=16, text_dim=4096, freq_dim=256, eps=1e-6, patch_size=(1, 2, 2),
                       has_image_input=True, add_control_adapter=True, in_dim_control_adapter=24,
                       **settings["shape"])
    wan = adjust_to_ReDirector(wan, None)[0].to(device, dtype)
    wan.load_state_dict(load_file(folder / "weights.safetensors"))
    for name, parameter in wan.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    inputs = {name: x.to(device, dtype) for name, x in load_file(folder / "inputs.safetensors").items()}

    def velocity(recompute):
        return model_fn_wan_video(
            wan, latents=inputs["x"], timestep=1000 * inputs["t"], context=inputs["text"],
            clip_feature=inputs["image"], y=inputs["source"], control_camera_latents_input=inputs["camera"],
            cond_plucker_embedding=inputs["source_camera"], use_gradient_checkpointing=recompute)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def best(f):
        times = []
        for _ in range(settings["repeat"] + 1):
            start = now()
            f()
            times.append(now() - start)
        return min(times[1:])

    with torch.no_grad():
        save_file({"velocity": velocity(False).float().cpu()}, folder / "velocity.safetensors")
        found = {"forward s": best(lambda: velocity(False)), "fwd + bwd s": None}
    if settings["backward"]:
        found["fwd + bwd s"] = best(lambda: velocity(True).float().square().mean().backward())
    (folder / "seconds.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
