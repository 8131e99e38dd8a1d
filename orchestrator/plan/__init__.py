"""The stages of a sweep: what they are, what they share, and which are left to compute."""
