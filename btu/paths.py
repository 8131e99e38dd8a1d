"""Checks of output paths, made before hours of work are spent on what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

from btu.errors import UserError


def written_path(named: str, written: str) -> Path:
    """Return a path as a user writes it, with ``~`` replaced by the home folder.

    named: what an error calls the path: a key or an option.

    Raises:
        UserError: no path can be written so.
    """
    if "\0" in written:
        raise UserError(f"{named} {written!r} has a NUL character, which no path has; remove it.")
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise UserError(
            f"{named} {written!r}: this machine has no user of that name; write the whole path of "
            "the folder, or './' before a name that begins with '~'."
        ) from None


def obstacle(folder: Path) -> str:
    """Return why no file can be made in a folder, or in a new folder there; empty if one can."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not os.path.isdir(place):
        return f"{place} is not a folder"
    return "" if _is_open(place) else f"{place} must be writable"


def check_folder(named: str, folder: Path, fix: str = "name another folder") -> None:
    """Raise a `UserError` unless files can be written into a folder, which may be missing yet.

    named: what the error calls the path: an option and its value.
    """
    if why := obstacle(folder):
        raise UserError(f"{named} cannot be written: {why}; {fix}.")


def check_file(named: str, path: Path, *, new_folder: bool = False) -> None:
    """Raise a `UserError` unless a file can be written there.

    named: what the error calls the path: an option and its value.
    new_folder: whether the writer makes the file's folder if it is missing, and overwrites the
        file in place.
    """
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise UserError(f"{named} is a folder; name a file in it.")
    if new_folder:
        check_folder(named, folder, "name another file")
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise UserError(f"{named} is read-only; name another file.")
    elif not os.path.isdir(folder):
        raise UserError(f"{named}: the folder {folder} does not exist; make it first.")
    elif not _is_open(folder):
        raise UserError(f"{named}: the folder {folder} must be writable; name another one.")


def not_written(named: str, error: OSError, fix: str) -> UserError:
    """Build the error for a path that passed its check and still could not be written."""
    return UserError(f"{named} cannot be written ({error.strerror or error}); {fix}.")


def _is_open(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
