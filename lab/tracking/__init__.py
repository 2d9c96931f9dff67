"""Trackers are views of the record. None can stop or delay a run."""
