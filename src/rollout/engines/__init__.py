"""What draws the responses that are learned from: this process, or an engine of others."""
