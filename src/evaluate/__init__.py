"""A trained policy on prompts of the user's own: `python -m src.evaluate RUN`."""
