"""The gradient of every advantage estimator on the same rollouts: variance, norm, direction."""
