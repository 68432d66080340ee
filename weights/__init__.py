"""Weights of others in and ours out: names, position tables, loading into a model, what a test loads."""
