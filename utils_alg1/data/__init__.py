"""Where the text comes from, and its tokens."""
