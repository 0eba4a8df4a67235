"""What an import and an export cost beside FAISS and SQLite alone: `make bench-import`."""
