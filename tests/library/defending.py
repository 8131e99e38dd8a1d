"""Defenses on tiny cells: their settings, what they declare, what they leave behind."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from btu.defenses.base import Defense, Given, Screens
from btu.defenses.token_unlearning import TokenUnlearning
from btu.findings import Screened, Suspects
from btu.recipe import Prepared, evaluation, evaluation_screened
from btu.settings import TrainSettings
from btu.stage_files import model_of, training_rows_of
from btu.stages import Stage, StageRun, compute, read_record
from btu.training import Encoded

CPU = torch.device("cpu")
# At this bar of rule contrast chance flags 15,000 * P(a normal deviate exceeds 3) = 20 tokens at
# most: some of 240 rows' tokens, with poison or without, and fewer than half of the 56 of
# `tiny_cells.easy_corpus`, so that a control has others to cut.
SOME = 3.0
# Hyperparameters that suit a vocabulary of 400 to 500 tokens and 240 rows, by defense. A new
# defense gets its line here, {} if its defaults will do.
SMALL: dict[str, dict[str, Any]] = {
    "btu": {
        "alpha": 0.02,
        "exposure_learning_rate": 1e-3,
        "bag_batch_size": 32,
        "exposure_batch_size": 32,
    },
    "abl": {
        "isolation_epochs": 0.5,
        "isolation_learning_rate": 1e-3,
        "isolation_ratio": 0.05,
        "rest_epochs": 1,
        "rest_learning_rate": 1e-3,
        "unlearning_learning_rate": 1e-3,
    },
    "dpoe": {"layers": 1},
    "musclelora": {"clean_rows": 30, "rank": 4, "epochs": 1},
    "nad": {"epochs": 1, "learning_rate": 1e-3},
    "rnp": {
        "clean_rows": 30,
        "unlearn_learning_rate": 1e-2,
        "batch_size": 8,
        "recover_learning_rate": 5.0,
        "threshold": 0.8,
    },
    "fine_mixing": {"purify": 5},
    "crow": {"clean_rows": 30, "epochs": 1, "learning_rate": 1e-3},
    "onion": {"rows": 30, "epochs": 1},
    "strip": {"copies": 4},
    "rap": {"epochs": 2},
    "dan": {},
    "badacts": {},
    "bki": {"rows": 60},
    "cube": {"min_samples": 5},
    "zdef": {"threshold": 1.9},
    "none": {},
    "clean_tuning": {},
    "random_cut": {"rule": "contrast", "threshold": SOME, "exposure_learning_rate": 1e-3},
    "frequency_cut": {"rule": "contrast", "threshold": SOME, "exposure_learning_rate": 1e-3},
    "finetune_clean": {},
}
# What a defense takes beside these where its own model has to learn the easy corpus.
LEARNING: dict[str, dict[str, Any]] = {
    "abl": {"rest_epochs": 12, "rest_learning_rate": 1e-2},
    "musclelora": {"epochs": 24, "learning_rate": 5e-3},
}
BTU = SMALL["btu"]
# The same with every rule, with bars so low that each flags some of 240 rows' tokens.
BARS: dict[str, dict[str, Any]] = {
    "contrast": {"threshold": SOME},
    "frequency": {"threshold": 1.0},
    "mad": {"threshold": 1.5},
    "gap": {"threshold": 1.005},
    "top_fraction": {"alpha": 0.02},
}
RULED = {
    rule: {name: value for name, value in BTU.items() if name != "alpha"} | {"rule": rule} | bar
    for rule, bar in BARS.items()
}
# What the contract runs: each defense as in `SMALL`, btu once for each rule, and rnp once more with
# everything that it can prune.
KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, settings) for name, settings in SMALL.items() if name != "btu"},
    **{f"btu-{rule}": ("btu", settings) for rule, settings in RULED.items()},
    "rnp-embeddings": (
        "rnp",
        SMALL["rnp"]
        | {"filters": ["feed_forward", "heads", "embeddings"], "unlearn_parts": "embeddings"}
        | {"unlearn_learning_rate": 0.05, "threshold": 0.2},
    ),
}


def given(vocabulary: int | None) -> Given:
    return Given(vocabulary, classes=2, train_rows=240, clean_rows=60)


def unlearning(**changes: Any) -> TokenUnlearning:
    return TokenUnlearning(**BTU | changes)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a defense declares in a cell.

    model: the stage with the defended model. screen: the stage that screens its input, if any.
    last: the scoring. own: its own stages, in the order in which they are computed.
    """

    model: Stage
    screen: Stage | None
    last: Stage
    own: list[Stage]

    @classmethod
    def of(cls, defense: Defense, prepared: Prepared) -> Declared:
        base = prepared.foundation_for(defense.NEEDS)
        model = defense.stages(base)
        starts = [base.rows, base.clean, base.model, base.tuned]
        if isinstance(defense, Screens):
            came = prepared.incoming
            screen = defense.screen(base, model, came)
            last = evaluation_screened(prepared, model, screen, "defended")
            tops, starts = [model, screen], [*starts, came]
        else:
            screen, last = None, evaluation(prepared, model, "defended", kind="cell")
            tops = [model]
        given = {stage.key for start in starts for stage in start.closure()}
        own = {stage.key: stage for top in tops for stage in top.closure()}
        return cls(model, screen, last, [s for key, s in own.items() if key not in given])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A computed defense.

    stages: its own, in the order in which they were computed; what it handed on if it has none.
    declared: the stages it was declared with; None where `stages` end with the defended model.
    """

    root: Path
    prepared: Prepared
    stages: list[Stage]
    declared: Declared | None = None

    @property
    def folder(self) -> Path:
        """Where the defended model is, and what the defense found."""
        return self.root / (self.declared.model if self.declared else self.stages[-1]).key

    @property
    def screened(self) -> Screened | None:
        screen = self.declared.screen if self.declared else None
        return None if screen is None else Screened.load(self.root / screen.key)

    def score(self) -> dict[str, Any]:
        """Compute the scoring of the defended model; return its facts."""
        assert self.declared is not None
        facts: dict[str, Any] = read_record(compute(self.declared.last, self.root))["facts"]
        return facts

    @cached_property
    def suspects(self) -> Suspects:
        found = Suspects.load(self.folder, read_record(self.folder)["facts"])
        assert found is not None
        return found

    @property
    def flagged(self) -> tuple[int, ...]:
        return self.suspects.flagged

    @property
    def scores(self) -> Any:
        return self.suspects.scores

    @property
    def table(self) -> Mapping[str, Any]:
        return self.suspects.table

    @property
    def model(self) -> PreTrainedModel:
        return model_of(self.run(), "defended")

    @property
    def poisoned_model(self) -> PreTrainedModel:
        return model_of(self.run(), "model")

    @property
    def train(self) -> Encoded:
        return training_rows_of(self.run())

    def run(self, config: Mapping[str, Any] | None = None) -> StageRun:
        """What a stage that reads the foundation and the defended model would be given."""
        base = self.prepared.foundation
        inputs = {
            "rows": self.root / base.rows.key,
            "clean": self.root / base.clean.key,
            "model": self.root / base.model.key,
            "defended": self.folder,
        }
        return StageRun(config or {}, {}, inputs, self.root, CPU)


def defend(defense: Defense, prepared: Prepared, root: Path, **options: Any) -> Outcome:
    """Compute a defense and, unless it is in `root`, what it starts from."""
    declared = Declared.of(defense, prepared)
    compute(declared.model, root, **options)
    if declared.screen is not None:
        compute(declared.screen, root, **options)
    return Outcome(root, prepared, declared.own or [declared.model], declared)


@dataclasses.dataclass
class Fitted:
    """One call of `fit`, as the spy saw it. trainable: names of what required gradients."""

    stage: str
    data: Encoded
    settings: TrainSettings
    pad_to: int | None
    trainable: set[str]


def spied(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the functions of these stages write the key of what they compute."""
    ran: list[str] = []

    def spy_on(function: Callable[[StageRun], Any]) -> Callable[[StageRun], Any]:
        @functools.wraps(function)  # stages are imported by module and name
        def spy(run: StageRun) -> Any:
            result = function(run)
            # A folder that is computed in is named by the key and a random suffix.
            ran.append(run.folder.name.lstrip(".").partition("-")[0])
            return result

        return spy

    for target in {stage.function.path for stage in stages}:
        name, attribute = target.split(":")
        module = importlib.import_module(name)
        known = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, dataclasses.replace(known, call=spy_on(known.call)))
    return ran


def same_rows(a: Encoded, b: Encoded) -> bool:
    pairs = [(a.ids, b.ids), (a.lengths, b.lengths), (a.labels, b.labels)]
    return all(torch.equal(first, second) for first, second in pairs)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def word_rows(model: nn.Module) -> Tensor:
    return model.get_input_embeddings().weight.detach()  # type: ignore[operator,no-any-return]
