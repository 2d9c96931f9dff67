"""Launching over processes and the state of submitted jobs."""
