"""Aim: experiment tracking. Knows nothing of the training loop."""
