"""The files in the folders of stages: rows, tables, models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.errors import UserError
from btu.stages import MODEL, StageRun
from btu.types import Rows, as_bytes, as_texts
from btu.victims import Victim, VictimSpec, find_victim, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btu.training import Encoded

TRAIN = "train.parquet"


def training_rows_of(run: StageRun) -> Encoded:
    """Return the poisoned training rows, tokenized."""
    return load_encoded(run.inputs["rows"] / "train.safetensors")


def clean_rows_of(run: StageRun) -> Encoded:
    """Return the reserved clean rows, tokenized."""
    return load_encoded(run.inputs["clean"] / "clean.safetensors")


def texts_of(run: StageRun) -> Rows:
    """Return the poisoned training rows as texts and labels.

    Without paraphrase columns: a column that equals the text would reveal a poisoned row.
    """
    return read_rows(run.inputs["rows"] / TRAIN)


def load_encoded(path: Path) -> Encoded:
    """Read tokenized rows."""
    from btu.training import Encoded

    return Encoded.load(path)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as safetensors with its config, loadable by ``from_pretrained``."""
    with quiet_transformers(warnings=True):
        model.save_pretrained(folder / MODEL)


def model_of(run: StageRun, role: str) -> PreTrainedModel:
    """Return the model of an input, in fp32 and eval mode, on the CPU."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers(warnings=True):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            run.inputs[role] / MODEL,
            dtype=torch.float32,
            trust_remote_code=run.where.get("victim", {}).get("trust_remote_code", False),
        )
    return model.eval()


def victim_of(run: StageRun, classes: int | None = None) -> Victim:
    """Return the victim of a stage.

    Raises:
        UserError: its files differ from those that the sweep was planned with.
    """
    if classes is None:
        classes = run.facts("rows")["classes"]
    victim = load_victim(VictimSpec(**run.where["victim"]), classes)
    planned = run.config["victim"]["identity"]
    refuse_changed(f"victim '{victim.spec.name}' is", planned, victim.source.identity)
    return victim


def refuse_changed(what: str, planned: str, found: str) -> None:
    """Raise a `UserError` unless files have the fingerprint that the sweep was planned with.

    what: the start of a sentence that ends with the fingerprint found: "victim 'x' is".
    """
    if found != planned:
        raise UserError(
            f"{what} {found[:20]} here, but the sweep was planned with {planned[:20]}: its files "
            "changed, or differ between nodes; launch again with --retry-failed, with the same "
            "files everywhere."
        )


def load_victim(spec: VictimSpec, classes: int) -> Victim:
    """Return a victim, loaded once per process while its files stay the same."""
    return _victim(spec, classes, find_victim(spec).identity)


# A worker computes many stages with few victims: load each tokenizer once.
@lru_cache(maxsize=4)
def _victim(spec: VictimSpec, classes: int, identity: str) -> Victim:
    return Victim(spec, classes)


def write_rows(path: Path, rows: Rows) -> None:
    """Write texts and labels as Parquet."""
    write_table(path, {"text": as_bytes(rows.texts), "label": rows.labels})


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote."""
    table = read_table(path)
    return Rows(as_texts(table["text"]), tuple(table["label"].tolist()))


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as Parquet; those of the column ``text`` are bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, pa.binary() if name == "text" else None)
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path)


def read_table(path: Path) -> dict[str, Any]:
    """Return the columns that `write_table` wrote, as arrays."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
