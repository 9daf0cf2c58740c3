"""Measure a trained policy on your own prompts: `python -m src.evaluate RUN`."""
