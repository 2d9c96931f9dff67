"""Training of MiniSD and of its scorers."""
