"""TensorBoard: writer, metrics, server, instructions. Knows nothing of the training loop."""
