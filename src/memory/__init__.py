"""The memory of a PPO run, estimated before it starts: `python -m src.plan`."""
