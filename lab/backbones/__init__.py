"""Feature extractors that a run can immunize."""
