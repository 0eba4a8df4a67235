"""What a step of recall costs beside the work that it cannot avoid: `make bench-core`."""
