"""What a defense starts from, and the stages that defenses share.

A defense cannot reach the poison mask or the evaluation rows through this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError
from btu.findings import Suspects
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import (
    clean_rows_of,
    read_table,
    save_model,
    training_rows_of,
    victim_of,
    write_table,
)
from btu.stages import Stage, StageFunction, StageRun, as_config, stage
from btu.types import BoolArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btu.training import Encoded

KEPT = "kept.parquet"


@dataclass(frozen=True)
class Foundation:
    """What a defense starts from, without the poison mask and the evaluation rows.

    rows: the poisoned training rows as the victim reads them (`training_rows_of`, `texts_of`).
    clean: the reserved clean rows (`clean_rows_of`, `tune`).
    model: the poisoned model.
    tuned: the poisoned model after clean tuning, the control of every defense that ends with it.
    victim: the victim, in the form that keys contain.
    where: where the victim is.
    train: settings of the fine-tune.
    tuning: settings of the clean tuning.
    seed: the seed of the cell.
    train_rows: number of training rows, for estimates of time.
    clean_rows: number of reserved clean rows, for estimates of time.
    originals: the model fine-tuned on the training rows before the poison; None unless the
        defense, a control, declares the need.

    A stage that tunes has ``{"rows": rows, "clean": clean}`` among its inputs. A stage that does
    not read the clean rows leaves them out, and cells that differ in them share it.
    """

    rows: Stage
    clean: Stage
    model: Stage
    tuned: Stage
    victim: Mapping[str, Any]
    where: Mapping[str, Any]
    train: TrainSettings
    tuning: TuningSettings
    seed: int
    train_rows: int
    clean_rows: int
    originals: Stage | None = None

    def stage(
        self,
        function: StageFunction,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Stage],
        *,
        units: int = 0,
        light: tuple[str, ...] = (),
        kind: str = "stage",
        model: bool = False,
        reads: tuple[str, ...] = (),
    ) -> Stage:
        """Declare a stage of a defense, with victim and seed in its config.

        function: computes it.
        name: shown to users.
        config: everything else that affects the result, as plain data.
        inputs: the stages that it reads, by role.
        units: rows that it processes, for estimates of time.
        light: roles of the inputs whose files in ``model/`` are not read.
        kind: which resources it uses, as in `Stage`.
        model: whether it writes files in ``model/``.
        reads: roles of the inputs of which it reads the facts alone, as in `Stage`.
        """
        acts = {"victim": self.victim, "seed": self.seed, **config}
        return Stage(name, function, acts, inputs, self.where, light, kind, units, model, reads)

    def fine_tune(self, name: str, kept: Stage) -> Stage:
        """Declare a fine-tune on the training rows that a stage keeps.

        kept: writes which rows (`keep_rows`).

        Settings and seed are those of the undefended model: a difference between the two models
        comes from the rows.
        """
        return self.stage(
            fine_tune_kept,
            name,
            {"train": as_config(self.train)},
            {"rows": self.rows, "kept": kept},
            units=self.train_rows * self.train.epochs,
            kind="cell",
            model=True,
        )

    def tuning_config(self) -> dict[str, Any]:
        """Return the config slice that `tune` reads."""
        settings = self.tuning.applied_to(self.train)
        return {"tuning": as_config(settings)}


def tune(run: StageRun, model: PreTrainedModel, stage: str) -> None:
    """Fine-tune `model` in place on the clean rows, the input ``clean``.

    Rows, settings and seed are the same for every caller: the undefended control and a defended
    model differ only in the defense.
    """
    run.fit(
        model,
        clean_rows_of(run),
        TrainSettings(**run.config["tuning"]),
        seed=derive_seed(run.config["seed"], "clean tuning"),
        stage=stage,
    )


def split_clean(run: StageRun, count: int) -> tuple[Encoded, Encoded]:
    """Draw `count` of the clean rows to hold out; return the others, and those held out."""
    clean = clean_rows_of(run)
    rng = np.random.default_rng(derive_seed(run.config["seed"], "held-out rows"))
    order = rng.permutation(len(clean))
    return clean.take(np.sort(order[count:])), clean.take(np.sort(order[:count]))


def keep_rows(run: StageRun, kept: BoolArray) -> None:
    """Write which training rows a defense keeps, for `Foundation.fine_tune`.

    kept: (training rows,).

    Raises:
        UserError: no row is kept.
    """
    if not kept.any():
        raise UserError(
            f"the defense removes all {len(kept)} training rows: there is nothing to train on; "
            "loosen its thresholds."
        )
    write_table(run.folder / KEPT, {"kept": kept})


@stage(version=1)
def fine_tune_kept(run: StageRun) -> dict[str, Any]:
    """Fine-tune the victim on the rows that a defense kept, the input ``kept``.

    Passes on what the defense found (`Suspects.save`) and measured.
    """
    kept = read_table(run.inputs["kept"] / KEPT)["kept"]
    model = victim_of(run).new_model(derive_seed(run.config["seed"], "classifier"))
    run.fit(
        model,
        training_rows_of(run).take(np.flatnonzero(kept)),
        TrainSettings(**run.config["train"]),
        seed=derive_seed(run.config["seed"], "fine-tune"),
        stage="fine-tune on kept rows",
    )
    save_model(model, run.folder)
    facts = run.facts("kept")
    found = Suspects.load(run.inputs["kept"], facts)
    return {
        **({} if found is None else found.save(run.folder)),
        "measured": {**facts.get("measured", {}), "rows_kept": int(kept.sum())},
    }
