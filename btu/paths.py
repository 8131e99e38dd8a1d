"""Where files can be made: asked before hours of work end at a path that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path


def nearest(folder: Path) -> Path:
    """Return what is there of a folder's path: itself, or what it would be made in."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def is_open(folder: Path) -> bool:
    """Return whether files may be made in a folder that is there."""
    return os.access(folder, os.W_OK | os.X_OK)
