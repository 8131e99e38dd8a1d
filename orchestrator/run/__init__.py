"""A launch: what runs where and when."""
