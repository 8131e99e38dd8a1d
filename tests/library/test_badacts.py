"""BadActs: texts that move many neurons out of the range of clean rows are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from screens import decisions, own_screens, scores, screen_of, screened_alone
from tiny_cells import Lab

from btu.defenses.badacts import BadActs, activation_states, screen_texts, states
from btu.defenses.kit.screening import load_values, save_values
from btu.errors import UserError
from btu.findings import Screened
from btu.recipe import Prepared
from btu.settings import TrainSettings
from btu.stages import StageRun, read_record
from btu.victims import Victim

# Long enough that the toy model obeys the trigger, and predicts both classes without it.
OBEYS = TrainSettings(epochs=6, learning_rate=1e-2, batch_size=16, precision="fp32")


@pytest.fixture
def obeys(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.3, train=OBEYS)


# The arithmetic ----------------------------------------------------------------------------------


def test_the_score_is_the_share_of_neurons_in_their_range() -> None:
    # Two layers of two neurons: mean 0, deviation 1; 6 and 2; 5 and 0; 1 and 1.
    known = np.array([[[-1.0, 4], [5, 0]], [[1, 8], [5, 2]]])
    rows = np.array([[[3.0, 13], [5, 1]], [[3.1, 12], [6, -2]], [[-9, 99], [4, 9]]])
    # k = 3: [-3, 3], [0, 12], 5 alone, [-2, 4], bounds included. Row 0: all but 13. Row 1: 12 and
    # -2. Row 2: none.
    assert states(known, rows, 3.0).tolist() == [0.75, 0.5, 0]
    # k = 2: [-2, 2], [2, 10], 5 alone, [-1, 3]. Row 0: 5 and 1. Row 1: none.
    assert states(known, rows, 2.0).tolist() == [0.5, 0, 0]


def test_the_bar_is_the_quantile_of_the_held_out_rows(tmp_path: Path) -> None:
    for name in ("scores", "out"):
        (tmp_path / name).mkdir()
    clean, came = np.arange(101) / 100, np.array([0.04, 0.05, 0.06])
    save_values(tmp_path / "scores", clean=clean, incoming=came)
    inputs = {"scores": tmp_path / "scores"}
    run: Any = StageRun({"frr": 0.05}, {}, inputs, tmp_path / "out", None)  # type: ignore[arg-type]
    # Of 0, 0.01, ... 1 the 5 % quantile is 0.05, and only what is below it goes.
    assert screen_texts(run) == {"bar": pytest.approx(0.05), "turned_away": 1}
    assert Screened.load(tmp_path / "out").accepted.tolist() == [False, True, True]


def judged(folder: Path, clean: Any, came: Any, frr: float = 0.05) -> np.ndarray:
    """Return the verdicts on activations (texts, layers, hidden), given those of clean rows."""
    for name in ("clean", "incoming", "scores", "out"):
        (folder / name).mkdir(parents=True)
    labels = np.array([0, 1] * (len(clean) // 2))
    save_values(folder / "clean", hidden=clean.astype(np.float32), label=labels)
    save_values(folder / "incoming", hidden=came.astype(np.float32))
    inputs = {name: folder / name for name in ("clean", "incoming")}
    config: dict[str, Any] = {"held_out": 0.5, "k": 1.0, "seed": 0}
    run: Any = StageRun(config, {}, inputs, folder / "scores", None)  # type: ignore[arg-type]
    assert activation_states(run) == {"estimated_on": len(clean) / 2, "held_out": len(clean) / 2}
    inputs = {"scores": folder / "scores"}
    run = StageRun({"frr": frr}, {}, inputs, folder / "out", None)  # type: ignore[arg-type]
    screen_texts(run)
    return Screened.load(folder / "out").accepted


def test_fresh_clean_rows_are_rejected_at_about_the_rate_that_is_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # 400 neurons: many different scores, so few rows are exactly at the bar.
    clean, fresh = rng.normal(size=(400, 2, 200)), rng.normal(size=(2000, 2, 200))
    accepted = judged(tmp_path / "a", clean, fresh)
    # The bar comes from 200 rows: sqrt(0.05 * 0.95 / 200) = 0.015 is its deviation.
    assert 1 - accepted.mean() == pytest.approx(0.05, abs=0.04)
    accepted = judged(tmp_path / "b", clean, fresh, frr=0.3)
    assert 1 - accepted.mean() == pytest.approx(0.3, abs=0.09)
    # Activations three times as large leave the ranges: nothing is accepted.
    assert not judged(tmp_path / "c", clean, fresh[:50] * 3).any()


# On the tiny corpus ------------------------------------------------------------------------------


def test_it_turns_away_more_triggered_rows_than_clean_ones(lab: Lab, obeys: Prepared) -> None:
    found = scores(BadActs(), obeys, lab)
    measured = found["measured"]
    assert measured["frr"] <= 0.3
    assert 1 - measured["far"] > 2 * measured["frr"]
    # A rejected text is not a hit: ASR is at most the share that is accepted.
    assert found["asr"]["hits"] / found["asr"]["n"] <= measured["far"]


def test_a_higher_frr_turns_away_more_and_scores_nothing_again(lab: Lab, obeys: Prepared) -> None:
    few, many = BadActs(frr=0.02, k=1.0), BadActs(frr=0.4, k=1.0)
    _, first = decisions(few, obeys, lab)
    _, second = decisions(many, obeys, lab)
    assert first.accepted.sum() > second.accepted.sum()
    assert not (second.accepted & ~first.accepted).any()
    keys = [{stage.key for stage in own_screens(d, obeys)} for d in (few, many)]
    names = {stage.name for stage in own_screens(many, obeys) if stage.key in keys[1] - keys[0]}
    assert names == {"screen (badacts)"}


def test_a_wider_range_holds_more_neurons(lab: Lab, obeys: Prepared) -> None:
    narrow, wide = (
        load_values(lab.compute(screen_of(BadActs(k=k), obeys).inputs["scores"])[0])
        for k in (1.0, 3.0)
    )
    for name in ("clean", "incoming"):
        assert (wide[name] >= narrow[name]).all()
        assert wide[name].mean() > narrow[name].mean()


def test_the_share_that_is_held_out_acts(lab: Lab, obeys: Prepared) -> None:
    found = []
    for held_out in (0.5, 0.2):
        defense = BadActs(held_out=held_out)
        (folder,) = lab.compute(screen_of(defense, obeys).inputs["scores"])
        facts = read_record(folder)["facts"]
        found.append(facts["held_out"] / (facts["held_out"] + facts["estimated_on"]))
    assert found == [pytest.approx(0.5, abs=0.02), pytest.approx(0.2, abs=0.02)]


def test_it_screens_before_any_victim(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    texts, found = decisions(BadActs(frr=0.2, k=1.0), prepared, lab)
    assert len(found.accepted) == len(texts)
    assert found.texts is None
    # Its bar is a quantile of clean rows: some texts go, most stay.
    assert 0.4 < found.accepted.mean() < 1


def test_a_text_is_screened_for_itself(lab: Lab, obeys: Prepared, tmp_path: Path) -> None:
    texts, together = decisions(BadActs(), obeys, lab)
    some = [text for text in texts.texts if text][5:25]
    root = lab.root_with(tmp_path, screen_of(BadActs(), obeys))
    alone = screened_alone(BadActs(), obeys, some, root)
    place = {text: i for i, text in enumerate(texts.texts)}
    assert alone.accepted.tolist() == [bool(together.accepted[place[text]]) for text in some]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frr": 1}, "defense.frr must be above 0 and below 1, got 1"),
        ({"frr": -0.5}, "defense.frr must be above 0 and below 1, got -0.5"),
        ({"k": 0}, "defense.k must be above 0, got 0"),
        ({"k": -3.0}, "defense.k must be above 0, got -3.0"),
        ({"held_out": 0}, "defense.held_out must be above 0 and below 1, got 0"),
    ],
)
def test_bad_settings_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BadActs(**changes)
