"""The stages of one run and the processes that compute them."""
