"""Sweep files: how they are read, checked and turned into cells."""
