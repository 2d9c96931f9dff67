"""Trackers are views of the record. Each lives in a process of its own, so none can stop or slow a
run.
"""

from lab.tracking.client import Trackers

__all__ = ["Trackers"]
