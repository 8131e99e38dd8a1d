"""Data of the hub without a connection: what is downloaded already, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from btu.data.load import load_corpus
from btu.errors import UserError

if TYPE_CHECKING:
    from btu.data.spec import DataSpec
    from btu.types import Corpus


def load_downloaded(spec: DataSpec) -> Corpus:
    """Load a data set without opening a connection.

    Raises:
        UserError: as `load_corpus`; the data set is on the hub and has not been downloaded.
    """
    if spec.path is not None or spec.name == "demo":
        return load_corpus(spec)
    try:
        with _hub_offline():
            return load_corpus(spec)
    except UserError as error:
        if error.__cause__ is None:  # not the hub's
            raise
        raise UserError(
            f"data set '{spec.name}' has not been downloaded from the hub, and planning opens no "
            "connection; btu plan --download fetches it first, as btu launch does. Or give local "
            "files with data.path."
        ) from error


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep the hub's clients offline, as HF_HUB_OFFLINE=1 does for a process from its start."""
    modules: list[Any] = [
        importlib.import_module(n) for n in ("huggingface_hub.constants", "datasets.config")
    ]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
