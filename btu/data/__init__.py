"""Data sets with their three roles."""
