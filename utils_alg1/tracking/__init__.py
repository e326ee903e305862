"""What a run logs, and the trackers that it is logged to."""
