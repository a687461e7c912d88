"""What a run needs besides the method: settings, checkpoints, ranks and signals, files. A reader may skip it all."""
