"""The attacks, one file each. They are looked up in `btu.attacks.poisoning.ATTACKS`."""
