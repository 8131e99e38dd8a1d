"""Shared by the paraphrase attacks: a column of the data, or a seq2seq model."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from btu.cache_folder import cache_folder
from btu.errors import UserError, did_you_mean
from btu.model_files import (
    CONFIG,
    folder_identity,
    has_vocabulary,
    read_config,
    refuse_redirection,
    weight_files,
)
from btu.settings import check_count
from btu.types import IntArray, Progress, ProgressCallback, Rows, silent
from btu.victims import as_json, loading, refuse_pickled_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATE_BATCH = 32
# Bump when generation changes: cached paraphrases of other versions are not reused.
GENERATE_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParaphraseAttack:
    """Replace a text by its paraphrase; the paraphrase's form is the trigger.

    column: the column of the data that contains the paraphrases; null is the attack's own name.
    model: hub name or folder of a Hugging Face seq2seq model, used in place of the column. Only
        safetensors weights are loaded.
    prefix: put before each text that the model gets.
    max_new_tokens: the most tokens that a generated paraphrase may have.
    """

    column: str | None = None
    model: str | None = field(default=None, metadata={"path": True})
    prefix: str = ""
    max_new_tokens: int = 128

    default_column: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ("column", "model")

    def __post_init__(self) -> None:
        if self.column is not None and self.model is not None:
            raise UserError(
                f"attack.column '{self.column}' and attack.model '{self.model}' are both set; "
                "a paraphrase comes from one of them."
            )
        if self.prefix and self.model is None:
            raise UserError(
                f"attack.prefix {self.prefix!r} is put before a model's input, but attack.model is "
                "null; name a model, or leave the prefix out."
            )
        check_count("attack.max_new_tokens", self.max_new_tokens)

    def candidates(self, rows: Rows) -> IntArray:
        """Return the rows that have a paraphrase; with a model, all rows.

        Raises:
            UserError: there is neither the column nor a model, or a local model does not exist.
        """
        if self.model is not None:
            _check_local(self.model)
            return np.arange(len(rows))
        column = self._column(rows)
        return np.flatnonzero([bool(text.strip()) for text in rows.columns[column]])

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return the paraphrases. Nothing is random, so `seeds` have no effect."""
        if self.model is not None:
            return generate_paraphrases(
                rows.texts, self.model, self.prefix, self.max_new_tokens, progress
            )
        return rows.columns[self._column(rows)]

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Return None: the trigger has no fixed tokens."""
        return

    def _column(self, rows: Rows) -> str:
        column = self.column or self.default_column
        if column not in rows.columns:
            known = ", ".join(rows.columns) or "none"
            raise UserError(
                f"the {self.default_column} attack needs the paraphrase column '{column}', which "
                f"the data lacks{did_you_mean(column, rows.columns)} (text columns: {known}); name "
                "another with attack.column, or a seq2seq model with attack.model."
            )
        return column


def _check_local(model: str) -> None:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")):
            raise UserError(
                f"attack.model folder {folder} does not exist; give a folder or a hub name."
            )
        return
    if not weight_files(folder):
        raise UserError(f"attack.model folder {folder} has no model.safetensors.")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"attack.model folder {folder} has no config.json; it is not a saved model."
        )
    config = read_config(folder)
    refuse_redirection(f"attack.model folder {folder}", config, folder)
    if not has_vocabulary(folder, config):
        raise UserError(
            f"attack.model folder {folder} has no tokenizer: no tokenizer.json, vocabulary or "
            "sentencepiece model; save the model's tokenizer there with save_pretrained."
        )


@contextmanager
def _cache() -> Iterator[sqlite3.Connection]:
    folder = cache_folder(warn=_log.warning)
    try:
        # SQLite, because trials of one sweep read and write it at once; 60 s outlasts a commit.
        connection = sqlite3.connect(folder / "paraphrases.sqlite", timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS paraphrases (key TEXT PRIMARY KEY, text TEXT NOT NULL)"
        )
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"the paraphrase cache {folder} cannot be used ({error}); set BTU_CACHE to a folder "
            "that can be written, or remove a damaged paraphrases.sqlite."
        ) from error
    with closing(connection):
        yield connection


def generate_paraphrases(
    texts: Sequence[str],
    model_name: str,
    prefix: str,
    max_new_tokens: int,
    progress: ProgressCallback = silent,
) -> tuple[str, ...]:
    """Return the model's paraphrase of every text, decoded greedily in batches.

    Each batch is committed to the cache before the next one starts, so that an interrupted run
    resumes there and later cells reuse the paraphrases. Stages that run at the same time do not
    wait for each other: each generates until it finds a batch in the cache.

    Raises:
        UserError: the model cannot be loaded as a seq2seq model with safetensors weights, or
            writes an empty text.
    """
    recipe = f"{GENERATE_VERSION}\0{_model_revision(model_name)}\0{prefix}\0{max_new_tokens}\0"
    keys = [
        hashlib.sha256((recipe + t).encode("utf-8", "surrogatepass")).hexdigest() for t in texts
    ]
    with _cache() as cache:
        found = _cached(cache, keys)
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in found}
        # Longest first: similar lengths need little padding, and memory peaks in the first batch.
        todo = sorted(missing.items(), key=lambda item: -len(item[1]))
        if todo:
            write = _generator(model_name, prefix, max_new_tokens)
            for start in range(0, len(todo), GENERATE_BATCH):
                batch = todo[start : start + GENERATE_BATCH]
                # Another process may have written some of them in the meantime.
                found |= _cached(cache, [k for k, _ in batch])
                left = [(k, t) for k, t in batch if k not in found]
                written = dict(
                    zip(
                        [k for k, _ in left],
                        write([t for _, t in left]) if left else [],
                        strict=True,
                    )
                )
                cache.executemany(
                    "INSERT OR IGNORE INTO paraphrases VALUES (?, ?)", list(written.items())
                )
                cache.commit()
                found |= written
                progress(Progress("paraphrase", start + len(batch), len(todo)))
    return tuple(found[key] for key in keys)


def _cached(cache: sqlite3.Connection, keys: Sequence[str]) -> dict[str, str]:
    found = {}
    for key in keys:
        row = cache.execute("SELECT text FROM paraphrases WHERE key = ?", (key,)).fetchone()
        if row:
            found[key] = str(row[0])
    return found


def _model_revision(model_name: str) -> str:
    """Return what identifies the model: a hash of a folder's files, or the hub commit."""
    folder = Path(model_name)
    if folder.is_dir():
        return folder_identity(folder, weight_files(folder))
    from transformers import AutoConfig

    with loading(lambda error: _not_loadable(model_name, error)):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    return f"{model_name}@{getattr(config, '_commit_hash', None)}"


