"""Detection rules, one file each; registered in `btu.rules.base.RULES`."""
