"""What several defenses are built from."""
