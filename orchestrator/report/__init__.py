"""Results on disk -> tables."""
