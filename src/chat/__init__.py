"""Chat with a trained model: `python -m src.chat RUN`."""
