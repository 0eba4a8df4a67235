"""What a filter costs a recall, and what it never costs: `make bench-filters`."""
