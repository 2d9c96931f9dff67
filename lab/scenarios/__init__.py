"""Pairs of benign and harmful tasks, from real data."""
