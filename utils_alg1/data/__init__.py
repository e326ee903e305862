"""Which text, and its tokens."""
