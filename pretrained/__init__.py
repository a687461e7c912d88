"""What others published, loaded from their own files.

    weights        names, reading and checking of files       vae       Wan2.1's codec
    encoders       umT5, CLIP, BLIP-2                  reward_models  MapAnything, VideoAlign, HPSv3

Each agrees with the official code to rounding. A reader of the method may skip it all.
"""
