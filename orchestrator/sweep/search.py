"""The search modes, and the search sections of one sweep file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from btu.errors import UserError
from orchestrator.sweep.modes.axes import GridMode, ZipMode
from orchestrator.sweep.modes.base import PlannedMode, SearchMode, SequentialMode
from orchestrator.sweep.modes.list import ListMode
from orchestrator.sweep.modes.optuna import OptunaMode
from orchestrator.sweep.modes.random import RandomMode
from orchestrator.sweep.typed import unknown_key

# In the order of a cell's coordinates: the first varies slowest, the grid fastest.
MODES: tuple[type[SearchMode], ...] = (OptunaMode, RandomMode, ListMode, ZipMode, GridMode)
SEARCHES = tuple(mode.name for mode in MODES)
# Cells of a sweep that are planned without being asked for.
MOST_CELLS = 100_000


class SearchSections:
    """The search sections of a sweep file, while overrides change them."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: the sweep file as a mapping; its search sections are taken out.

        Raises:
            UserError: a section does not have the form of its mode.
        """
        self._sections = {
            mode.name: mode.form(mode.name, config.pop(mode.name, None)) for mode in MODES
        }

    def override(self, key: str, value: Any) -> bool:
        """Apply an override of a search section; return False if `key` is in none.

        Raises:
            UserError: the section cannot be overridden at this key.
        """
        name, _, rest = key.partition(".")
        if name not in self._sections:
            return False
        self._sections[name].override(rest, value)
        return True

    def pin(self, key: str) -> list[Any]:
        """Remove `key` from every axis; return the values that it had there."""
        return [value for section in self._sections.values() for value in section.pin(key)]

    def written(self) -> dict[str, Any]:
        """Return the sections in the form of a sweep file."""
        values = {name: section.value for name, section in self._sections.items()}
        return {name: value for name, value in values.items() if value is not None}

    def modes(self, base: Mapping[str, Any]) -> tuple[SearchMode, ...]:
        """Return the modes of the sections that the file has, in the order of `MODES`.

        base: the settings of all cells.

        Raises:
            UserError: two sections exclude each other, or one is malformed.
        """
        written = self.written()
        used = [mode for mode in MODES if mode.name in written]
        for mode in used:
            for other in mode.excluded:
                if other in written:
                    raise UserError(
                        f"{other} and {mode.name} exclude each other; keep one of them."
                    )
        return tuple(mode.read(written[mode.name], base) for mode in used)


def refuse_large(modes: Sequence[SearchMode]) -> None:
    """Check the number of cells before any is made.

    Raises:
        UserError: there are more than `MOST_CELLS`.
    """
    planned = [mode for mode in modes if isinstance(mode, PlannedMode)]
    suggested = [mode.trials for mode in modes if isinstance(mode, SequentialMode)]
    total = math.prod((*suggested, *(mode.count() for mode in planned)))
    if total > MOST_CELLS:
        parts = [*(f"{n} suggestions" for n in suggested), *(mode.sizes() for mode in planned)]
        raise UserError(
            f"the sweep has {total:,} cells ({'; '.join(parts)}), more than {MOST_CELLS:,}; "
            "shorten or pin an axis (KEY=VALUE), draw cells at random (section random), or give "
            "--yes."
        )


def check_axes_known(modes: Sequence[SearchMode], swept: Collection[str]) -> None:
    """Check the keys that a sweep varies.

    modes: of the sweep.
    swept: the keys that may vary.

    Raises:
        UserError: a key may not vary, or is an axis of two sections.
    """
    seen: dict[str, str] = {}
    for mode in reversed(modes):
        for key in mode.axes:
            if key not in swept:
                raise unknown_key(key, swept, mode.where)
            if key in seen:
                raise UserError(
                    f"{key} is an axis of both {seen[key]} and {mode.name}; keep it in one."
                )
            seen[key] = mode.name


def possible_points(modes: Sequence[SearchMode], keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the combinations of values that cells may have for those of `keys` that they vary."""
    for parts in itertools.product(*(mode.possible(keys) for mode in modes)):
        yield {key: value for part in parts for key, value in part.items()}
