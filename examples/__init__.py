"""Programs to read: PPO in one file, and the library's own parts from Python."""
