"""The files in the folders of stages: rows, tables, models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.errors import UserError
from btu.model_files import CONFIG, PICKLES, read_config, refuse_redirection, weight_files
from btu.stages import MODEL, StageRun
from btu.types import Rows, as_bytes, as_texts
from btu.victims import (
    Victim,
    VictimSpec,
    classify_at_last_token,
    find_victim,
    loading,
    quiet_transformers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btu.training import Encoded

TRAIN = "train.parquet"
# The columns of the partners of pairs, by whether the partner is the first text.
PARTNERS = {False: "second text", True: "first text"}


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
    """Write a model as safetensors with its config, without code.

    transformers adds the code of a victim that has some; `model_of` takes it from the victim.
    """
    with quiet_transformers(warnings=True):
        model.save_pretrained(folder / MODEL)
    for code in (folder / MODEL).glob("*.py"):
        code.unlink()
    save_labels(model.config, folder / MODEL)


def save_labels(config: Any, folder: Path) -> None:
    """Add the labels to a saved ``config.json``.

    transformers leaves them out if there are two without names, and reads them back as the number
    that the model's class has by default: three for BART.
    """
    path = folder / CONFIG
    saved = read_config(folder)
    names = {str(index): name for index, name in config.id2label.items()}
    saved |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_of(run: StageRun, role: str) -> PreTrainedModel:
    """Return the model of an input, in fp32 and eval mode, on the CPU.

    Raises:
        UserError: its files are not safetensors, or are damaged; or the code of the victim differs
            from the one that the sweep was planned with.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = run.inputs[role] / MODEL
    refuse_pickles(folder)
    kind: Any = AutoModelForSequenceClassification
    more: dict[str, Any] = {"trust_remote_code": False}
    own: Any = None
    if run.where.get("victim", {}).get("trust_remote_code", False):
        # The classes from the victim, never from the store, which others may write to.
        kind, own = _own_classes(run)
    with loading(lambda error: _damaged(folder, str(error))), quiet_transformers(warnings=True):
        if own is not None:
            more = {"config": own.from_pretrained(folder)}
        model, info = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **more
        )
    for name in sorted(info["missing_keys"]):
        raise _damaged(folder, f"its weights lack {name}")
    found: PreTrainedModel = model.eval()
    classify_at_last_token(found)
    return found


def refuse_pickles(folder: Path) -> None:
    """Raise a `UserError` unless the weights of a stored model are safetensors and nothing else."""
    if not (folder / CONFIG).is_file():
        raise _damaged(folder, "it has no config.json")
    refuse_redirection(f"the stored model {folder}", read_config(folder), folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise _damaged(
                folder, f"{path.name} is not safetensors, and can run code; nothing here wrote it"
            )
    if not weight_files(folder):
        raise _damaged(folder, "it has no model.safetensors")


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the stored model {folder} cannot be loaded: {reason}. If its files are damaged, or not "
        f"those that were written, remove the folder of its result, {folder.parent}: it is "
        "computed again."
    )


def _own_classes(run: StageRun) -> tuple[Any, Any]:
    spec = VictimSpec(**run.where["victim"])
    identity = find_victim(spec).identity
    # An evaluation does not read the victim itself: its config does not name one.
    if "victim" in run.config:
        _refuse_changed_victim(run, spec, identity)
    return _classes_of(spec, identity)


@lru_cache(maxsize=4)
def _classes_of(spec: VictimSpec, identity: str) -> tuple[Any, Any]:
    """Return the classes of model and config of a victim with code of its own.

    identity: of the victim's files, so that other code is loaded again.
    """
    model = Victim(spec, 2).new_model(0)
    return type(model), type(model.config)


def victim_of(run: StageRun, classes: int | None = None) -> Victim:
    """Return the victim of a stage.

    Raises:
        UserError: its files differ from those that the sweep was planned with.
    """
    spec = VictimSpec(**run.where["victim"])
    # Before it is loaded: code that changed must not run.
    _refuse_changed_victim(run, spec, find_victim(spec).identity)
    return load_victim(spec, run.facts("rows")["classes"] if classes is None else classes)


def _refuse_changed_victim(run: StageRun, spec: VictimSpec, identity: str) -> None:
    refuse_changed(f"victim '{spec.name}' is", run.config["victim"]["identity"], identity)


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
    """Write texts, of pairs both, and labels as Parquet."""
    write_table(path, {**text_table(rows), "label": rows.labels})


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote."""
    table = read_table(path)
    return rows_of_table(table, tuple(table["label"].tolist()))


def text_table(rows: Rows) -> dict[str, list[bytes]]:
    """Return the columns of the texts of rows, for `write_table`."""
    columns = {"text": as_bytes(rows.texts)}
    if rows.partners is not None:
        columns[PARTNERS[rows.partner_first]] = as_bytes(rows.partners)
    return columns


def rows_of_table(table: Mapping[str, Any], labels: tuple[int, ...]) -> Rows:
    """Return the rows whose texts `text_table` wrote."""
    texts = as_texts(table["text"])
    for first, name in PARTNERS.items():
        if name in table:
            return Rows(texts, labels, {}, as_texts(table[name]), first)
    return Rows(texts, labels)


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as Parquet; those of texts are bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, pa.binary() if name in ("text", *PARTNERS.values()) else None)
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path)


def read_table(path: Path) -> dict[str, Any]:
    """Return the columns that `write_table` wrote, as arrays."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
