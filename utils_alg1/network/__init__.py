"""The parts of the model besides its modules: weights on disk, decoding, the manual gradient."""
