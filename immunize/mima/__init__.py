"""Bi-level immunization of text-to-image models (arXiv 2412.15320)."""
