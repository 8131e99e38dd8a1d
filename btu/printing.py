"""Texts of unknown origin, made safe for people: on a terminal and in a spreadsheet."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Characters that control a terminal, reorder a line or cannot be seen. Line breaks and tabs stay,
# and so do the joiners, without which some scripts and emoji cannot be written.
_ODD = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
# Spreadsheets take a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001
_BREAKS = ("\t", "\r", "\n")


def printable(text: str) -> str:
    r"""Return a text with odd characters as escapes: ``\x1b`` for the one that starts a color."""
    return _ODD.sub(lambda odd: odd[0].encode("unicode_escape").decode(), text)


def guarded(value: Any) -> Any:
    """Return a value for a cell of a CSV file; a text that is a formula gets an apostrophe."""
    if not isinstance(value, str) or not value:
        return value
    if value.startswith(_BREAKS) or (value.lstrip().startswith(_FORMULA) and not is_number(value)):
        return f"'{value}"
    return value


def is_number(text: str) -> bool:
    """Return whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def csv_text(table: pd.DataFrame, **options: Any) -> str:
    """Return a table as CSV for people, without its index and with its texts guarded.

    options: further arguments of `pandas.DataFrame.to_csv`.
    """
    safe = table.rename(columns=guarded)
    for place in range(table.shape[1]):
        if table.dtypes.iloc[place].kind not in "biufcmM":  # neither numbers nor times
            safe.isetitem(place, [guarded(value) for value in table.iloc[:, place].tolist()])
    text: str = safe.to_csv(index=False, **options)
    return text
