"""Examples of methods that live outside the bench: `docs/own` explains them, `tests/test_docs.py`
runs them.
"""
