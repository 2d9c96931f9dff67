"""Condition-number immunization of feature extractors (arXiv 2505.23760).

``method``: KAPPA and its baselines. ``trainer``: the loop they share. ``engines``: how a gradient
of features moves a model. ``spectral``: the objectives. ``closed_form``: the optimum of linear
extractors.
"""
