"""Loading models, the four roles on one base, scalar heads."""
