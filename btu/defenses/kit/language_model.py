"""Language models that score the words of a text: named ones, and one trained on clean rows."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from btu.errors import UserError
from btu.model_files import longest_input, refuse_redirection
from btu.settings import TrainSettings
from btu.training import Encoded
from btu.types import FloatArray, IntArray
from btu.victims import (
    Victim,
    VictimSource,
    as_json,
    loading,
    quiet_transformers,
    refuse_pickled_shards,
    tokenizable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btu.stages import StageRun

# Longest input of a named model, in its tokens; words beyond it are not scored.
LONGEST = 512
# Tokens, including padding, whose scores over the vocabulary are in memory at once.
HEAD_TOKENS = 2048
# Texts that are tokenized at once to see how far they are read, and shortened texts (one per word)
# that are scored at once: all of them would take many gigabytes.
TEXTS, SHORTENED = 1024, 8192
# Offset beyond all token ids that marks a masked token; its id stays available to the scorer.
MASKED = 1 << 24
# Words are separated by whitespace, as in `str.split`.
WORD = re.compile(r"\S+")


class TiedModel(nn.Module):
    """An encoder or decoder with a language-model head tied to its word embeddings.

    bias: (vocabulary,), the head's only own parameter.
    """

    def __init__(self, encoder: Any, vocabulary: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        """Return the (places, vocabulary) logits at the (batch, width) mask `where`."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state[where]
        logits: Tensor = hidden @ self.encoder.get_input_embeddings().weight.T + self.bias
        return logits.float()


class NamedModel(nn.Module):
    """A Hugging Face language model with the interface of `TiedModel`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        """Return the (places, vocabulary) logits at the (batch, width) mask `where`."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits[where]
        return logits.float()


