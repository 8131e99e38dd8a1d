"""The second stage of BTU: its gate, the rows that it takes, and what it does to a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defending import CPU, RULED, defend
from tiny_cells import Lab, easy_corpus

from btu.attacked import mask_of
from btu.defenses.base import Given
from btu.defenses.cuts import RandomCut
from btu.defenses.kit import cutting
from btu.defenses.kit.contradiction import (
    GATE,
    SHIFT,
    epochs_for,
    halves_of,
    oddness,
    shift_of,
    suspected_class,
)
from btu.defenses.kit.cutting import Costs
from btu.defenses.token_unlearning import TokenUnlearning
from btu.errors import UserError
from btu.evaluation import EvalSet, evaluate
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stage_files import load_encoded
from btu.stages import compute, read_record
from btu.training import Encoded
from btu.types import BoolArray, Corpus, FloatArray, IntArray, Rows

SETTINGS = {"strength": 0.03, "folds": 5, "least_rows": 3}


# The gate ----------------------------------------------------------------------------------------


def rows_of(*counts: tuple[int, int]) -> tuple[FloatArray, IntArray]:
    """Contradicted or not, and labels, of as many (contradicted, other) rows of each class."""
    wrong = np.concatenate([np.repeat([1.0, 0.0], both) for both in counts])
    labels = np.repeat(np.arange(len(counts)), [sum(both) for both in counts])
    return wrong, labels


def gate(train: list[tuple[int, int]], clean: list[tuple[int, int]]) -> tuple[Any, float, float]:
    wrong_clean, clean_labels = rows_of(*clean)
    return suspected_class(*rows_of(*train), wrong_clean.astype(bool), clean_labels)


# Of 1,000 clean rows of each class 150 are contradicted.
CLEAN = [(150, 850), (150, 850)]


def test_equal_shares_are_no_evidence() -> None:
    label, margin, expected = gate([(450, 2550), (450, 2550)], CLEAN)
    assert label in (0, 1)
    assert margin == pytest.approx(0, abs=1e-9)
    assert expected == 0.15


def test_a_class_that_is_contradicted_more_often_is_the_target() -> None:
    label, margin, expected = gate([(450, 2550), (900, 2100)], CLEAN)
    assert (label, expected) == (1, 0.15)
    # 0.3 - 0.15 = 0.15. Pooled with half a row of each kind: 1051 / 4002 = 0.2626 in class 1 and
    # 601 / 4002 = 0.1502 in class 0. Variances: 0.2626 * 0.7374 * (1 / 3000 + 1 / 1000) = 2.582e-4
    # and 0.1502 * 0.8498 * (1 / 750) = 1.702e-4. The lower margin is that over the other class:
    # 0.15 / sqrt(2.582e-4 + 1.702e-4) = 7.25; over its own clean rows it is 9.34.
    assert margin == pytest.approx(7.25, abs=0.01)


def test_rows_that_are_contradicted_alike_in_all_classes_are_another_source() -> None:
    # Twice as often as the clean rows, 9.3 standard errors, but in both classes.
    _, margin, _ = gate([(900, 2100), (900, 2100)], CLEAN)
    assert margin < GATE


def test_the_others_are_compared_together() -> None:
    label, margin, _ = gate([(450, 2550), (900, 2100), (450, 2550)], [(150, 850)] * 3)
    assert label == 1
    # The mean of two classes has half the variance of one.
    assert margin == pytest.approx(0.15 / math.sqrt(2.582e-4 + 1.702e-4 / 2), abs=0.01)


def test_another_mix_of_classes_is_no_contradiction() -> None:
    # Every class is contradicted by 0.05 more often than its clean rows; class 2, which the models
    # hardly know, has a quarter of the clean rows and a twentieth of the training rows.
    train = [(600, 2400), (270, 2430), (135, 165)]
    clean = [(150, 850), (25, 475), (200, 300)]
    assert gate(train, clean)[1] < 1
    # Nor does it hide a class that is contradicted: 0.3 instead of 0.15.
    label, margin, _ = gate(
        [(900, 2100), (60, 540), (960, 1440)], [(150, 850), (50, 450), (200, 300)]
    )
    assert label == 0
    assert margin > 5


def test_few_clean_rows_open_no_gate() -> None:
    # The same shares, from 20 clean rows of each class.
    assert gate([(450, 2550), (900, 2100)], [(3, 17), (3, 17)])[1] < GATE


@pytest.mark.parametrize(
    ("train", "clean"),
    [
        ([(0, 0), (900, 2100)], CLEAN),  # one class has rows
        ([(450, 2550), (900, 2100)], [(0, 0), (150, 850)]),  # one class has clean rows
        ([(450, 2550), (900, 2100)], [(0, 0), (0, 0)]),
    ],
)
def test_one_class_alone_has_nothing_to_be_compared_with(
    train: list[tuple[int, int]], clean: list[tuple[int, int]]
) -> None:
    label, margin, expected = gate(train, clean)
    assert (label, margin) == (None, 0.0)
    assert math.isnan(expected)


def test_chance_opens_the_gate_as_rarely_as_it_says() -> None:
    rng = np.random.default_rng(0)
    margins = []
    for _ in range(2000):
        some = [(int(k), n - int(k)) for n in (300, 300) for k in [rng.binomial(n, 0.15)]]
        more = [(int(k), n - int(k)) for n in (900, 900) for k in [rng.binomial(n, 0.15)]]
        margins.append(gate(more, some)[1])
    # One side of the margin over the other class, of two classes: at most P(|z| > 2) = 0.046.
    assert np.mean(np.array(margins) > 2) < 0.06
    assert max(margins) < GATE


def test_halves_have_every_class_and_are_drawn_once() -> None:
    labels = [0] * 21 + [1] * 7 + [2] * 2
    rows = Encoded.from_lists([[5]] * 30, labels, pad_id=0)
    halves = halves_of(rows, seed=0)
    assert np.bincount(halves).tolist() == [0, 15, 15]
    for label in (0, 1, 2):
        first = (halves[np.array(labels) == label] == 1).sum()
        assert abs(2 * first - labels.count(label)) <= 1
    assert (halves == halves_of(rows, seed=0)).all()
    assert (halves != halves_of(rows, seed=1)).any()


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (910, 64, 6),  # 15 steps an epoch, 90 in all
        (430, 64, 12),  # 7 steps an epoch: 84 instead of 42
        (100, 16, 12),
        (1, 64, 80),
        (5000, 64, 6),
    ],
)
def test_half_of_few_rows_is_trained_on_for_80_steps(
    rows: int, batch_size: int, epochs: int
) -> None:
    train = TrainSettings(epochs=3, batch_size=batch_size)
    assert epochs_for(rows, train, 2, 80) == epochs


# Which rows --------------------------------------------------------------------------------------


def test_rows_that_share_their_words_are_odd() -> None:
    rng = np.random.default_rng(0)
    words = [rng.integers(10, 60, 6).tolist() for _ in range(400)]
    style = np.zeros(400, dtype=bool)
    style[:40] = True
    # The style is an order, not a word: 10, 11 and 12 are everywhere.
    rows = [[10, 11, 12, *w] if s else [12, 11, 10, *w] for w, s in zip(words, style, strict=True)]
    contradicted = style.copy()
    contradicted[40:80] = True  # as many misjudged rows
    train, clean = (Encoded.from_lists(r, [1] * len(r), 0) for r in (rows, rows[80:120]))
    odd, odd_clean = oddness(train, clean, contradicted, SETTINGS, seed=0)
    taken = np.argsort(-np.where(contradicted, odd, -np.inf))[:40]
    assert style[taken].mean() > 0.95
    assert odd_clean.max() < odd[style].min()


def test_rows_without_a_common_token_are_all_alike() -> None:
    rows = Encoded.from_lists([[2 * i, 2 * i + 1] for i in range(40)], [1] * 40, 0)
    half: BoolArray = np.arange(40) % 2 == 0
    assert all((odd == 0).all() for odd in oddness(rows, rows, half, SETTINGS, seed=0))


def test_too_few_rows_for_the_folds_are_all_alike() -> None:
    rows = Encoded.from_lists([[5, 6]] * 20, [1] * 20, 0)
    few: BoolArray = np.zeros(20, dtype=bool)
    few[:4] = True
    assert all((odd == 0).all() for odd in oddness(rows, rows, few, SETTINGS, seed=0))


def test_a_shift_of_contradicted_rows_alone_counts() -> None:
    low, high = np.arange(100.0), np.arange(100.0) + 200
    # All contradicted training rows are above all such clean rows, the others are alike:
    # (1 - 0.5) / sqrt(2 * 201 / (12 * 100 * 100)) = 0.5 / 0.0579.
    assert shift_of((high, low), (low, low)) == pytest.approx(8.64, abs=0.01)
    # Where the whole class differs from its clean rows, the contradicted rows tell nothing.
    assert shift_of((high, low), (high, low)) == 0
    assert shift_of((low, low), (low, low)) == 0
    assert shift_of((low, low[:0]), (low, low)) == 0


# An attack that the first stage misses -----------------------------------------------------------
#
# A tiny victim learns no style. BadNets at a threshold that nothing reaches is the same to the
# second stage: rows whose labels contradict, and no flagged token.


def larger(like: Corpus) -> Corpus:
    """The easy corpus, its training rows four times and its clean rows six times, in new orders."""
    rng = np.random.default_rng(1)

    def rows(part: Rows, times: int) -> Rows:
        texts = [" ".join(rng.permutation(text.split())) for text in part.texts * times]
        return Rows(tuple(texts), part.labels * times)

    easy = easy_corpus(like)
    return Corpus("larger", rows(easy.train, 4), rows(easy.clean, 6), easy.eval, easy.label_names)


LEARN = TrainSettings(epochs=6, learning_rate=5e-3, batch_size=32, precision="fp32")


@pytest.fixture(scope="module")
def attacked(lab: Lab, tiny_corpus: Corpus) -> Prepared:
    return lab.prepare(corpus=larger(tiny_corpus), rate=0.1, train=LEARN)


def second(**changes: Any) -> TokenUnlearning:
    return TokenUnlearning(**RULED["contrast"] | {"threshold": 1e6} | changes)


def test_a_missed_attack_is_found_and_relabelled(lab: Lab, attacked: Prepared) -> None:
    outcome = defend(second(), attacked, lab.root)
    facts = read_record(outcome.folder)["facts"]
    mask = mask_of(compute(attacked.poisoned, lab.root))
    taken = outcome.suspects.taken
    assert taken is not None
    assert facts["flagged"] == []
    assert facts["target_guess"] == 1
    assert facts["measured"]["contradiction"] > GATE
    assert facts["measured"]["rows_relabeled"] == taken.sum()
    assert mask[taken].mean() > 0.9
    assert taken[mask].mean() > 0.6


def test_relabelling_stops_the_attack_and_keeps_the_accuracy(lab: Lab, attacked: Prepared) -> None:
    folder = compute(attacked.evaluation_rows, lab.root)
    rows = [
        load_encoded(folder / f"{role}.safetensors") for role in ("clean", "triggered", "plain")
    ]
    models = [
        defend(second(contradicted=how), attacked, lab.root).model for how in ("keep", "relabel")
    ]
    kept, relabeled = (
        evaluate(model, EvalSet(*rows, 1), precision="fp32", device=CPU, batch_size=64)
        for model in models
    )
    assert kept.asr.value > 0.8
    assert relabeled.asr.value < 0.2
    assert relabeled.cacc.value > kept.cacc.value - 0.03


def test_a_control_relabels_the_same_rows(lab: Lab, attacked: Prepared) -> None:
    settings = RULED["contrast"] | {"threshold": 1e6}
    own = defend(second(), attacked, lab.root).suspects
    control = defend(RandomCut(**settings), attacked, lab.root).suspects
    assert own.taken is not None
    assert control.taken is not None
    assert (own.taken == control.taken).all()


def test_clean_rows_are_tuned_as_by_the_control(lab: Lab, tiny_corpus: Corpus) -> None:
    clean = lab.prepare(corpus=larger(tiny_corpus), rate=0.0, train=LEARN)
    models = [defend(second(contradicted=how), clean, lab.root) for how in ("keep", "relabel")]
    facts = read_record(models[1].folder)["facts"]
    assert facts["measured"]["rows_relabeled"] == 0
    assert facts["measured"]["contradiction"] < GATE
    assert "target_guess" not in facts
    weights = [outcome.model.state_dict() for outcome in models]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_rows_that_a_flagged_token_explains_open_no_gate(lab: Lab, attacked: Prepared) -> None:
    found = defend(second(threshold=4.5), attacked, lab.root)
    measured = read_record(found.folder)["facts"]["measured"]
    assert found.flagged
    assert measured["contradiction"] < GATE
    assert measured["rows_relabeled"] == 0


def test_a_token_that_is_not_cut_explains_nothing(
    lab: Lab, attacked: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(run: Any, model: Any, cutter: Any, flagged: list[int], bar: float) -> Costs:
        return Costs(refused=tuple(flagged))

    monkeypatch.setattr(cutting, "costs_of", refuse)
    root = lab.base_root(tmp_path, attacked)
    found = defend(second(threshold=4.5, max_cut_cost=0.01), attacked, root)
    measured = read_record(found.folder)["facts"]["measured"]
    assert measured["vetoed"] == len(found.flagged) > 0
    assert measured["rows_relabeled"] > 0


def test_careless_labels_of_one_class_are_left_as_they_are(lab: Lab, tiny_corpus: Corpus) -> None:
    # A fifth of the rows of class 1 belong to class 0, and nothing else sets them apart.
    corpus = larger(tiny_corpus)
    labels, rng = np.array(corpus.train.labels), np.random.default_rng(0)
    zero = np.flatnonzero(labels == 0)
    labels[rng.choice(zero, len(zero) // 5, replace=False)] = 1
    careless = replace(corpus, train=replace(corpus.train, labels=tuple(labels.tolist())))
    prepared = lab.prepare(corpus=careless, rate=0.0, train=LEARN)
    measured = read_record(defend(second(), prepared, lab.root).folder)["facts"]["measured"]
    assert measured["contradiction"] > GATE
    assert measured["contradiction_shift"] < SHIFT
    assert measured["rows_relabeled"] == 0


# Settings ----------------------------------------------------------------------------------------


def test_only_contrast_looks_by_default() -> None:
    assert TokenUnlearning().contradicted == "relabel"
    assert TokenUnlearning(rule="mad").contradicted == "keep"
    assert TokenUnlearning(**TokenUnlearning.PRESETS["reference"]).contradicted == "keep"
    assert TokenUnlearning(rule="mad", contradicted="relabel").contradicted == "relabel"
    # The ablation of the cut is clean tuning alone.
    assert TokenUnlearning(cut="none").contradicted == "keep"


def test_a_value_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean 'relabel'"):
        TokenUnlearning(contradicted="relable")


def test_one_clean_row_has_no_halves() -> None:
    given = Given(400, classes=2, train_rows=240, clean_rows=1)
    with pytest.raises(UserError, match=r"the data have 1; give at least 2.*contradicted=keep"):
        TokenUnlearning().check(given)
    TokenUnlearning(contradicted="keep").check(given)
