"""Scanning a data set of one's own for trigger tokens."""
