"""The forms in which a sweep file writes a search section, and how overrides change each of them.

Nothing is checked here but that the form can be read: a mode checks the values (`SearchMode.read`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from btu.errors import UserError
from orchestrator.sweep.typed import as_mapping


class Section(ABC):
    """A search section as the file writes it, while overrides change it.

    name: the section's key in the file.
    """

    def __init__(self, name: str, written: Any) -> None:
        """written: the value of the section in the file; None if the file lacks it."""
        self.name = name
        self._set(written)

    @property
    @abstractmethod
    def value(self) -> Any:
        """The section in the form of a sweep file; None if there is no such section."""

    @abstractmethod
    def override(self, key: str, value: Any) -> None:
        """Apply an override. key: dotted, within the section; empty for the section as a whole.

        Raises:
            UserError: the section cannot be overridden at this key.
        """

    @abstractmethod
    def pin(self, key: str) -> list[Any]:
        """Remove an axis, because an override gives its key one value; return its old values."""

    @abstractmethod
    def _set(self, written: Any) -> None:
        """Replace the section as a whole."""


class AxesSection(Section):
    """Keys, each with a list of values."""

    axes: dict[str, Any]

    @property
    def value(self) -> dict[str, Any] | None:
        return self.axes or None

    def override(self, key: str, value: Any) -> None:
        if not key:
            raise UserError(
                f"override an axis of the {self.name} by its key: {self.name}.<key>=[...]."
            )
        self.axes[key] = value

    def pin(self, key: str) -> list[Any]:
        values = self.axes.pop(key, [])
        return values if isinstance(values, list) else []

    def _set(self, written: Any) -> None:
        self.axes = as_mapping(self.name, written, "keys to lists of values")


class EntriesSection(Section):
    """A list of mappings from keys to values."""

    entries: Any

    @property
    def value(self) -> Any:
        return self.entries

    def override(self, key: str, value: Any) -> None:
        if key:
            raise UserError(
                f"override the list as a whole, {self.name}=[{{...}}], or pin the key for all of "
                f"its entries, {key}=VALUE."
            )
        self._set(value)

    def pin(self, key: str) -> list[Any]:
        entries = self.entries if isinstance(self.entries, list) else []
        having = [entry for entry in entries if isinstance(entry, dict) and key in entry]
        if not having:
            return []
        taken = [entry.pop(key) for entry in having]
        # Without the key, entries may be equal, or vary nothing at all.
        self.entries = [e for i, e in enumerate(entries) if e not in entries[:i]]
        if self.entries == [{}]:
            self.entries = None
        return taken

    def _set(self, written: Any) -> None:
        self.entries = written


class SpaceSection(Section):
    """Settings of a search, and under ``space`` the domain of each key."""

    settings: dict[str, Any]
    _pinned = False

    @property
    def value(self) -> dict[str, Any] | None:
        # A search of which every key was pinned is over; one without a space is an error.
        over = self._pinned and not self.settings.get("space")
        return None if over else self.settings or None

    def override(self, key: str, value: Any) -> None:
        if not key:
            self._set(value)
        elif key.startswith("space."):
            self.settings.setdefault("space", {})[key.removeprefix("space.")] = value
        else:
            self._set({**self.settings, key: value})

    def pin(self, key: str) -> list[Any]:
        space = self.settings.get("space", {})
        if key not in space:
            return []
        self._pinned = True
        domain = space.pop(key)
        return domain if isinstance(domain, list) else []

    def _set(self, written: Any) -> None:
        settings = as_mapping(self.name, written, "its settings to values")
        if "space" in settings:
            where = f"{self.name}.space"
            space = as_mapping(where, settings["space"], "keys to what they may be")
            settings = {**settings, "space": space}
        self.settings = settings
