"""Condition-number immunization of feature extractors (arXiv 2505.23760)."""
