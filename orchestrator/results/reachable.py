"""What the sweeps of an output folder still need of its store."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.results.folder import find_sweep, read_plans


def reachable(output: str, sweeps: Iterable[str]) -> set[str]:
    """Return the keys of all cells and stages that the plans of sweeps list.

    Raises:
        UserError: no sweep of that name was launched, or a plan cannot be read.
    """
    keys: set[str] = set()
    for sweep in sweeps:
        for plan in read_plans(find_sweep(output, sweep).storage, sweep):
            for cell in plan["cells"]:
                keys |= {cell["key"], *cell["stages"]}
    return keys
