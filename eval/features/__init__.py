"""Metric families of feature extractors."""
