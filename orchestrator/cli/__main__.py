"""`python -m orchestrator.cli` is `btu`."""

from orchestrator.cli.main import main

if __name__ == "__main__":
    main()
