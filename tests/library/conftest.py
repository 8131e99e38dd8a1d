"""What the tests of stages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from defending import Fitted
from tiny_cells import Lab
from torch import nn

import btu.training
from btu.defenses.kit import contradiction
from btu.settings import TrainSettings
from btu.training import Encoded, fit
from btu.types import Corpus


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Corpus,
    victim_folder: Callable[[str], Path],
) -> Lab:
    """Stages of the tiny corpus and the tiny victims."""
    return Lab(tmp_path_factory.mktemp("lab"), tiny_corpus, victim_folder)


@pytest.fixture
def short_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the models of the second stage for a few steps: for tests that need no good ones."""
    monkeypatch.setattr(contradiction, "LEAST_STEPS", 1)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fitted]:
    """Every call of `fit`, in order."""
    calls: list[Fitted] = []

    def spy(
        model: nn.Module, data: Encoded, settings: TrainSettings, **kwargs: Any
    ) -> list[btu.training.Epoch]:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        calls.append(Fitted(kwargs["stage"], data, settings, kwargs.get("pad_to"), trainable))
        return fit(model, data, settings, **kwargs)

    monkeypatch.setattr(btu.training, "fit", spy)
    return calls
