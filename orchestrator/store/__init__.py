"""Results of stages by content key, and the file primitives below them."""
