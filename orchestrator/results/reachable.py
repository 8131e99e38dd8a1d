"""What the sweeps of an output folder still need of its store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from btu.errors import UserError, unknown
from orchestrator.store.storage import below, is_url, open_storage


def reachable(output: str, sweeps: Iterable[str]) -> set[str]:
    """Return the keys of all cells and stages that the plans of sweeps list.

    Raises:
        UserError: no sweep of that name was launched, or a plan cannot be read.
    """
    storage = open_storage(output_location(output))
    keys: set[str] = set()
    for sweep in sweeps:
        plans = storage.names(f"{sweep}/plans")
        if not plans:
            known = [name for name in storage.names("") if storage.names(f"{name}/plans")]
            raise unknown(f"sweep in {output}", sweep, known)
        for name in plans:
            path = f"{sweep}/plans/{name}"
            try:
                for cell in json.loads(storage.read(path))["cells"]:
                    keys |= {cell["key"], *cell.get("stages", ())}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{below(storage.location, path)} is no plan, so what sweep '{sweep}' needs is "
                    "not known; remove the file and launch the sweep, which writes it again."
                ) from error
    return keys


def output_location(output: str) -> str:
    return output if is_url(output) else str(Path(output).expanduser())
