"""The records that the parts of the library exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Labelled texts.

    texts: (rows,) raw strings.
    labels: (rows,) class indices in [0, classes).
    columns: further text columns by name, each (rows,): paraphrases of the same row. An empty
        string means that the source has no paraphrase of that row.
    partners: (rows,) the other text of each row if rows are pairs, which a tokenizer joins; None
        if a row is one text. Attacks write triggers into `texts` alone.
    partner_first: whether the partner is the first text of a pair.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    partners: tuple[str, ...] | None = None
    partner_first: bool = False

    def __post_init__(self) -> None:
        held = (*self.parts, self.labels, *self.columns.values())
        if len(lengths := set(map(len, held))) != 1:
            raise ValueError(f"texts, labels and columns must be equally long, got {lengths}.")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """What a tokenizer joins, in its order: the texts, or both texts of the pairs."""
        if self.partners is None:
            return (self.texts,)
        return (self.partners, self.texts) if self.partner_first else (self.texts, self.partners)

    def with_parts(self, parts: Sequence[tuple[str, ...]]) -> Rows:
        """Return the rows with other texts. parts: in the order of `parts`."""
        if self.partners is None:
            return replace(self, texts=parts[0])
        partners, texts = parts if self.partner_first else reversed(parts)
        return replace(self, texts=texts, partners=partners)

    @property
    def inputs(self) -> list[tuple[str, ...]]:
        """What is read of each row, (rows,): its text, or both texts of its pair, in order."""
        return list(zip(*self.parts, strict=True))

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` computes from the rows, once per object.

        key: names the value; whoever computes it puts its own module in.
        """
        known: dict[Hashable, Any] = self.__dict__.setdefault("_derived", {})
        if key not in known:
            known[key] = make()
        return known[key]

    def take(self, indices: Sequence[int] | IntArray) -> Rows:
        """Return the rows at `indices`, in that order."""
        return Rows(
            tuple(self.texts[i] for i in indices),
            tuple(self.labels[i] for i in indices),
            {name: tuple(values[i] for i in indices) for name, values in self.columns.items()},
            None if self.partners is None else tuple(self.partners[i] for i in indices),
            self.partner_first,
        )

    def where(self, keep: BoolArray) -> Rows:
        """Return the rows at which the (rows,) mask `keep` is true."""
        return self.take(np.flatnonzero(keep))

    def digest(self) -> str:
        """Return the SHA-256 of all rows."""
        sha = hashlib.sha256()
        held = [("text", self.texts), *sorted(self.columns.items())]
        if self.partners is not None:
            # No column is called so.
            held.append((f"\0partner {'before' if self.partner_first else 'after'}", self.partners))
        for name, values in held:
            sha.update(f"{name}\0{len(values)}\0".encode())
            for value in values:
                # Lone surrogates occur in scraped text and must not stop a run.
                sha.update(value.encode("utf-8", "surrogatepass") + b"\0")
        sha.update(np.asarray(self.labels, dtype=np.int64).tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A data set in its three roles.

    name: of the data set.
    train: the rows that the attacker poisons.
    clean: the reserved clean rows, for clean tuning and defenses that need clean data.
    eval: the rows that CACC and ASR are reported on; nothing is tuned on them.
    label_names: (classes,) the original label values as text, by class index.
    notes: what loading did to the rows (splits held out, overlaps dropped, rows cut), as counts.
    warnings: what looks wrong in the data, a sentence each.
    """

    name: str
    train: Rows
    clean: Rows
    eval: Rows
    label_names: tuple[str, ...]
    notes: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def label_index(self, label: int | str) -> int:
        """Return the class index of an original label value, or of an index of named labels.

        Raises:
            UserError: `label` is not one of `label_names`.
        """
        from btu.errors import UserError, unknown

        if str(label) in self.label_names:
            return self.label_names.index(str(label))
        # If the labels are words, a number can only be a position.
        worded = not any(name.lstrip("-").isdigit() for name in self.label_names)
        if worded and isinstance(label, int) and 0 <= label < len(self.label_names):
            return label
        raise UserError(
            f"{unknown('target_label', str(label), self.label_names)}; a label is compared as the "
            "data writes it: quote it if it looks like a number or a truth value."
        )

    def counts(self) -> dict[str, int]:
        """Return the rows of each role, and what loading did to them (`notes`)."""
        sizes = {"train": len(self.train), "clean": len(self.clean), "eval": len(self.eval)}
        return {**{f"rows_{role}": rows for role, rows in sizes.items()}, **self.notes}

    def fingerprint(self) -> str:
        """Return a hash of all rows in all roles: the revision of the data."""
        sha = hashlib.sha256()
        for rows in (self.train, self.clean, self.eval):
            sha.update(rows.digest().encode())
        sha.update("\0".join(self.label_names).encode())
        return sha.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of the rows of each role and of the label names, by role.

        A stage that reads one role does not depend on the other roles.
        """
        names = "\0".join(self.label_names).encode()
        roles = {"train": self.train, "clean": self.clean, "eval": self.eval}
        return {
            role: hashlib.sha256(rows.digest().encode() + names).hexdigest()
            for role, rows in roles.items()
        }


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned training set, and what only the scorer may read about it.

    rows: the training rows as the victim sees them.
    mask: (rows,) true for rows with the trigger. Hidden from defenses.
    relabeled: number of rows whose label the attack changed.
    covered: number of rows with the trigger that keep a label other than the target.
    poison_rate: the rate reached: rows with the trigger and the target label, over all rows.
    """

    rows: Rows
    mask: BoolArray
    relabeled: int
    covered: int = 0

    @property
    def poison_rate(self) -> float:
        return (int(self.mask.sum()) - self.covered) / len(self.mask) if len(self.mask) else 0.0


@dataclass(frozen=True)
class Progress:
    """The progress of long work, sent to a callback; it does not affect the result.

    stage: what runs, e.g. ``"poisoned fine-tune"``.
    step: number of steps done.
    steps: number of all steps.
    metrics: measured so far, e.g. loss and accuracy of the epoch.
    part: share of the next step that is done, if a step takes long.
    """

    stage: str
    step: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    part: float = 0.0


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress."""


def as_bytes(texts: Iterable[str]) -> list[bytes]:
    """Return texts as bytes, for files.

    Scraped text may contain lone surrogates, which the strings of Parquet and Arrow refuse.
    """
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def as_texts(encoded: Iterable[bytes]) -> tuple[str, ...]:
    """Return the texts that `as_bytes` encoded."""
    return tuple(text.decode("utf-8", "surrogatepass") for text in encoded)
