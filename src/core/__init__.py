"""PPO as pure tensor math: imports torch, jaxtyping, `src.types`, `src.errors` and the standard library alone."""
