"""What inference.py works with: a model, a prompt, the score of a text."""
