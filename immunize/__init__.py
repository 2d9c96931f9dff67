"""Immunizers: a config class a method, whose call returns new weights.

``kappa``: condition numbers of feature extractors. ``mima``: bi-level immunization of text-to-image
models. ``merge``: the merge of adapted models that ``mima`` differentiates.
"""
