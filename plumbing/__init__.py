"""What a run needs besides the method; a reader may skip it all.

    settings    every command's settings      checkpoint  a run's folder: log, checkpoints
    ranks       many processes, signals       files       files written whole, claims, digests
    guard       rewards of a user's own       early       signals during the imports
    tell        what a run says               batch       tensors that are indexed together
"""
