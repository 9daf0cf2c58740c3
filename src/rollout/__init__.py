"""Sampling responses and turning them into experience."""
