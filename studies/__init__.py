"""Studies built from the parts of `src`."""
