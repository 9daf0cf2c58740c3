"""Random streams, several processes, signals, devices, figures with intervals."""
