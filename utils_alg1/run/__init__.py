"""A training run as train.py sees it: what to train, and the run that keeps its results."""
