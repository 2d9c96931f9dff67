"""MiniSD: a complete Stable Diffusion in miniature, and the world of pictures that it is trained
on.
"""
