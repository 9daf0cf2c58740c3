"""Random streams, several processes, signals, devices, means with intervals."""
