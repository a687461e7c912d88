"""What goes in.

    video    reading and writing videos        draw     captions, grids and camera maps on videos
    cameras  camera files, folders of them     clips    clips encoded once, for training
    prepare  the command that encodes them     world    what the training loop draws from
    captions the world of prompts alone

Read world.py; skip the others until a file of yours is refused.
"""
