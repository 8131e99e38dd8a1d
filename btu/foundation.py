"""What a defense starts from, and what its stage functions read and write.

Neither the poison mask nor the evaluation rows can be had from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import clean_rows_of, save_model, training_rows_of, victim_of, write_table
from btu.stages import Stage, StageFunction, StageRun, plain, stage
from btu.types import BoolArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = "kept.parquet"


@dataclass(frozen=True)
class Foundation:
    """What a defense can start from. The poison mask and the evaluation rows are not among it.

    rows: the poisoned training rows as the victim reads them (`training_rows_of`, `texts_of`).
    clean: the reserved clean ones (`clean_rows_of`, `tune`). model: the poisoned model. tuned: the
    poisoned model after clean tuning, the control of every defense that ends with it.
    where: where the victim is. train_rows, clean_rows: how many, for estimates. originals: the
    model fine-tuned on the training rows as they were before the poison; only a control that
    declares the need has it.

    A stage that tunes has ``{"rows": rows, "clean": clean}`` among its inputs; whatever does not
    read the clean rows leaves them out, and is then shared by cells that differ in them.
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
    ) -> Stage:
        """Declare a stage of a defense; victim and seed are in its config."""
        acts = {"victim": self.victim, "seed": self.seed, **config}
        return Stage(name, function, acts, inputs, self.where, light, kind, units, model)

    def fine_tune(self, name: str, kept: Stage) -> Stage:
        """Declare a fine-tune as the poisoned one, on the training rows that a stage has kept.

        kept: writes which (`keep_rows`). The same settings and seed as for the undefended model, so
        that a difference between the two comes from the rows.
        """
        return self.stage(
            fine_tune_kept,
            name,
            {"train": plain(self.train)},
            {"rows": self.rows, "kept": kept},
            units=self.train_rows * self.train.epochs,
            kind="cell",
            model=True,
        )

    def tuning_config(self) -> dict[str, Any]:
        """Return the config slice that `tune` reads."""
        settings = self.tuning.applied_to(self.train)
        return {"tuning": plain(settings)}


def tune(run: StageRun, model: PreTrainedModel, stage: str) -> None:
    """Fine-tune `model` in place on the clean rows, the input ``clean``.

    The same rows, settings and seed for whoever calls, so that the undefended control and a
    defended model differ in nothing but the defense.
    """
    run.fit(
        model,
        clean_rows_of(run),
        TrainSettings(**run.config["tuning"]),
        seed=derive_seed(run.config["seed"], "clean tuning"),
        stage=stage,
    )


def keep_rows(run: StageRun, kept: BoolArray) -> None:
    """Write which training rows a defense leaves in, for `Foundation.fine_tune`.

    kept: (training rows,).

    Raises:
        UserError: none is left.
    """
    if not kept.any():
        raise UserError(
            f"the defense removes all {len(kept)} training rows: there is nothing to train on; "
            "loosen its thresholds."
        )
    write_table(run.folder / KEPT, {"kept": kept})


@stage(version=1)
def fine_tune_kept(run: StageRun) -> dict[str, Any]:
    """Fine-tune the victim on the rows that a defense has left in, the input ``kept``.

    Hands on what the defense found (`Suspects.save`) and measured.
    """
    import pyarrow.parquet as pq

    from btu.findings import Suspects

    kept = pq.read_table(run.inputs["kept"] / KEPT)["kept"].to_numpy().astype(bool)
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
