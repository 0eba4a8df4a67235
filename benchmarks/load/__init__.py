"""What a recall costs beside a search of FAISS alone: `make bench-load`."""
