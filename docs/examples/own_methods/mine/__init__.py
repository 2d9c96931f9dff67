"""Examples of methods outside the project; `tests/integration/test_docs.py` runs them."""
