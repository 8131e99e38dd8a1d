"""What the tests of stages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab

from btu.types import Corpus


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Corpus,
    victim_folder: Callable[[str], Path],
) -> Lab:
    """Stages of the tiny corpus and the tiny victims."""
    return Lab(tmp_path_factory.mktemp("lab"), tiny_corpus, victim_folder)
