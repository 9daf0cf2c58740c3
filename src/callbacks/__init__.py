"""Lightning callbacks: rollouts, stops, tables, plots, progress."""
