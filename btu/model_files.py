"""The files of a model's folder: which are read, what they say, and what identifies them.

Imports neither torch nor transformers: planning reads folders through this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from btu.errors import UserError

CONFIG = "config.json"
# Formats of weights that are pickles, or that nothing here reads.
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth")
# Suffixes of the small files that `from_pretrained` reads: config, vocabulary, merges, templates.
SMALL = (".json", ".txt", ".model", ".bpe", ".codes", ".jinja", ".spm", ".tiktoken", ".tokenizer")
# Vocabularies, by the names that tokenizers of transformers give them. `tokenizer_config.json`,
# `special_tokens_map.json` and `added_tokens.json` are none: they name a few tokens at most.
_VOCABULARY = re.compile(
    r"tokenizer(\..*)?\.json|tekken\.json|(source_|target_)?vocab[-_a-z]*\.json|byte_maps\.json"
    r"|vocab\.txt|dict\.txt|.*\.(model|spm|tiktoken|codes|tokenizer)"
)
# These tokenizers read bytes or characters, or have their tokens in their code.
_NO_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "EsmcTokenizer", "PerceiverTokenizer")

# Models for texts whose `get_input_embeddings()` is no table with a row for each token. CANINE
# adds hashes of characters; Perceiver's table is inside its preprocessor.
NO_WORD_TABLE = ("canine", "perceiver")
# In these models `n_positions` is what others call `max_position_embeddings`. In T5 it has no
# effect.
_N_POSITIONS = ("ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt")
# RoBERTa and its relatives number positions from the padding token's id plus one.
_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer")
_AFTER_PADDING_TOO = ("data2vec-text", "ibert", "layoutlmv3", "lilt", "luke", "markuplm", "xmod")


# What config.json says ---------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    return _json_object(folder / CONFIG)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not a JSON object ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object, but {type(found).__name__}.")
    return found


def longest_input(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens a row may have; None without a limit, as with relative positions.

    config: the content of ``config.json``.
    """
    if config.get("relative_attention"):
        return None
    kind = str(config.get("model_type"))
    positions = config.get("max_position_embeddings")
    if positions is None and kind in _N_POSITIONS:
        positions = config.get("n_positions")
    if positions is None and isinstance(config.get("text_config"), Mapping):
        return longest_input(config["text_config"])
    # XLNet, which has relative positions, says -1.
    if not _is_count(positions):
        return None
    if kind in _AFTER_PADDING_TOO or any(kin in kind for kin in _AFTER_PADDING):
        pad = config.get("pad_token_id")
        positions -= (pad if pad == 0 or _is_count(pad) else 1) + 1
    return positions


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of word embeddings; None if the config does not say it.

    config: the content of ``config.json``.
    """
    for place in (config, config.get("text_config")):
        if not isinstance(place, Mapping):
            continue
        # XLM and XLNet had names of their own.
        for key in ("vocab_size", "n_words", "n_token"):
            size = place.get(key)
            if _is_count(size):
                return size
    return None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def refuse_redirection(what: str, config: Mapping[str, Any], folder: Path | None = None) -> None:
    """Raise a `UserError` if a model makes transformers load something that is not in its weights.

    what: names the model in messages: "victim folder x".
    config: the content of its ``config.json``.
    folder: with its files; None for a hub model.
    """
    for key, value in _settings(config):
        if key == "transformers_weights" and value is not None:
            raise UserError(
                f"{what}: its config.json names other weights (transformers_weights is {value!r}), "
                "which may be a pickle and are not hashed; remove that key, and save the weights "
                "as model.safetensors."
            )
        if key.lstrip("_") in ("attn_implementation", "experts_implementation") and (
            "/" in json.dumps(value)
        ):
            raise UserError(
                f"{what}: its config.json takes code from the hub ({key} is {value!r}); remove "
                "that key."
            )
    if folder is not None and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{what} has an adapter (adapter_config.json), which names a base model elsewhere; "
            "merge it into the model (merge_and_unload in peft), and save that."
        )
    if folder is not None:
        _refuse_vocabulary_elsewhere(what, folder)


def _refuse_vocabulary_elsewhere(what: str, folder: Path) -> None:
    """Raise a `UserError` if a tokenizer reads a file that is not hashed.

    Tokenizers take paths from their config before those of the folder. Old configs have paths of
    the machine that saved them, which do not exist here.
    """
    path = folder / "tokenizer_config.json"
    for key, value in (_json_object(path) if path.is_file() else {}).items():
        named = key in ("vocab", "merges") or key.endswith("_file")
        if not (named and isinstance(value, str) and os.path.exists(value)):
            continue
        if Path(value).resolve().parent != folder.resolve():
            raise UserError(
                f"{what}: its tokenizer_config.json names a file elsewhere ({key} is {value!r}), "
                "which is not hashed; remove that key, and save the tokenizer there with "
                "save_pretrained."
            )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from _settings(value)


def has_vocabulary(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer can be made from a folder.

    config: the content of its ``config.json``.
    """
    if any(_VOCABULARY.fullmatch(path.name) for path in folder.iterdir()):
        return True
    path = folder / "tokenizer_config.json"
    named = [config, _json_object(path) if path.is_file() else {}]
    classes = {str(place.get("tokenizer_class")).removesuffix("Fast") for place in named}
    return not classes.isdisjoint(_NO_VOCABULARY) or config.get("model_type") == "esmc"


