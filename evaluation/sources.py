"""The source videos of an evaluation, as the model sees them, and encoded for those that generate."""
from pathlib import Path

from safetensors.torch import save
from tqdm import tqdm

from data.clips import NEGATIVE, save_clip
from data.prepare import find_caption, read_captions
from data.video import write_video
from evaluation.generate import find_cameras, make_clip, read_clip
from plumbing.files import digest, printable, write_file
from pretrained.encoders import NEGATIVE_PROMPT, load_captioner, open_encoders
from pretrained.weights import find_policy


def prepare_sources(config, clips, mine, weights, conditions, estimate, device, quiet):
    """Write every clip of `mine` as the model sees it to <out>/sources and, to generate with the
    policy in `weights` (if any), encoded to the folder `conditions`.

    clips: clip -> video below config.videos. What is wrong with a clip is written to `conditions`
    as <clip>.failed, in its place; what is there already is not made again.
    """
    sources = Path(config.out) / "sources"

    def is_done(clip):
        seen = all((sources / f"{clip}{end}").exists() for end in (".mp4", ".digest"))
        return seen and (not weights or (conditions / f"{clip}.safetensors").exists())

    todo = [clip for clip in mine if not is_done(clip)]
    captions = read_captions(config.captions) if config.captions else None
    if weights and (todo or not (conditions / NEGATIVE).exists()):
        encoders = open_encoders(weights, device)
        if todo and not captions:  # refused now, where there is none
            load_captioner(config.blip, device, encoders[0].conv1.weight.dtype)
        unwanted = encoders[1].embed([NEGATIVE_PROMPT])[0].bfloat16().cpu()
        write_file(conditions / NEGATIVE, save({"text": unwanted}))
    for clip in tqdm(todo, "sources", unit="clip", disable=quiet or not todo):
        path = Path(config.videos) / clips[clip]
        mp4 = sources / f"{clip}.mp4"
        failed = conditions / f"{clip}.failed"
        try:
            read = read_clip(path, config)
            video, fps, _ = read
            if not mp4.exists():
                write_video(mp4, video, fps)
            write_file(mp4.with_suffix(".digest"), digest(video.tobytes()).encode())
            if weights:
                caption = find_caption(clips[clip], captions) if captions else None
                if captions and caption is None:
                    raise ValueError(f"no caption in {config.captions}")
                estimator = estimate if "c2w" in find_policy(weights).parts else None
                cameras = find_cameras(path, clips[clip], read, mp4, config, estimator)
                prepared = make_clip(read, path, caption, cameras, encoders, config, device)
                save_clip(conditions / f"{clip}.safetensors", prepared)
            failed.unlink(missing_ok=True)
        except (ValueError, FileNotFoundError) as error:
            write_file(failed, str(error).encode())
            tqdm.write(printable(f"{clip}: {error}"))
    if todo and weights and not captions:
        load_captioner.cache_clear()  # makes room
