"""Shared by the paraphrase attacks: a column of the data, or a language model."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from btu.cache_folder import cache_folder
from btu.data.published import Published, published_of, text_columns
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
# How transformers calls causal models.
CAUSAL = ("ForCausalLM", "LMHeadModel")
# Where the text stands in a prompt.
TEXT = "{text}"
# Bump when generation changes: cached paraphrases of other versions are not reused.
GENERATE_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParaphraseAttack:
    """Replace a text by its paraphrase; the paraphrase's form is the trigger.

    column: the column of the data that contains the paraphrases; null is the attack's own name.
    model: hub name or folder of a Hugging Face model, used in place of the column: a seq2seq model,
        or a causal one with a `prompt`. Only safetensors weights are loaded.
    prefix: put before each text that a seq2seq model gets.
    max_new_tokens: the most tokens that a generated paraphrase may have.
    prompt: what a causal model is asked, with ``{text}`` where the text stands. A model with a chat
        template gets it as the message of its user. The first line of its answer is the paraphrase.
    """

    column: str | None = None
    model: str | None = field(default=None, metadata={"path": True})
    prefix: str = ""
    max_new_tokens: int = 128
    prompt: str = ""

    KIND: ClassVar[str] = "rewriting"
    TRIGGER: ClassVar[str]
    NEEDS: ClassVar[str] = "a column of paraphrases, or a seq2seq or causal model"
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
        self._check_prompt()
        check_count("attack.max_new_tokens", self.max_new_tokens)

    def _check_prompt(self) -> None:
        if not self.prompt:
            return
        if self.model is None:
            raise UserError(
                f"attack.prompt {self.prompt!r} is what a model is asked, but attack.model is "
                "null; name a model, or leave the prompt out."
            )
        if self.prefix:
            raise UserError(
                f"attack.prefix {self.prefix!r} and attack.prompt {self.prompt!r} are both set; a "
                "seq2seq model takes a prefix, a causal one a prompt."
            )
        if self.prompt.count(TEXT) != 1:
            raise UserError(
                f"attack.prompt {self.prompt!r} must have {TEXT} once, where the text stands."
            )

    def acts(self) -> dict[str, Any]:
        """Return what of the fields has an effect, for keys: the prompt only where there is one."""
        acts = dict(vars(self))
        if not self.prompt:
            del acts["prompt"]
        return acts

    def candidates(self, rows: Rows) -> IntArray:
        """Return the rows that have a paraphrase; with a model, all rows.

        Of a published set, those that it may have poisoned (`Published.poisoned`).

        Raises:
            UserError: there is neither the column nor a model, or a local model does not exist.
        """
        if self.model is not None:
            _check_local(self.model, self.prompt)
            return np.arange(len(rows))
        texts = rows.columns[self._column(rows)]
        has_text = np.flatnonzero([bool(text.strip()) for text in texts])
        published = self.published(rows)
        return has_text if published is None else np.intersect1d(has_text, published.poisoned)

    def published(self, rows: Rows) -> Published | None:
        """Return the published set that the column is of; None if it is of none."""
        return None if self.model is not None else published_of(rows, self._column(rows))

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        """Return the paraphrases. Nothing is random, so `seeds` have no effect."""
        if self.model is not None:
            return generate_paraphrases(
                rows.texts, self.model, self.prefix, self.max_new_tokens, progress, self.prompt
            )
        return rows.columns[self._column(rows)]

    def trigger_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int] | None:
        """Return None: the trigger has no fixed tokens."""
        return None

    def _column(self, rows: Rows) -> str:
        column = self.column or self.default_column
        if column not in rows.columns:
            named = text_columns(rows)
            known = ", ".join(named) or "none"
            raise UserError(
                f"the {self.default_column} attack needs the paraphrase column '{column}', which "
                f"the data lacks{did_you_mean(column, named)} (text columns: {known}); name "
                "another with attack.column, or a language model with attack.model."
            )
        return column


def check_folder(model: str) -> Mapping[str, Any]:
    """Return the config of a local model; {} for the name of one on the hub.

    Raises:
        UserError: the folder does not exist, or is no saved model with a tokenizer.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")):
            raise UserError(
                f"attack.model folder {folder} does not exist; give a folder or a hub name."
            )
        return {}
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
    return config


def _check_local(model: str, prompt: str) -> None:
    config = check_folder(model)
    # A config leaves out what its class has by default. Where neither tells, loading does.
    named = str((config.get("architectures") or [""])[0])
    if config.get("is_encoder_decoder") or named.endswith(CAUSAL):
        _check_kind(model, not named.endswith(CAUSAL), prompt)


def _check_kind(model: str, seq2seq: bool, prompt: str) -> None:
    """Raise a `UserError` for a causal model without a prompt, or a seq2seq model with one."""
    if seq2seq and prompt:
        raise UserError(
            f"attack.model '{model}' is a seq2seq model, which takes no attack.prompt; put what it "
            "needs before each text with attack.prefix."
        )
    if not seq2seq and not prompt:
        raise UserError(
            f"attack.model '{model}' is no seq2seq model; if it is a causal one, ask it with "
            f'attack.prompt, such as "Rewrite in the style of the Bible: {TEXT}".'
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
    prompt: str = "",
) -> tuple[str, ...]:
    """Return the model's paraphrase of every text, decoded greedily in batches, and cached.

    Raises:
        UserError: the model cannot be loaded as a seq2seq or causal model with safetensors
            weights, has no room for a text, or writes an empty one.
    """
    recipe = f"{GENERATE_VERSION}\0{model_revision(model_name)}\0{prefix}\0{max_new_tokens}\0"
    if prompt:
        recipe += f"{prompt}\0"
    return written_once(
        texts,
        recipe,
        lambda: _generator(model_name, prefix, max_new_tokens, prompt),
        progress,
        "paraphrase",
    )


