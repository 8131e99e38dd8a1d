"""The protocol of a defense, what it is given, and what it hands back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from btu.errors import unknown
from btu.registry import Registry
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.types import FloatArray, IntArray, ProgressCallback, Rows, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from btu.training import Encoded, Epoch
    from btu.victims import Victim

DEFENSES: Registry[type[Defense]] = Registry(
    "defense",
    [("btu", "btu.defenses.token_unlearning:TokenUnlearning", "Backdoor Token Unlearning")],
)


@dataclass(frozen=True)
class DefenseSpec:
    """Which defense runs; its own hyperparameters stand beside the name in a config."""

    name: str = "btu"

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise unknown("defense", self.name, DEFENSES)


@dataclass
class DefenseContext:
    """All that a defender has. The poison mask is not among it.

    victim: loads fresh pretrained models. train_rows, train: the poisoned training set as texts
    and labels, and tokenized; paraphrase columns are removed, since a column equal to the text
    would give the poisoned rows away. clean: the reserved clean rows, tokenized.
    model: the poisoned model, shared with other uses of the cell: copy it before changing it.
    history, seconds: `timed` and `clean_tune` record here what ran.
    """

    victim: Victim
    train_rows: Rows
    train: Encoded
    clean: Encoded
    model: PreTrainedModel
    settings: TrainSettings
    tuning: TuningSettings
    seed: int
    device: torch.device
    progress: ProgressCallback = silent
    history: list[Epoch] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train_rows.columns:
            raise ValueError("train_rows must have no columns: a paraphrase gives poison away.")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to ``seconds[stage]``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed

    def clean_tune(self, model: PreTrainedModel, stage: str) -> None:
        """Fine-tune `model` in place on the clean rows.

        The same rows, settings and seed for whoever calls, so that the undefended control and a
        defended model differ in nothing but the defense.
        """
        from btu.training import fit

        with self.timed(stage):
            self.history += fit(
                model,
                self.clean,
                self.tuning.applied_to(self.settings),
                seed=derive_seed(self.seed, "clean tuning"),
                stage=stage,
                device=self.device,
                progress=self.progress,
            )


@dataclass(frozen=True)
class DefenseOutcome:
    """What a defense did.

    model: the defended model. flagged: vocabulary ids it took for trigger tokens; None if it does
    not look for tokens. token_scores: (vocabulary,) the ranking behind `flagged`, higher is more
    suspicious, NaN for what is no candidate.
    token_table: further (vocabulary,) columns worth keeping, by name.
    """

    model: PreTrainedModel
    flagged: tuple[int, ...] | None = None
    token_scores: FloatArray | None = None
    token_table: Mapping[str, FloatArray | IntArray] = field(default_factory=dict)


class Defense(Protocol):
    """A defense: a frozen dataclass whose fields are its hyperparameters.

    A class attribute ``PRESETS`` (name -> values by field) lets a config name sets of them; one of
    the names is ``default``.
    """

    def check(self, vocabulary: int) -> None:
        """Raise a `UserError` where the hyperparameters cannot work on such a vocabulary.

        Called before anything is trained.
        """
        ...

    def defend(self, context: DefenseContext) -> DefenseOutcome:
        """Return the defended model and what was flagged. `context.model` is not changed."""
        ...
