"""Recall over gRPC beside the same over REST: `make bench-rpc`."""
