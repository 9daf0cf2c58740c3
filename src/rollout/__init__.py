"""Sampling responses and making experience of them."""
