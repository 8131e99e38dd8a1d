"""The defenses, one file each. They are looked up in `btu.defenses.base.DEFENSES`."""
