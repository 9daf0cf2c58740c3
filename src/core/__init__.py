"""Pure tensor maths: imports torch and `src.types`, nothing else."""
