"""Contracts, data classes, errors, seeding, hashing, cache and record schema."""
