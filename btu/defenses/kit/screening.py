"""What the defenses that screen texts at inference share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btu.errors import UserError
from btu.seeding import derive_seed
from btu.types import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from btu.training import Encoded
    from btu.victims import Victim

VALUES = "values.safetensors"


def check_share(name: str, value: float) -> None:
    """Raise a `UserError` unless `value` is above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{name} must be above 0 and below 1, got {value!r}.")


def check_count(name: str, value: int) -> None:
    """Raise a `UserError` unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}.")


def halves(rows: int, first: int, seed: int, stream: str) -> tuple[IntArray, IntArray]:
    """Return which of `rows` clean rows a bar is taken on, and the others, both drawn.

    first: how many the bar is taken on, at most half of them.
    """
    order = np.random.default_rng(derive_seed(seed, stream)).permutation(rows)
    taken = min(first, rows // 2)
    return np.sort(order[:taken]), np.sort(order[taken:])


def ids_by_row(data: Encoded) -> list[IntArray]:
    """Return each row's token ids."""
    return np.split(data.ids.numpy(), np.cumsum(data.host_lengths)[:-1])


def around(victim: Victim) -> IntArray:
    """Return the ids of the special tokens that the victim's tokenizer puts around a text."""
    return np.array(victim.tokenizer("")["input_ids"], dtype=np.int64)


def places_around(victim: Victim) -> tuple[int, int]:
    """Return how many special tokens the victim's tokenizer puts before a text, and behind it."""
    ids = np.array(victim.tokenizer("a")["input_ids"], dtype=np.int64)
    places = np.flatnonzero(content(ids, around(victim)))
    return int(places[0]), int(len(ids) - 1 - places[-1])


def content(ids: IntArray, special: IntArray) -> BoolArray:
    """Return a (tokens,) mask of a row's tokens that come from its text; special: `around` it."""
    mask: BoolArray = ~np.isin(ids, special)
    return mask


def save_values(folder: Path, **values: FloatArray | IntArray) -> None:
    """Write arrays by name into a stage's folder."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in values.items()}
    save_file(arrays, folder / VALUES)


def load_values(folder: Path) -> dict[str, np.ndarray]:
    """Read what `save_values` wrote."""
    from safetensors.numpy import load_file

    return dict(load_file(folder / VALUES))
