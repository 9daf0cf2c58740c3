"""Where metrics go: CSV tables and Weights & Biases."""
