"""Metric families of text-to-image models."""
