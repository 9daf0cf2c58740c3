"""Checkpoints, their checksums and metadata, resuming, stopping on a signal."""
