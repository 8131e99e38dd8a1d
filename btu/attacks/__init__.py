"""The attacks, one file each. They are looked up in `btu.poisoning.ATTACKS`."""
