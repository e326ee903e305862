"""Configuration, runs, training, tracking, reports and search: everything behind the scripts."""
