"""One small program per file; the folders hold what only these use."""
