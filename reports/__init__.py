"""The record of a run, and everything that renders it."""
