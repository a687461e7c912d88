"""What goes in.

    video         reading and writing videos        draw      captions, grids, camera maps on videos
    camera_files  one camera file, of any format    cameras   paths by name, of a folder, of a clip
    clips         clips encoded once, for training  prepare   the command that encodes them
    world         what the training loop draws from  captions  the world of prompts alone

Read world.py; skip the others until a file of yours is refused.
"""
