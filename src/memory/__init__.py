"""What a run keeps in memory, before it starts: `python -m src.memory`."""
