"""The `btu` command: one file per command."""
