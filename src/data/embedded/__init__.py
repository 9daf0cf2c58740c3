"""Data sets that need no file and no network."""
