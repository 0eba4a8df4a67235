"""The papers' tables and figures, one module per paper: `python -m benchmarks.papers` (or `make papers`)."""
