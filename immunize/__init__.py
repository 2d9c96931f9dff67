"""Immunizers: one file each; a thin class that the config builds around pure functions."""