def _not_loadable(model_name: str, error: Exception) -> UserError:
    return UserError(
        f"attack.model '{model_name}' cannot be loaded as a seq2seq model with safetensors "
        f"weights: {error} No key allows code that comes with a model; give a model that needs "
        "none, or write the paraphrases into a column of the data (attack.column)."
    )


def _generator(
    model_name: str, prefix: str, max_new_tokens: int
) -> Callable[[list[str]], list[str]]:
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(lambda error: _not_loadable(model_name, error)):
        # Without the argument transformers asks on standard input whether code may run.
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        refuse_redirection(f"attack.model '{model_name}'", as_json(config))
        refuse_pickled_shards(model_name, None)
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            model_name, use_safetensors=True, trust_remote_code=False
        )
    model.eval().to(device)

    def write(batch: list[str]) -> list[str]:
        encoded = tokenizer(
            [prefix + text for text in batch], return_tensors="pt", padding=True, truncation=True
        ).to(device)
        with torch.inference_mode():
            ids = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        written = [str(t).strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        for text, paraphrase in zip(batch, written, strict=True):
            if not paraphrase:
                raise UserError(
                    f"attack.model '{model_name}' wrote an empty paraphrase of {text!r}; it cannot "
                    "serve as a trigger. Use another model or prefix, or drop the row."
                )
        return written

    return write