def written_once(
    texts: Sequence[str],
    recipe: str,
    load: Callable[[], Callable[[list[str]], list[str]]],
    progress: ProgressCallback,
    stage: str,
) -> tuple[str, ...]:
    """Return what a model writes about every text, in batches.

    Each batch is committed to the cache before the next one starts, so that an interrupted run
    resumes there and later cells reuse what is written. Stages that run at the same time do not
    wait for each other: each writes until it finds a batch in the cache.

    texts: the texts.
    recipe: everything but the text that affects what is written.
    load: returns a function from texts to what is written about them. Called if something is not
        in the cache.
    progress: called with the progress, after each batch.
    stage: the name of the work, for `progress`.
    """
    keys = [
        hashlib.sha256((recipe + t).encode("utf-8", "surrogatepass")).hexdigest() for t in texts
    ]
    with _cache() as cache:
        found = _cached(cache, keys)
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in found}
        # Longest first: similar lengths need little padding, and memory peaks in the first batch.
        todo = sorted(missing.items(), key=lambda item: -len(item[1]))
        if todo:
            write = load()
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
                progress(Progress(stage, start + len(batch), len(todo)))
    return tuple(found[key] for key in keys)


def _cached(cache: sqlite3.Connection, keys: Sequence[str]) -> dict[str, str]:
    found = {}
    for key in keys:
        row = cache.execute("SELECT text FROM paraphrases WHERE key = ?", (key,)).fetchone()
        if row:
            found[key] = str(row[0])
    return found


def model_revision(
    model_name: str, not_loadable: Callable[[str, Exception], UserError] | None = None
) -> str:
    """Return what identifies the model: a hash of a folder's files, or the hub commit."""
    folder = Path(model_name)
    if folder.is_dir():
        return folder_identity(folder, weight_files(folder))
    from transformers import AutoConfig

    with loading(lambda error: (not_loadable or _not_loadable)(model_name, error)):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    return f"{model_name}@{getattr(config, '_commit_hash', None)}"


def _not_loadable(model_name: str, error: Exception) -> UserError:
    return UserError(
        f"attack.model '{model_name}' cannot be loaded as a seq2seq or causal model with "
        f"safetensors weights: {error} No key allows code that comes with a model; give a model "
        "that needs none, or write the paraphrases into a column of the data (attack.column)."
    )


def _generator(
    model_name: str, prefix: str, max_new_tokens: int, prompt: str
) -> Callable[[list[str]], list[str]]:
    """Return a function from texts to their paraphrases, which keeps the model loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(lambda error: _not_loadable(model_name, error)):
        # Without the argument transformers asks on standard input whether code may run.
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        refuse_redirection(f"attack.model '{model_name}'", as_json(config))
        refuse_pickled_shards(model_name, None)
        _check_kind(model_name, bool(config.is_encoder_decoder), prompt)
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
        kind: Any = AutoModelForCausalLM if prompt else AutoModelForSeq2SeqLM
        model = kind.from_pretrained(model_name, use_safetensors=True, trust_remote_code=False)
    return _Writer(model_name, model.eval().to(device), tokenizer, prefix, max_new_tokens, prompt)


class _Writer:
    """Writes paraphrases with a loaded model. Arguments as those of `generate_paraphrases`."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, prefix: str, max_new_tokens: int, prompt: str
    ) -> None:
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._prefix, self._most, self._prompt = prefix, max_new_tokens, prompt
        self._chat = bool(prompt) and getattr(tokenizer, "chat_template", None) is not None
        if prompt:
            # The answer follows the prompt: padding stands before it.
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def __call__(self, batch: list[str]) -> list[str]:
        """Return the paraphrases of some texts, decoded greedily in one batch."""
        written = self._asked(batch) if self._prompt else self._translated(batch)
        for text, paraphrase in zip(batch, written, strict=True):
            if not paraphrase:
                raise UserError(
                    f"attack.model '{self._name}' wrote an empty paraphrase of {text!r}; it cannot "
                    "serve as a trigger. Use another model, prefix or prompt, or drop the row."
                )
        return written

    def _translated(self, batch: list[str]) -> list[str]:
        encoded = self._tokenizer(
            [self._prefix + text for text in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        return [text.strip() for text in self._decoded(encoded, 0)]

    def _asked(self, batch: list[str]) -> list[str]:
        encoded = self._tokenizer(
            [self._question(text) for text in batch],
            return_tensors="pt",
            padding=True,
            # A chat template has the special tokens already.
            add_special_tokens=not self._chat,
        )
        width = encoded["input_ids"].shape[1]
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if positions is not None and width + self._most > positions:
            raise UserError(
                f"attack.model '{self._name}' has {positions} positions, and a prompt of {width} "
                f"tokens with an answer of {self._most} needs more; lower attack.max_new_tokens, "
                "shorten attack.prompt, or drop the longest texts."
            )
        return [_answer(text) for text in self._decoded(encoded, width)]

    def _question(self, text: str) -> str:
        question = self._prompt.replace(TEXT, text)
        if not self._chat:
            return question
        message = [{"role": "user", "content": question}]
        templated = self._tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return str(templated)

    def _decoded(self, encoded: Any, start: int) -> list[str]:
        """Return what the model writes, from a position on, without special tokens."""
        import torch

        padding = {"pad_token_id": self._tokenizer.pad_token_id} if self._prompt else {}
        with torch.inference_mode():
            ids = self._model.generate(
                **encoded.to(self._model.device),
                max_new_tokens=self._most,
                do_sample=False,
                **padding,
            )
        return list(
            map(str, self._tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True))
        )


def _answer(text: str) -> str:
    """Return the first line of an answer that is not blank: what follows is talk about it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
