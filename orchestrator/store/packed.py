"""Small files of an entry that its marker contains, on an object store.

There each file costs a request when it is written and one when it is read. A result has many small
files, and a report reads one of them from each cell: the marker brings them along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.store import places
from orchestrator.store.local import LocalStorage
from orchestrator.store.marker import Marker
from orchestrator.store.places import HEAVY
from orchestrator.store.tree import FileFact

# What the small files of one entry may have together. Markers are read by the thousand.
PACKED_BYTES = 32_000


def pack(folder: Path, files: Mapping[str, FileFact]) -> dict[str, bytes]:
    """Return the contents of the smallest files of an attempt, as far as they fit.

    folder: with the files. files: all of them, with their sizes.
    """
    packed: dict[str, bytes] = {}
    room = PACKED_BYTES
    for name, fact in sorted(files.items(), key=lambda item: (item[1].size, item[0])):
        room -= fact.size
        if room < 0:
            break
        packed[name] = (folder / name).read_bytes()
    return packed


def unpack(storage: LocalStorage, marker: Marker, *, light: bool = False) -> None:
    """Write the packed files of an entry into its folder, where they are missing.

    light: leave out the files in ``model/``.
    """
    for name, data in marker.small.items():
        path = places.below(marker.folder, name)
        if not (light and name.startswith(HEAVY)) and not storage.exists(path):
            storage.write(path, data, durable=False)


def separate(marker: Marker) -> dict[str, FileFact]:
    """Return the files of an entry that are not packed."""
    return {name: fact for name, fact in marker.files.items() if name not in marker.small}
