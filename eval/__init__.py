"""Metrics, one file per family (every name: `docs/reference/metrics.md`), and the report."""