class Scorer:
    """Scores words by how badly they fit their text.

    model: a `TiedModel` or a `NamedModel`.
    tokenizer: with a mask token for a masked model, without one for a causal model.
    longest: tokens of the longest input.
    spacing: every ``spacing``-th word is masked in the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        spacing: int,
        precision: str,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} of defense.lm does not report which "
                "token belongs to which word; use a model with a fast tokenizer."
            )
        self._model, self._tokenizer, self._longest = model, tokenizer, longest
        self._spacing, self._precision = spacing, precision

    def scores(self, run: StageRun, texts: Sequence[str], stage: str) -> list[FloatArray]:
        """Return a score per word for each text: higher fits worse, NaN was not read.

        Words are separated as by `str.split`. The score of a masked model is the surprise, -log p
        in nats, of the word's most surprising token while the word is masked. That of a causal
        model is the perplexity of the text minus that of the text without the word.
        """
        texts = [tokenizable(text) for text in texts]
        if self._tokenizer.mask_token_id is not None:
            return self._surprises(run, texts, stage)
        return self._perplexity_drops(run, texts, stage)

    def perplexities(
        self, run: StageRun, texts: Sequence[str], stage: str, of: tuple[int, int] = (0, 1)
    ) -> FloatArray:
        """Return the perplexity of each text, as far as it is read: (texts,).

        It is e to the mean of -log p of the tokens. Of a causal model, p is the probability after
        the tokens before; of a masked model, that of a token while its word is masked, with every
        ``spacing``-th word masked in the same pass (a pseudo-perplexity: Salazar et al., ACL 2020).
        NaN for a text without a token.

        of: the number of this pass and the number of passes, for progress.
        """
        texts = [tokenizable(text) for text in texts]
        found = np.full(len(texts), np.nan)
        if self._tokenizer.mask_token_id is not None:
            for number, (_, surprise) in enumerate(self._token_surprises(run, texts, stage, of)):
                if len(surprise):
                    found[number] = np.exp(surprise.mean())
            return found
        start = _start_token(self._tokenizer)
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._longest - 1)
        rows = [begun(ids, start) for ids in encoded["input_ids"]]
        read = [number for number, ids in enumerate(rows) if len(ids) > 1]
        if read:
            data = self._encoded([rows[number] for number in read])
            loss = run.in_batches(
                self._model, data, self._loss, precision=self._precision, stage=stage, of=of
            )
            found[read] = np.exp(loss.astype(np.float64))
        return found

    def _surprises(self, run: StageRun, texts: Sequence[str], stage: str) -> list[FloatArray]:
        found = [np.full(len(WORD.findall(text)), np.nan) for text in texts]
        tokens = self._token_surprises(run, texts, stage, (0, 1))
        for scores, (word_of, surprise) in zip(found, tokens, strict=True):
            np.fmax.at(scores, word_of, surprise)
        return found

    def _token_surprises(
        self, run: StageRun, texts: Sequence[str], stage: str, of: tuple[int, int]
    ) -> list[tuple[IntArray, FloatArray]]:
        """Return the word of each token of a text's words, and its -log p while that is masked.

        Two arrays (tokens of words,) for each text.
        """
        encoded = self._tokenizer(
            list(texts), truncation=True, max_length=self._longest, return_offsets_mapping=True
        )
        words, found, rows, sources = [], [], [], []
        for number, text in enumerate(texts):
            ids = np.array(encoded["input_ids"][number], dtype=np.int64)
            word_of = words_of_tokens(text, encoded["offset_mapping"][number])
            words.append(word_of)
            found.append(np.full(len(word_of), np.nan))
            for first in range(min(self._spacing, word_of.max(initial=-1) + 1)):
                masked = (word_of >= 0) & (word_of % self._spacing == first)
                if masked.any():
                    rows.append(np.where(masked, ids + MASKED, ids).tolist())
                    sources.append((number, np.flatnonzero(masked)))
        if rows:
            data = self._encoded(rows)
            width = int(data.host_lengths.max())
            surprise = run.in_batches(
                self._model,
                data,
                lambda ids, mask: self._surprise(ids, mask, width),
                precision=self._precision,
                stage=stage,
                of=of,
            )
            for (number, places), values in zip(sources, surprise, strict=True):
                found[number][places] = values[places].astype(np.float64)
        # Tokens around a text belong to no word, and were never masked.
        return [
            (word_of[word_of >= 0], scores[word_of >= 0])
            for word_of, scores in zip(words, found, strict=True)
        ]

    def _surprise(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """Return -log p of every masked token, 0 elsewhere: (batch, width)."""
        masked = ids >= MASKED
        real = ids % MASKED
        shown = torch.where(masked, self._tokenizer.mask_token_id, real)
        found = torch.zeros(len(ids), width, device=ids.device)
        for part in _parts(ids):
            logits = self._model(shown[part], mask[part], masked[part])
            loss = nn.functional.cross_entropy(logits, real[part][masked[part]], reduction="none")
            found[part, : ids.shape[1]][masked[part]] = loss
        return found

    def _perplexity_drops(
        self, run: StageRun, texts: Sequence[str], stage: str
    ) -> list[FloatArray]:
        split = [text.split() for text in texts]
        found = [np.full(len(words), np.nan) for words in split]
        # A single word cannot be removed.
        read = [
            count if len(words) > 1 else 0
            for words, count in zip(split, self._words_read(split), strict=True)
        ]
        scored = [number for number, count in enumerate(read) if count]
        sizes = np.array([read[number] + 1 for number in scored], dtype=np.int64)
        blocks = np.split(scored, np.flatnonzero(np.diff(np.cumsum(sizes) // SHORTENED)) + 1)
        start = _start_token(self._tokenizer)
        for done, block in enumerate(blocks if scored else []):
            texts_of_block = [
                " ".join(split[number][:skip] + split[number][skip + 1 :])
                for number in block
                # The last entry is the whole text.
                for skip in (len(split[number]), *range(read[number]))
            ]
            encoded = self._tokenizer(texts_of_block, truncation=True, max_length=self._longest - 1)
            loss = run.in_batches(
                self._model,
                self._encoded([begun(ids, start) for ids in encoded["input_ids"]]),
                self._loss,
                precision=self._precision,
                stage=stage,
                of=(done, len(blocks)),
            )
            perplexity, at = np.exp(loss.astype(np.float64)), 0
            for number in block:
                count = read[number]
                found[number][:count] = perplexity[at] - perplexity[at + 1 : at + 1 + count]
                at += 1 + count
        return found

    def _words_read(self, split: Sequence[list[str]]) -> list[int]:
        """Return how many leading words of each text a causal model reads."""
        read = []
        for first in range(0, len(split), TEXTS):
            part = [" ".join(words) for words in split[first : first + TEXTS]]
            encoded = self._tokenizer(
                part, truncation=True, max_length=self._longest - 1, return_offsets_mapping=True
            )
            read += [
                int(words_of_tokens(text, offsets).max(initial=-1)) + 1
                for text, offsets in zip(part, encoded["offset_mapping"], strict=True)
            ]
        return read

    def _loss(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean -log p of each row's tokens after the first: (batch,)."""
        found = []
        for part in _parts(ids):
            loss, where = next_token_losses(self._model, ids[part], mask[part])
            row = where.nonzero()[:, 0]
            total = torch.zeros(len(where), device=ids.device).index_add(0, row, loss)
            found.append(total / where.sum(1).clamp(min=1))
        return torch.cat(found)

    def _encoded(self, rows: list[list[int]]) -> Encoded:
        return Encoded.from_lists(rows, [0] * len(rows), int(self._tokenizer.pad_token_id or 0))


