"""TensorBoard: event files, tags, and a server. Independent of the training loop."""
