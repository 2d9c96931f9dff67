"""Aggregation over seeds, intervals and the verdict rule."""
