"""Merging the cross-attention keys and values of several adapted models.

``build`` makes a merge for a U-Net, ``closed_form`` computes it, ``learned`` holds learned weights.
"""
