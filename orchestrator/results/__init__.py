"""A sweep's results, wherever they are read from."""
