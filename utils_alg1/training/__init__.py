"""One training step and what surrounds it: devices, processes, checkpoints."""
