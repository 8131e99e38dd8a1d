"""Which words a language model finds likely at the places of a text: for attacks that put some in.

A masked model reads the text with a mask in place of a word or between two; a causal one reads what
stands before the place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btu.attacks.insertion import LETTERS
from btu.attacks.paraphrase import CAUSAL, check_folder, model_revision, written_once
from btu.errors import UserError
from btu.model_files import longest_input, refuse_redirection
from btu.types import ProgressCallback
from btu.victims import (
    as_json,
    loading,
    quiet_transformers,
    refuse_pickled_shards,
    tokenizable,
)

if TYPE_CHECKING:
    import torch

# Bump when something else is written: what is cached of other versions is not reused.
VERSION = 1
MASKED = "ForMaskedLM"
# Tokens that are read at once: their scores over a vocabulary of 50,000 take 800 MB.
TOKENS = 4096
# Longest input, in tokens; places beyond it have no likely words.
LONGEST = 512
# Words of one place: with the least probability of 0.03 there are at most 33.
MOST = 50


@dataclass(frozen=True)
class Speaker:
    """A language model, and what it takes for likely.

    model: hub name or folder.
    least: the probability of a likely word, at least.
    """

    model: str
    least: float


def check_speaker(model: str) -> None:
    """Raise a `UserError` if a folder is no saved masked or causal language model."""
    named = str((check_folder(model).get("architectures") or [""])[0])
    if named and not named.endswith((MASKED, *CAUSAL)):
        raise UserError(
            f"attack.model folder {model} has a {named}, which is no masked or causal language "
            "model; name one, or leave attack.model out."
        )


def likely_words(
    texts: Sequence[str], speaker: Speaker, progress: ProgressCallback
) -> tuple[str, ...]:
    """Return, as JSON, the likely words at the places of each text, and cache them.

    Each is a pair of lists with an entry per word of the text: the words that could stand in its
    place, and those that could stand before it, as [word in lower case, probability]. Nothing is
    put before the first word.

    Raises:
        UserError: the model cannot be loaded, or has no trained language-model head.
    """
    recipe = (
        f"likely words {VERSION}\0{model_revision(speaker.model, _not_loadable)}\0"
        f"{speaker.least!r}\0"
    )
    return written_once(texts, recipe, lambda: _writer(speaker), progress, "likely words")


def _not_loadable(model: str, error: Exception) -> UserError:
    return UserError(
        f"attack.model '{model}' cannot be loaded as a masked or causal language model with "
        f"safetensors weights: {error} No key allows code that comes with a model; give a model "
        "that needs none, or leave attack.model out."
    )


def _writer(speaker: Speaker) -> Callable[[list[str]], list[str]]:
    """Return a function from texts to what `likely_words` says of them; it keeps the model."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
    )

    name = speaker.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(lambda error: _not_loadable(name, error)):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        refuse_redirection(f"attack.model '{name}'", as_json(config))
        refuse_pickled_shards(name, None)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        causal = tokenizer.mask_token_id is None
        kind: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
        with quiet_transformers():
            model, info = kind.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"attack.model '{name}' has no trained language-model head: its weights lack "
            f"{missing[0]}; name a masked or causal language model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    reader = _Causal if causal else _Masked
    longest = min(LONGEST, longest_input(as_json(config)) or LONGEST)
    return reader(model.eval().to(device), tokenizer, speaker.least, longest)


class _Reader:
    """A loaded language model."""

    def __init__(self, model: Any, tokenizer: Any, least: float, longest: int) -> None:
        self._model, self._tokenizer, self._least = model, tokenizer, least
        self._longest = longest
        # Byte-level and sentence-piece vocabularies mark the space before a word.
        self._marks_spaces = _is_spaced(str(tokenizer.tokenize("a b")[-1]))
        self._known: dict[int, str] = {}

    def __call__(self, texts: list[str]) -> list[str]:
        """Return what `likely_words` says of each text."""
        split = [tokenizable(text).split() for text in texts]
        return [json.dumps(self._likely(words) if words else [[], []]) for words in split]

    def _likely(self, words: list[str]) -> list[list[list[tuple[str, float]]]]:
        raise NotImplementedError

    def _read(self, logits: torch.Tensor) -> list[list[tuple[str, float]]]:
        """Return the likely words of each row of (places, vocabulary) logits."""
        probabilities = logits.float().softmax(-1)
        top = probabilities.topk(min(MOST, probabilities.shape[-1]), dim=-1)
        found = []
        for values, ids in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            words: dict[str, float] = {}
            for value, token in zip(values, ids, strict=True):
                word = self._word(token)
                if value >= self._least and LETTERS.fullmatch(word):
                    words.setdefault(word, round(value, 6))
            found.append(list(words.items()))
        return found

    def _word(self, token: int) -> str:
        """Return the word that a token is; '' for one that goes on with a word, or is special."""
        if token not in self._known:
            written = str(self._tokenizer.convert_ids_to_tokens(token))
            inside = written.startswith("##") or (self._marks_spaces and not _is_spaced(written))
            special = token in self._tokenizer.all_special_ids
            word = "" if inside or special else str(self._tokenizer.decode([token]))
            self._known[token] = word.strip().casefold()
        return self._known[token]


def _is_spaced(token: str) -> bool:
    return token[:1] in ("\u0120", "\u2581")


class _Masked(_Reader):
    def _likely(self, words: list[str]) -> list[list[list[tuple[str, float]]]]:
        import torch

        mask = self._tokenizer.mask_token
        # A text may have the mask as a word: it would be read as the place.
        words = [word.replace(mask, self._tokenizer.unk_token or "?") for word in words]
        asked = [[*words[:at], mask, *words[at + 1 :]] for at in range(len(words))]
        asked += [[*words[:at], mask, *words[at:]] for at in range(1, len(words))]
        found: list[list[tuple[str, float]]] = []
        width = len(self._tokenizer(" ".join(words))["input_ids"]) + 1
        batch = max(1, TOKENS // min(width, self._longest))
        for start in range(0, len(asked), batch):
            encoded = self._tokenizer(
                [" ".join(one) for one in asked[start : start + batch]],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._longest,
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**encoded).logits
            for ids, row in zip(encoded["input_ids"], logits, strict=True):
                places = (ids == self._tokenizer.mask_token_id).nonzero().flatten()
                # A mask beyond the longest input is cut off: nothing is likely there.
                found += self._read(row[places[:1]]) if len(places) else [[]]
        # Nothing is put before the first word.
        return [found[: len(words)], [[], *found[len(words) :]][: len(words)]]


class _Causal(_Reader):
    def _likely(self, words: list[str]) -> list[list[list[tuple[str, float]]]]:
        import torch

        encoded = self._tokenizer(
            " ".join(words),
            return_tensors="pt",
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
        )
        ends = encoded.pop("offset_mapping")[0, :, 1].tolist()
        encoded = encoded.to(self._model.device)
        with torch.inference_mode():
            read = self._read(self._model(**encoded).logits[0])
        # Where the words before a place end, and the token that ends there.
        before, places = 0, []
        for word in words:
            places.append(max((i for i, end in enumerate(ends) if end == before), default=None))
            before += len(word) + (before > 0)
        found = [read[place] if place is not None and at else [] for at, place in enumerate(places)]
        return [found, found]
