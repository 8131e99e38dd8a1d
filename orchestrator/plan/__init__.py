"""Which stages a sweep is made of, what they share, and what is left to compute."""
