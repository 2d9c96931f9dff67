"""Metrics, one file per family, and the report."""
