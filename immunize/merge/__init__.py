"""Merging the cross-attention keys and values of several adapted models."""
