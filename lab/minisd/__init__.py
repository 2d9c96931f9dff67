"""MiniSD: a complete Stable Diffusion in miniature, and the world of images that it is trained
on.
"""
