"""STRIP: texts that mixing hardly affects are rejected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from screens import decisions, own_screens, scores, screen_of, screened_alone
from tiny_cells import Lab

from btu.defenses.base import Given
from btu.defenses.kit.screening import ids_by_row, save_values
from btu.defenses.strip import Strip, donor_words, mixed, screen_texts
from btu.errors import UserError
from btu.findings import Screened
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stages import StageRun, read_record
from btu.training import Encoded
from btu.types import Corpus, Rows
from btu.victims import Victim

SMALL = Strip(copies=4, frr=0.1)
# Long enough that the toy model obeys the trigger, and predicts both classes without it.
OBEYS = TrainSettings(epochs=6, learning_rate=1e-2, batch_size=16, precision="fp32")


@pytest.fixture
def obeys(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3, train=OBEYS)


def test_copies_have_a_share_of_their_words_replaced_and_nothing_else() -> None:
    ids = np.array([101, 5, 6, 7, 8, 102])
    words = [np.array([21, 22, 23])]
    copies = mixed(ids, np.arange(1, 5), words, 3, 0.5, np.random.default_rng(0))
    assert len(copies) == 3
    for copy in copies:
        # Half of 4 places, by the donor's 2 weightiest words; what surrounds the text stays.
        assert sorted(copy[copy != ids]) == [21, 22]
        assert copy[0] == 101
        assert copy[-1] == 102
    assert ids.tolist() == [101, 5, 6, 7, 8, 102]


def test_at_least_one_word_is_replaced_and_an_empty_text_has_none() -> None:
    rng = np.random.default_rng(0)
    (copy,) = mixed(np.array([5]), np.array([0]), [np.array([9])], 1, 0.1, rng)
    assert copy.tolist() == [9]
    (copy,) = mixed(np.array([1, 2]), np.array([], dtype=int), [np.array([9])], 1, 0.9, rng)
    assert copy.tolist() == [1, 2]


def test_the_victims_tokenizer_is_asked_once_what_it_puts_around_texts(
    bert: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    tokenizer = bert.tokenizer

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return tokenizer(*arguments, **options)

    rows = bert.encode(Rows(("a film", "a good film", "bad"), (0, 1, 0)))
    monkeypatch.setattr(bert, "tokenizer", spy)
    words = donor_words(bert, rows)
    assert asked == [("",)]
    # Two, three and one distinct words, without [CLS] and [SEP].
    assert [len(ids) for ids in words] == [len(ids) - 2 for ids in ids_by_row(rows)]


def test_a_short_donor_is_followed_by_another() -> None:
    copies = mixed(np.arange(4), np.arange(4), [np.array([9])], 1, 1.0, np.random.default_rng(0))
    assert copies[0].tolist() == [9, 9, 9, 9]


def test_a_donors_weightiest_words_come_first(bert: Victim) -> None:
    around = bert.tokenizer("")["input_ids"]
    rows = [[10, 11, 11], [10, 12], [10, 12]]
    data = Encoded.from_lists([[around[0], *r, around[1]] for r in rows], [0, 0, 0], 0)
    # 10 is in all 3 rows: weight 1 * (log 1 + 1) = 1; 11 twice in 1 of 3: 2 * (log 3 + 1) = 4.2;
    # 12 once in 2 of 3: log 1.5 + 1 = 1.4.
    assert [ids.tolist() for ids in donor_words(bert, data)] == [[11, 10], [12, 10], [12, 10]]


def test_the_bar_is_the_quantile_of_the_clean_rows(tmp_path: Path) -> None:
    for name in ("clean", "came", "out"):
        (tmp_path / name).mkdir()
    save_values(tmp_path / "clean", entropy=np.arange(101) / 100)
    save_values(tmp_path / "came", entropy=np.array([0.04, 0.05, 0.06]))
    inputs = {"clean entropies": tmp_path / "clean", "entropies": tmp_path / "came"}
    run: Any = StageRun({"frr": 0.05}, {}, inputs, tmp_path / "out", None)  # type: ignore[arg-type]
    # Of 0, 0.01, ... 1 the 5 % quantile is 0.05, and only what is below it goes.
    assert screen_texts(run) == {"bar": pytest.approx(0.05), "turned_away": 1}
    assert Screened.load(tmp_path / "out").accepted.tolist() == [False, True, True]


def test_it_turns_away_more_triggered_rows_than_clean_ones(lab: Lab, obeys: Prepared) -> None:
    found = scores(dataclasses.replace(SMALL, share=0.25), obeys, lab)
    measured = found["measured"]
    assert measured["frr"] <= 0.3
    assert 1 - measured["far"] > measured["frr"]
    # A rejected text is not a hit: ASR is at most the share that is accepted.
    assert found["asr"]["hits"] / found["asr"]["n"] <= measured["far"]


def test_a_higher_frr_turns_away_more_and_computes_no_entropy_again(
    lab: Lab, obeys: Prepared
) -> None:
    few, many = (dataclasses.replace(SMALL, frr=frr) for frr in (0.02, 0.4))
    _, first = decisions(few, obeys, lab)
    _, second = decisions(many, obeys, lab)
    assert first.accepted.sum() > second.accepted.sum()
    assert not (second.accepted & ~first.accepted).any()
    keys = [{stage.key for stage in own_screens(d, obeys)} for d in (few, many)]
    names = {stage.name for stage in own_screens(many, obeys) if stage.key in keys[1] - keys[0]}
    assert names == {"screen (strip)"}


def test_it_screens_before_any_victim(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    texts, found = decisions(Strip(copies=2, frr=0.2), prepared, lab)
    assert len(found.accepted) == len(texts)
    assert found.texts is None
    # Its bar is a quantile of clean rows: some texts go, most stay.
    assert 0.4 < found.accepted.mean() < 1


def test_a_text_is_screened_for_itself(lab: Lab, obeys: Prepared, tmp_path: Path) -> None:
    texts, together = decisions(SMALL, obeys, lab)
    some = [text for text in texts.texts if text][5:25]
    root = lab.root_with(tmp_path, screen_of(SMALL, obeys))
    alone = screened_alone(SMALL, obeys, some, root)
    place = {text: i for i, text in enumerate(texts.texts)}
    assert alone.accepted.tolist() == [bool(together.accepted[place[text]]) for text in some]


def test_the_bar_is_not_taken_on_the_rows_that_give_the_words(lab: Lab, obeys: Prepared) -> None:
    (folder,) = lab.compute(own_screens(SMALL, obeys)[0])
    # 60 clean rows: half of them at most.
    assert read_record(folder)["facts"] == {"rows": 30}


def test_clean_rows_without_words_are_an_error(lab: Lab, tiny_corpus: Corpus) -> None:
    # Zero-width joiners, which are not spaces, and which the tokenizer drops.
    corpus = dataclasses.replace(tiny_corpus, clean=Rows(("\u200d", "\u200d" * 2), (0, 1)))
    prepared = lab.prepare(corpus=corpus)
    with pytest.raises(UserError, match=r"no words to mix with: .*clean rows .* \(1\)"):
        lab.compute(own_screens(SMALL, prepared)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "defense.copies must be at least 1, got 0"),
        ({"share": 1.0}, "defense.share must be above 0 and below 1, got 1.0"),
        ({"frr": 0}, "defense.frr must be above 0 and below 1, got 0"),
        ({"rows": 2.5}, "defense.rows must be a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Strip(**changes)


def test_too_few_clean_rows_are_an_error() -> None:
    with pytest.raises(UserError, match="mixes with others, and the data have 1; raise data"):
        Strip().check(Given(400, 2, 240, 1))
