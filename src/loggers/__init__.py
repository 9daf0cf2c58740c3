"""Loggers of metrics: CSV tables and Weights & Biases."""
