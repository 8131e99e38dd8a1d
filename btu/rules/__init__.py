"""Detection rules, a file each; registered in `btu.rules.base.RULES`."""
