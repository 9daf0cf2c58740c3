"""Studies that are made of the parts of `src`."""