def begun(ids: list[int], start: int) -> list[int]:
    """Return a text's tokens after `start`, which some tokenizers add themselves."""
    return ids if ids[:1] == [start] else [start, *ids]


def next_token_losses(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p of every token after the first, (places,), and the (batch, width) places.

    A place is a position that predicts the next token.
    """
    where = torch.zeros_like(mask)
    where[:, :-1] = mask[:, 1:]
    logits = model(ids, mask, where)
    loss = nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]], reduction="none")
    return loss, where


def words_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the index of each token's word, -1 for none: (tokens,)."""
    spans = [match.span() for match in WORD.finditer(text)]
    starts = [start for start, _ in spans]
    found = np.full(len(offsets), -1, dtype=np.int64)
    for token, (start, end) in enumerate(offsets):
        if start == end:
            continue
        word = bisect_right(starts, end - 1) - 1
        # A token may be the space before a word.
        if word < 0 or spans[word][1] < end:
            word += 1
        if word < len(spans):
            found[token] = word
    return found


def _parts(ids: Tensor) -> Iterator[slice]:
    """Split a (batch, width) batch into parts that the head can process at once."""
    rows = max(1, HEAD_TOKENS // ids.shape[1])
    return (slice(start, start + rows) for start in range(0, len(ids), rows))


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "the tokenizer of defense.lm has neither a start-of-text nor an end-of-text token; "
        "use another model."
    )


# A model trained on the clean rows ----------------------------------------------------------------


def new_tied(victim: Victim, seed: int) -> TiedModel:
    """Return the victim's pretrained body with an untrained tied head.

    Raises:
        UserError: its word embeddings are not as wide as its hidden states.
    """
    body = victim.new_model(seed).base_model
    vocabulary, wide = body.get_input_embeddings().weight.shape
    if wide != body.config.hidden_size:
        raise UserError(
            f"victim '{victim.spec.name}' has word embeddings of width {wide} under hidden states "
            f"of {body.config.hidden_size}: no head can be tied to them; name a language model "
            "with defense.lm."
        )
    return TiedModel(body, vocabulary)


def fit_tied(
    run: StageRun, victim: Victim, model: TiedModel, rows: Encoded, masked_share: float, seed: int
) -> None:
    """Train a language model on clean rows, in place, with the settings in ``config['train']``.

    A victim with a mask token learns to fill in `masked_share` of each row's tokens; a victim
    without one learns to predict the next token. The accuracy in the history is the share of rows
    in which most predictions are right.
    """
    tokenizer = victim.tokenizer
    if tokenizer.mask_token_id is None:
        rows = _started(rows, _start_token(tokenizer), victim.spec.max_length)
    counts = rows.counts(len(model.bias)) + 0.01
    with torch.no_grad():
        # The bias starts at the log frequencies of the tokens.
        model.bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    around = torch.tensor(sorted(set(tokenizer("")["input_ids"])), dtype=torch.int64)

    def fill_in(
        model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        content = mask & ~torch.isin(ids, around.to(ids.device))
        drawn = (torch.rand(ids.shape, device=ids.device) < masked_share) & content
        # A row without a masked token would be skipped.
        first = content & (content.cumsum(1) == 1)
        drawn |= first & ~drawn.any(1, keepdim=True)
        logits = model(torch.where(drawn, tokenizer.mask_token_id, ids), mask, drawn)
        loss = nn.functional.cross_entropy(logits, ids[drawn])
        return loss, _guessed(logits.detach().argmax(1) == ids[drawn], drawn, labels)

    def go_on(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, where = next_token_losses(model, ids, mask)
        # A loss below log 2 means that the right token had a probability above 0.5.
        return losses.mean(), _guessed(losses.detach() < np.log(2), where, labels)

    run.fit(
        model,
        rows,
        TrainSettings(**run.config["train"]),
        seed=seed,
        stage="language model",
        objective=go_on if tokenizer.mask_token_id is None else fill_in,
    )


def _guessed(right: Tensor, where: Tensor, labels: Tensor) -> Tensor:
    """Return logits that predict the label exactly in rows with most predictions right."""
    score = torch.zeros(len(where), device=where.device)
    score.index_add_(0, where.nonzero()[:, 0], right.float() - 0.5)
    logits = torch.zeros(len(where), int(labels.max()) + 2, device=where.device)
    logits[torch.arange(len(where), device=where.device), labels] = score
    return logits


def _started(rows: Encoded, start: int, longest: int) -> Encoded:
    split = np.split(rows.ids.numpy(), np.cumsum(rows.host_lengths)[:-1])
    ids = [begun(row.tolist(), start)[:longest] for row in split]
    return Encoded.from_lists(ids, rows.labels.tolist(), rows.pad_id)


# Named models ------------------------------------------------------------------------------------


def load_named(
    source: VictimSource, revision: str | None
) -> tuple[NamedModel, PreTrainedTokenizerBase, int]:
    """Return a language model, its tokenizer, and the tokens of its longest input.

    Raises:
        UserError: the model cannot be loaded, or has no trained language-model head.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
    )

    # Without `trust_remote_code` transformers asks on standard input whether code may run.
    options = {"revision": revision, "trust_remote_code": False}
    with loading(lambda error: _not_loadable(source.location, error)):
        config = as_json(AutoConfig.from_pretrained(source.location, **options))
        refuse_redirection(f"defense.lm {source.location}", config)
        refuse_pickled_shards(source.location, revision)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        kind = AutoModelForCausalLM if tokenizer.mask_token_id is None else AutoModelForMaskedLM
        with quiet_transformers():
            model, info = kind.from_pretrained(
                source.location,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"defense.lm {source.location} has no trained language-model head: its weights lack "
            f"{missing[0]}; name a causal or masked language model, or 'clean-rows'."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = longest_input(config)
    return NamedModel(model), tokenizer, min(LONGEST, longest or LONGEST)


def _not_loadable(location: str, error: Exception) -> UserError:
    return UserError(
        f"defense.lm cannot be loaded from {location}: {error} Only safetensors weights are "
        "loaded, and no key allows code that comes with a model; give a model that needs none, or "
        "'clean-rows'."
    )


def save_tied(model: TiedModel, folder: Path) -> None:
    """Write a tied model's weights into a stage's ``model/``."""
    from safetensors.torch import save_file

    from btu.stages import MODEL

    (folder / MODEL).mkdir()
    state = {name: value.contiguous() for name, value in model.cpu().state_dict().items()}
    save_file(state, folder / MODEL / "language_model.safetensors")


def load_tied(victim: Victim, folder: Path) -> TiedModel:
    """Read what `save_tied` wrote."""
    from safetensors.torch import load_file

    from btu.stages import MODEL

    model = new_tied(victim, 0)
    model.load_state_dict(load_file(folder / MODEL / "language_model.safetensors"))
    return model.eval()
