"""Rewards, all with one signature (`src.types.Reward`)."""
