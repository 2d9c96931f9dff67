"""Metrics, one file per family (every name: `eval/metrics.md`), and the report."""
