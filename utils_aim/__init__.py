"""Aim: experiment tracking. Independent of the training loop."""
