"""Trackers are views of the record. None can stop or delay a run."""

from lab.tracking.trackers import Tracker, Trackers

__all__ = ["Tracker", "Trackers"]
