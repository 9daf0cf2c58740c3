"""Examining a run before money is spent on it."""
