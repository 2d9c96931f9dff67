"""Scorers of generated images: CLIP, detector, features, NudeNet."""
