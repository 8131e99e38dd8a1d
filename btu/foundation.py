"""What a defense starts from, and what its stage functions read and write.

Neither the poison mask nor the evaluation rows can be had from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.errors import UserError
from btu.seeding import derive_seed
from btu.settings import TrainSettings, TuningSettings
from btu.stages import MODEL, Stage, StageFunction, StageRun, plain, stage
from btu.types import BoolArray, Rows, as_bytes, as_texts
from btu.victims import Victim, VictimSpec, find_victim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btu.training import Encoded

TRAIN = "train.parquet"
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

    from btu.defense import Suspects

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


def training_rows_of(run: StageRun) -> Encoded:
    """Return the poisoned training rows, tokenized."""
    return load_encoded(run.inputs["rows"] / "train.safetensors")


def clean_rows_of(run: StageRun) -> Encoded:
    """Return the reserved clean rows, tokenized."""
    return load_encoded(run.inputs["clean"] / "clean.safetensors")


def texts_of(run: StageRun) -> Rows:
    """Return the poisoned training rows as texts and labels.

    Paraphrase columns are not there: one that equals the text would give the poison away.
    """
    return read_rows(run.inputs["rows"] / TRAIN)


def load_encoded(path: Path) -> Encoded:
    """Read tokenized rows."""
    from btu.training import Encoded

    return Encoded.load(path)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as safetensors with its config, loadable by ``from_pretrained``."""
    with _no_progress_bar():
        model.save_pretrained(folder / MODEL)


def model_of(run: StageRun, role: str) -> PreTrainedModel:
    """Return the model of an input, in fp32 and eval mode, on the CPU."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with _no_progress_bar():
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            run.inputs[role] / MODEL,
            dtype=torch.float32,
            trust_remote_code=run.where.get("victim", {}).get("trust_remote_code", False),
        )
    return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def victim_of(run: StageRun, classes: int | None = None) -> Victim:
    """Return the victim, checked to be the one that was planned with.

    Raises:
        UserError: its files differ from those that the key was made of.
    """
    if classes is None:
        classes = run.facts("rows")["classes"]
    victim = load_victim(VictimSpec(**run.where["victim"]), classes)
    planned = run.config["victim"]["identity"]
    if victim.source.identity != planned:
        raise UserError(
            f"victim '{victim.spec.name}' is {victim.source.identity[:20]} here, but the sweep was "
            f"planned with {planned[:20]}: its files changed, or differ between nodes; launch "
            "again with --retry-failed, with the same files everywhere."
        )
    return victim


def load_victim(spec: VictimSpec, classes: int) -> Victim:
    """Return a victim, loaded once per process for as long as its files stay the same."""
    return _victim(spec, classes, find_victim(spec).identity)


# A worker computes many stages of few victims; the tokenizer is loaded once.
@lru_cache(maxsize=4)
def _victim(spec: VictimSpec, classes: int, identity: str) -> Victim:
    return Victim(spec, classes)


def write_rows(path: Path, rows: Rows) -> None:
    """Write texts and labels as Parquet."""
    write_table(path, {"text": as_bytes(rows.texts), "label": rows.labels})


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return Rows(as_texts(table["text"].to_pylist()), tuple(table["label"].to_pylist()))


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, pa.binary() if name == "text" else None)
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path)