# Weights and identity ----------------------------------------------------------------------------


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """Return the files that ``from_pretrained`` would load from `folder`, if it has any.

    Raises:
        UserError: an index is damaged, or names files elsewhere or of another format.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        *([("pytorch_model.bin", "pytorch_model.bin.index.json")] if allow_pickle else []),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return shards_of(folder / index, Path(single).suffix)
    return []


def shards_of(index: Path, suffix: str = ".safetensors") -> list[Path]:
    """Return the weight files that an index names.

    Raises:
        UserError: it is damaged, or names files elsewhere or with another suffix.
    """
    shards = _json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} is damaged: it names no weight files.")
    for shard in shards.values():
        # transformers reads the format from the suffix: an index of safetensors may name a pickle.
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != suffix:
            raise UserError(
                f"{index} names the weight file {shard!r}; it may name {suffix} files beside it "
                "alone. Save the model again with save_pretrained."
            )
    return [index.with_name(shard) for shard in sorted(set(shards.values()))]


def folder_identity(folder: Path, weights: list[Path], *, code: bool = False) -> str:
    """Return a hash of what is read from a model's folder.

    weights: its weight files.
    code: whether its code runs: ``.py`` files in it and its subfolders then count too.

    The small files are config and tokenizer (`SMALL`). transformers reads none from subfolders,
    but for templates of chats, which have no effect here.
    """
    digest = hashlib.sha256()
    try:
        small = [p for p in sorted(folder.iterdir()) if p.suffix in SMALL and p.is_file()]
        for path in [*weights, *small]:
            digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
        for path in sorted(folder.rglob("*.py")) if code else []:
            name = path.relative_to(folder).as_posix()
            digest.update(f"code\0{name}\0{file_sha256(path)}\0".encode())
    except OSError as error:
        raise UserError(f"model folder {folder} cannot be read: {error}.") from error
    return digest.hexdigest()


def named_identity(model: str) -> str:
    """Return what identifies a model in keys: the hash of a folder's files, or a hub name."""
    folder = Path(model)
    return folder_identity(folder, weight_files(folder)) if folder.is_dir() else model


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    status = path.stat()
    # The time of the last change of the inode cannot be set: it tells a file that was swapped
    # under its old size and time.
    state = (status.st_dev, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)
    return _sha256(path, state)


@cache
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    # The cells of a plan share their models, and a checked file is hashed again for its identity.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
