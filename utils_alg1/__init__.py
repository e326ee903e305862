"""What the scripts stand on: configuration, runs, console, checkpoints, runtime, training, trackers."""
