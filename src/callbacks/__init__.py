"""Lightning callbacks: when things happen."""
