"""Labels as they are written, and the classes that they name."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from btu.errors import UserError, did_you_mean

# "007" is not one: it is another label than "7".
_WHOLE = re.compile(r"\s*([+-]?(?:0|[1-9][0-9]*))(?:\.0*)?\s*")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?\s*")
# Labels that are shown in a message.
SHOWN = 12
LONGEST = 60


def numbers_of(labels: Sequence[Any]) -> list[Any]:
    """Return the labels of delimited text: numbers if all are numbers, else as they are written."""
    texts = [label for label in labels if isinstance(label, str)]
    if len(texts) < len(labels) or not texts:
        return list(labels)
    distinct = set(texts)
    wholes = {text: _WHOLE.fullmatch(text) for text in distinct}
    if all(wholes.values()):
        numbers = {text: _int(match[1]) for text, match in wholes.items() if match}
        return [numbers[text] for text in texts]
    plain = all(_NUMBER.fullmatch(text) for text in distinct)
    padded = any(re.match(r"\s*[+-]?0[0-9]", text) for text in distinct)
    return [float(text) for text in texts] if plain and not padded else texts


def _int(digits: str) -> int | str:
    # Python converts no number of more digits.
    return int(digits) if len(digits) < 4000 else digits


def written(label: Any) -> str | None:
    """Return how a label is written; None if it is neither text nor a whole number."""
    if isinstance(label, str):
        return label
    if isinstance(label, bool | int):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, Decimal) and label.is_finite() and label == label.to_integral_value():
        return str(int(label))
    return None


def shown(labels: Iterable[Any]) -> str:
    """Return labels for a message: the first ones, shortened; odd white space becomes visible."""
    names = list(labels)
    some = ", ".join(_short(str(name)) for name in names[:SHOWN])
    return some + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _short(name: str) -> str:
    cut = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return cut if cut == " ".join(cut.split()) else repr(cut)


def class_mapping(
    data: str, labels: Iterable[Any], class_names: Sequence[str] | None
) -> dict[str, int]:
    """Map the labels of train, as they are written, to class indices.

    data: the name of the data set, for errors.
    labels: of train.
    class_names: the names in the order of the classes, if the source has them.

    Without names, numbers come first, by value, then texts.

    Raises:
        UserError: a label is neither text nor a whole number, or cannot be written.
    """
    if class_names is not None:
        _check_encodable(data, class_names)
        return {name: index for index, name in enumerate(class_names)}
    order: dict[str, tuple[bool, Any]] = {}
    for label in _distinct(labels):
        name = written(label)
        if name is None:
            raise UserError(
                f"labels of data set '{data}' must be integers or strings, got {label!r}; for "
                "ratings with fractions, write classes."
            )
        text = isinstance(label, str)
        if order.setdefault(name, (text, name if text else int(label)))[0] != text:
            raise UserError(
                f"data set '{data}' has the label {name} both as text and as another type; use one."
            )
    _check_encodable(data, order)
    return {name: index for index, name in enumerate(sorted(order, key=order.__getitem__))}


def _distinct(labels: Iterable[Any]) -> list[Any]:
    """Return each label once, in order; labels that equal each other may have two types."""
    try:
        return [label for _, label in dict.fromkeys((type(label), label) for label in labels)]
    except TypeError:
        return list(labels)  # lists and other labels that are refused


def _check_encodable(data: str, names: Iterable[str]) -> None:
    # Texts may contain one; class names are written into keys, configs and reports.
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"label {name!r} of data set '{data}' contains a lone surrogate, which is no "
                "character and cannot be written; rename the label."
            ) from error


def class_indices(
    labels: Iterable[Any],
    mapping: Mapping[str, int],
    where: str,
    class_names: Sequence[str] | None = None,
) -> list[int]:
    """Return the class of each label.

    labels: of any role.
    mapping: from labels, as they are written, to class indices.
    where: the labels are, for errors: ``the clean rows``.
    class_names: the names, if the source has them; a number is then the number of a class.

    Raises:
        UserError: a label is unknown, or may mean two classes.
    """
    numbers = _by_value(mapping)
    found: list[int] = []
    known: dict[Any, int] = {}
    for label in labels:
        key = (type(label), label)  # True equals 1
        try:
            found.append(known[key])
        except (KeyError, TypeError):
            # JSON and Parquet may contain lists, which are not hashable; they are no classes.
            index = _class_of(label, mapping, numbers, where, class_names)
            known[key] = index
            found.append(index)
    return found


def _class_of(
    label: Any,
    mapping: Mapping[str, int],
    numbers: Mapping[str, int],
    where: str,
    class_names: Sequence[str] | None,
) -> int:
    name = written(label)
    index = None if name is None else mapping.get(name)
    if index is None and name is not None:
        whole = _WHOLE.fullmatch(name)
        index = numbers.get(whole[1]) if whole else None
    if class_names is not None and isinstance(label, int) and not isinstance(label, bool):
        place = label if 0 <= label < len(class_names) else None
        if index is not None and place != index:
            raise UserError(
                f"label {label} of {where} may be the class of that name or class number "
                f"{label} ({shown(class_names)}, from 0); give the names as text in Parquet or "
                "JSON lines."
            )
        index = place
    if index is None:
        numbered = [] if class_names is None else [str(i) for i in range(len(class_names))]
        names = list(dict.fromkeys([*numbered, *mapping]))
        said = repr(label) if name is None or name != " ".join(name.split()) else f"'{name}'"
        said = said if isinstance(label, str) or name is None else name
        raise UserError(
            f"label {_cut(said)} of {where} does not occur in the training labels "
            f"({shown(names)}){did_you_mean(str(name), names) if name else ''}."
        )
    return index


def _cut(said: str) -> str:
    return said if len(said) <= 2 * LONGEST else f"{said[: 2 * LONGEST]}..."


def _by_value(mapping: Mapping[str, int]) -> dict[str, int]:
    """Map whole numbers to the classes that are written with a decimal point (``1.0``)."""
    whole = {name: _WHOLE.fullmatch(name) for name in mapping}
    return {
        match[1]: mapping.get(match[1], mapping[name]) for name, match in whole.items() if match
    }


def alike(names: Sequence[str], counts: Mapping[int, int]) -> str | None:
    """Return a warning that names classes which differ only in case, white space or form.

    names: of the classes.
    counts: number of rows by class.
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folded = " ".join(unicodedata.normalize("NFKC", name).split()).casefold()
        groups.setdefault(folded, []).append(index)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return None
    some = "; ".join(
        " and ".join(f"{names[i]!r} ({counts.get(i, 0)} rows)" for i in group)
        for group in several[:SHOWN]
    )
    return (
        f"Labels differ only in case, white space or the form of characters: {some}. They are "
        "classes of their own; write them alike if they are one."
    )


def counted(labels: Iterable[int]) -> Mapping[int, int]:
    return Counter(labels)
