"""Attackers of text-to-image models."""
