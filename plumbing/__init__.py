"""What a run needs besides the method; a reader may skip it all.

    settings    every command's settings      checkpoint  a run's folder: lock, log, checkpoints
    ranks       many processes, signals       files       files written whole, digests
    tell        what a run says               batch       tensors that are indexed together
"""
