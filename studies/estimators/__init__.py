"""The gradient of every estimator on the same rollouts: variance, norm, direction."""
