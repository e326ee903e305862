"""Metrics, and the trackers that show them."""
