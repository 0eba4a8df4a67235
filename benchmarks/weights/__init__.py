"""What made the weights that Engram ships: `python -m benchmarks.weights` (or `make weights`)."""
