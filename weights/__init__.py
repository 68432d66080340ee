"""Weights of others in and ours out: names, position tables, loading, what a test loads, frozen networks."""
