"""Rewards, all behind one signature (`src.types.Reward`)."""
