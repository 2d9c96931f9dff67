"""Model types, loading and erasure."""
