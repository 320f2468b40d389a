"""Long and hostile runs: whether anything grows, stays open or goes wrong with time. `python -m benchmarks.soak`."""
