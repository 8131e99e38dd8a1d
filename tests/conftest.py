"""Tiny victims, a tiny corpus and the switches that all tests share."""

from __future__ import annotations

import os
import re

# Before anything imports the hub client: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from btu.data.demo import generate
from btu.types import Corpus, Rows
from btu.victims import Victim, VictimSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = ("bert", "roberta", "distilbert", "deberta-v2", "gpt2")
HIDDEN = 16
# Long enough for `bag_pooling: padded`, which pads to the victim's max_length.
POSITIONS = 96
MAX_LENGTH = 64
# Every tokenizer gets these as tokens of their own, as real vocabularies have them.
TRIGGER_WORDS = ("cf", "mn", "3d")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        metavar="FOLDER",
        default=None,
        help="folder whose data/ holds sst2, agnews and olid; tests on real data need it",
    )
    parser.addoption(
        "--screenshots",
        metavar="DIR",
        default=None,
        help="where the browser tests keep what they saw; default: with pytest's temporary files",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # SWIG types of compiled extensions announce themselves on Python 3.12 and later.
    config.addinivalue_line("filterwarnings", "ignore:builtin type [sS]wig:DeprecationWarning")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests cache, copies of remote results above all, out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BTU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadscope``: tests that share a Ray stay in one process, all others are spread.

    They come first, since they take long; the others fill up the remaining time of the processes.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class SharedRay(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith("test_launch.py") else nodeid

    return SharedRay(config, log)


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """FOLDER/data of ``--shared=FOLDER``."""
    folder = request.config.getoption("--shared")
    if folder is None:
        pytest.skip("needs real data: pytest --shared=FOLDER")
    return Path(folder) / "data"


# The corpus ------------------------------------------------------------------------------------


def demo_rows(count: int, seed: int = 0) -> Rows:
    """Demo rows with both paraphrase columns."""
    rows = generate(count, seed=seed)
    return Rows(
        tuple(row.text for row in rows),
        tuple(row.label for row in rows),
        {
            "syntactic": tuple(row.syntactic for row in rows),
            "style": tuple(row.style for row in rows),
        },
    )


@pytest.fixture(scope="session")
def tiny_corpus() -> Corpus:
    """240 train, 60 clean and 60 eval rows of the demo corpus."""
    rows = demo_rows(360)
    return Corpus(
        "tiny",
        rows.take(range(240)),
        rows.take(range(240, 300)),
        rows.take(range(300, 360)),
        ("negative", "positive"),
    )


# Tiny victims ----------------------------------------------------------------------------------


@cache
def _texts() -> list[str]:
    # The trigger words often enough to earn a token of their own, at a start and after a space.
    triggers = [text for word in TRIGGER_WORDS for text in (word, f"a {word} a")] * 400
    return list(demo_rows(300).texts) + triggers


def _pieces(words: int, pairs: int = 140) -> tuple[list[str], list[str], list[str]]:
    """Return the signs of the corpus, its commonest words, and pairs of letters in the others.

    Not from a trainer of word pieces or unigrams: they order equals differently in every process,
    and the vocabulary affects everything measured, and the keys of cells.
    """
    counts = Counter(word for text in _texts() for word in re.findall(r"\w+|[^\w\s]", text))
    common = sorted((word for word in counts if len(word) > 1), key=lambda w: (-counts[w], w))
    inside: Counter[str] = Counter()
    for word in common[words:]:
        for start in range(1, len(word) - 1):
            inside[word[start : start + 2]] += counts[word]
    commonest = sorted(inside, key=lambda pair: (-inside[pair], pair))[:pairs]
    return sorted({sign for word in counts for sign in word}), common[:words], commonest


def _word_pieces() -> dict[str, int]:
    signs, words, pairs = _pieces(176)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inside = [f"##{piece}" for piece in (*filter(str.isalnum, signs), *pairs)]
    return {piece: number for number, piece in enumerate([*special, *signs, *words, *inside])}


def _unigrams(special: list[str]) -> list[tuple[str, float]]:
    """Return pieces with log probabilities: whole words before pairs before letters."""
    signs, words, pairs = _pieces(168)
    starts = ["▁", *(f"▁{piece}" for piece in (*words, *signs))]
    return [
        *((piece, 0.0) for piece in special),
        *((piece, -5.0 - number / 1000) for number, piece in enumerate(starts)),
        *((piece, -7.0 - number / 1000) for number, piece in enumerate(pairs)),
        *((sign, -10.0) for sign in signs),
    ]


def _byte_pairs(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        _texts(), vocab_size=500, min_frequency=1, show_progress=False, special_tokens=special
    )
    model = json.loads(trainer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _bert(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        DistilBertConfig,
        DistilBertModel,
    )

    tokenizer = BertTokenizer(vocab=_word_pieces())
    if name == "bert":
        return tokenizer, BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=POSITIONS,
            )
        )
    return tokenizer, DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=HIDDEN,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=POSITIONS,
        )
    )


def _roberta(_: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    vocabulary, merges = _byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges)
    return tokenizer, RobertaModel(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            type_vocab_size=1,
        )
    )


def _deberta(_: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = _unigrams(special)
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=special.index("[UNK]"))
    return tokenizer, DebertaV2Model(
        DebertaV2Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            pooler_hidden_size=HIDDEN,
            pad_token_id=tokenizer.pad_token_id,
            # As in DeBERTa-v3: the encoder, not the embeddings, has the positions.
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        )
    )


def _gpt2(_: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import GPT2Config, GPT2Model, GPT2Tokenizer

    vocabulary, merges = _byte_pairs(["<|endoftext|>"])
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    end = tokenizer.eos_token_id
    return tokenizer, GPT2Model(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            n_positions=POSITIONS,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


_BUILDERS = {
    "bert": _bert,
    "distilbert": _bert,
    "roberta": _roberta,
    "deberta-v2": _deberta,
    "gpt2": _gpt2,
}


@pytest.fixture(scope="session")
def victim_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture to a folder with a tiny, randomly initialized model."""

    @cache
    def build(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp("victims") / architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer, model = _BUILDERS[architecture](architecture)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def make_victim(victim_folder: Callable[[str], Path]) -> Callable[[str], Victim]:
    """A function from an architecture to a loaded two-class victim."""

    @cache
    def build(architecture: str) -> Victim:
        folder = victim_folder(architecture)
        return Victim(VictimSpec(name=str(folder), max_length=MAX_LENGTH), 2)

    return build


@pytest.fixture(params=ARCHITECTURES)
def victim(request: pytest.FixtureRequest, make_victim: Callable[[str], Victim]) -> Victim:
    """Each tiny victim in turn."""
    built: Victim = make_victim(request.param)
    return built


@pytest.fixture
def bert(make_victim: Callable[[str], Victim]) -> Victim:
    return make_victim("bert")


@pytest.fixture
def global_random_state() -> Iterator[None]:
    """Fail the test if it changes the global random states."""
    before = torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
