"""Data files that run-time code reads."""
