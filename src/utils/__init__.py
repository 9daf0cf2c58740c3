"""Configuration, random streams, run folders."""
