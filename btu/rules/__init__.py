"""Detection rules, a file each; registered in `btu.detection.RULES`."""
