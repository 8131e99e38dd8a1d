"""Scan your own data set for trigger tokens."""
