"""Pure tensor math: imports torch, `src.types` and `src.errors`, nothing else."""
