"""DAN: texts whose hidden states are far from those of clean rows are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from screens import decisions, own_screens, scores, screen_of, screened_alone
from tiny_cells import Lab

from btu.defenses.base import DEFENSES
from btu.defenses.dan import Dan, distances, layer_distances, screen_texts
from btu.defenses.dan import scores as scores_of
from btu.defenses.kit.screening import load_values, save_values
from btu.errors import UserError
from btu.findings import Screened
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stages import StageRun
from btu.victims import Victim

# Long enough that the toy model obeys the trigger, and predicts both classes without it.
OBEYS = TrainSettings(epochs=6, learning_rate=1e-2, batch_size=16, precision="fp32")
# Two classes with the same four points around (0, 0) and around (10, 0).
CROSS = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
KNOWN = np.concatenate([CROSS, CROSS + np.array([10, 0])])
LABELS = np.array([0] * 4 + [1] * 4)


@pytest.fixture
def obeys(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3, train=OBEYS)


# The arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [None, 0.1, 0.9])
def test_the_distance_is_that_to_the_nearest_class(shrinkage: float | None) -> None:
    rows = np.array([[0.0, 0], [3, 4], [9, 0], [5, 2]])
    # Around its mean each class has a variance of (1 + 1) / 4 = 0.5 in both directions, and no
    # covariance: shrinking changes nothing. (0, 0) is a mean. (3, 4): 25 / 0.5 = 50 from class 0,
    # (49 + 16) / 0.5 from class 1. (9, 0): 1 / 0.5 = 2 from class 1. (5, 2): 29 / 0.5 = 58.
    found = distances(KNOWN, LABELS, rows, shrinkage)
    assert found == pytest.approx([0, 50, 2, 58])


def test_shrinking_moves_variances_towards_their_mean() -> None:
    known = np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    # Variances 8 / 4 = 2 and 2 / 4 = 0.5, mean 1.25. With shrinkage 0.5: (2 + 1.25) / 2 = 1.625 and
    # (0.5 + 1.25) / 2 = 0.875.
    rows = np.array([[1.0, 0], [0, 1]])
    found = distances(known, np.zeros(4, dtype=int), rows, 0.5)
    assert found == pytest.approx([1 / 1.625, 1 / 0.875])


def test_fewer_clean_rows_than_dimensions_still_give_a_covariance() -> None:
    rng = np.random.default_rng(0)
    known, rows = rng.normal(size=(8, 50)), rng.normal(size=(5, 50))
    near = distances(known, np.array([0, 1] * 4), rows, None)
    far = distances(known, np.array([0, 1] * 4), rows + 10, None)
    assert np.isfinite(near).all()
    assert (far > near).all()


def test_equal_rows_give_no_distance() -> None:
    assert distances(np.ones((4, 3)), np.zeros(4, dtype=int), np.eye(3), None).tolist() == [0, 0, 0]


def test_layers_are_normalized_before_they_are_combined() -> None:
    # Layer 0: mean 2, deviation 1. Layer 1: mean 20, deviation 10. Layer 2 does not vary: it does
    # not count.
    clean = np.array([[1.0, 10, 5], [3, 30, 5]])
    came = np.array([[4.0, 50, 500], [2, 10, 5]])
    # (4 - 2) / 1 = 2 and (50 - 20) / 10 = 3; 0 and -1.
    first, second = scores_of(clean, came, "mean")
    assert first.tolist() == [-1, 1]
    assert second.tolist() == [2.5, -0.5]
    assert scores_of(clean, came, "max")[1].tolist() == [3, 0]
    assert [s.tolist() for s in scores_of(clean[:1], came, "mean")] == [[0], [0, 0]]


def test_the_bar_is_the_quantile_of_the_held_out_rows(tmp_path: Path) -> None:
    for name in ("distances", "out"):
        (tmp_path / name).mkdir()
    clean = np.arange(101.0)[:, None]
    # The mean of 0 to 100 is 50. The 95 % quantile is 95, and only what is above it is rejected.
    save_values(tmp_path / "distances", clean=clean, incoming=np.array([[94.0], [95], [96]]))
    inputs = {"distances": tmp_path / "distances"}
    config = {"frr": 0.05, "aggregate": "mean"}
    run: Any = StageRun(config, {}, inputs, tmp_path / "out", None)  # type: ignore[arg-type]
    assert screen_texts(run) == {
        "bar": pytest.approx((95 - 50) / clean.std()),
        "turned_away": 1,
    }
    assert Screened.load(tmp_path / "out").accepted.tolist() == [True, True, False]


def judged(folder: Path, clean: Any, labels: Any, came: Any, frr: float = 0.05) -> np.ndarray:
    """Return the verdicts on hidden states (texts, layers, hidden), given those of clean rows."""
    for name in ("clean", "incoming", "distances", "out"):
        (folder / name).mkdir(parents=True)
    save_values(folder / "clean", hidden=clean.astype(np.float32), label=labels)
    save_values(folder / "incoming", hidden=came.astype(np.float32))
    inputs = {name: folder / name for name in ("clean", "incoming")}
    config = {"held_out": 0.5, "shrinkage": None, "seed": 0}
    layer_distances(StageRun(config, {}, inputs, folder / "distances", None))  # type: ignore[arg-type]
    config = {"frr": frr, "aggregate": "mean"}
    inputs = {"distances": folder / "distances"}
    screen_texts(StageRun(config, {}, inputs, folder / "out", None))  # type: ignore[arg-type]
    return Screened.load(folder / "out").accepted


def test_fresh_clean_rows_are_rejected_at_about_the_rate_that_is_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 200)
    # 30 dimensions and 200 rows for the estimate: the rows that it has seen lie much closer.
    means = rng.normal(size=(2, 1, 30))
    clean = means[labels] + rng.normal(size=(400, 1, 30))
    fresh = means[np.array([0, 1] * 2000)] + rng.normal(size=(4000, 1, 30))
    accepted = judged(tmp_path / "a", clean, labels, fresh)
    # The bar comes from 200 rows: sqrt(0.05 * 0.95 / 200) = 0.015 is its deviation.
    assert 1 - accepted.mean() == pytest.approx(0.05, abs=0.04)
    accepted = judged(tmp_path / "b", clean, labels, fresh, frr=0.3)
    assert 1 - accepted.mean() == pytest.approx(0.3, abs=0.09)
    # Six deviations away in every direction: nothing is accepted.
    assert not judged(tmp_path / "c", clean, labels, fresh[:50] + 6).any()


# On the tiny corpus ------------------------------------------------------------------------------


def test_it_turns_away_more_triggered_rows_than_clean_ones(lab: Lab, obeys: Prepared) -> None:
    found = scores(Dan(), obeys, lab)
    measured = found["measured"]
    assert measured["frr"] <= 0.3
    assert 1 - measured["far"] > 2 * measured["frr"]
    # A rejected text is not a hit: ASR is at most the share that is accepted.
    assert found["asr"]["hits"] / found["asr"]["n"] <= measured["far"]


def test_a_higher_frr_turns_away_more_and_computes_no_distance_again(
    lab: Lab, obeys: Prepared
) -> None:
    few, many = Dan(frr=0.02), Dan(frr=0.4)
    _, first = decisions(few, obeys, lab)
    _, second = decisions(many, obeys, lab)
    assert first.accepted.sum() > second.accepted.sum()
    assert not (second.accepted & ~first.accepted).any()
    keys = [{stage.key for stage in own_screens(d, obeys)} for d in (few, many)]
    names = {stage.name for stage in own_screens(many, obeys) if stage.key in keys[1] - keys[0]}
    assert names == {"screen (dan)"}


@pytest.mark.parametrize(
    "changes",
    [{"aggregate": "max"}, {"pooling": "mean"}, {"shrinkage": 0.5}, {"held_out": 0.2}],
)
def test_every_setting_changes_the_scores(
    lab: Lab, obeys: Prepared, changes: dict[str, Any]
) -> None:
    def found(defense: Dan) -> tuple[np.ndarray, np.ndarray]:
        (folder,) = lab.compute(screen_of(defense, obeys).inputs["distances"])
        values = load_values(folder)
        return scores_of(values["clean"], values["incoming"], defense.aggregate)

    assert not np.array_equal(found(Dan())[1], found(Dan(**changes))[1])


def test_it_screens_before_any_victim(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    texts, found = decisions(Dan(frr=0.2), prepared, lab)
    assert len(found.accepted) == len(texts)
    assert found.texts is None
    # Its bar is a quantile of clean rows: some texts go, most stay.
    assert 0.4 < found.accepted.mean() < 1


def test_a_text_is_screened_for_itself(lab: Lab, obeys: Prepared, tmp_path: Path) -> None:
    texts, together = decisions(Dan(), obeys, lab)
    some = [text for text in texts.texts if text][5:25]
    root = lab.root_with(tmp_path, screen_of(Dan(), obeys))
    alone = screened_alone(Dan(), obeys, some, root)
    place = {text: i for i, text in enumerate(texts.texts)}
    assert alone.accepted.tolist() == [bool(together.accepted[place[text]]) for text in some]


def test_the_preset_is_the_reference_code() -> None:
    preset = DEFENSES.load("dan").PRESETS["reference"]  # type: ignore[attr-defined]
    assert Dan(**preset) == Dan(0.05, 0.2, "mean", "mean", 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frr": 0}, "defense.frr must be above 0 and below 1, got 0"),
        ({"frr": 1.0}, "defense.frr must be above 0 and below 1, got 1.0"),
        ({"held_out": 1}, "defense.held_out must be above 0 and below 1, got 1"),
        ({"aggregate": "maks"}, "unknown defense.aggregate 'maks'"),
        ({"pooling": "means"}, "unknown defense.pooling 'means'"),
        ({"shrinkage": -0.1}, "defense.shrinkage must be above 0 and below 1, got -0.1"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Dan(**changes)
