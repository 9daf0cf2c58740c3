"""What a PPO run needs before money is spent: memory per device and seconds per iteration, `python -m src.plan`."""
