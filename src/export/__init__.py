"""Export a trained model as a Hugging Face folder with a model card: `python -m src.export RUN`."""
