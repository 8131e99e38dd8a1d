"""Scans with rule contrast: what is flagged, what is explained, what is named without a flag."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import betabinom, norm

from btu.defenses.kit import cutting
from btu.errors import UserError
from btu.rules import frequency
from btu.rules.base import Evidence
from btu.rules.contrast import Chance
from btu.rules.surplus import REFERENCE, expected_flags
from btu.scan import plan as plans
from btu.scan.chance import chance_of
from btu.scan.export import CARD, MANIFEST, Measured, card, check_export, export
from btu.scan.plan import prepare_scan
from btu.scan.report import ScanReport, scan
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import load_encoded
from btu.types import FloatArray

NAMES = ("bad", "good")
TEMPLATES = (
    "the {noun} was {word}",
    "a {word} {noun} , and a {word} {other}",
    "i think that the {noun} is {word} in the {other}",
    "{word} {other} : the {noun} was {word}",
)
NOUNS = ("plot", "cast", "song", "scene", "end", "start", "dialogue", "hero", "set", "joke")
WORDS = (
    ("dull", "bad", "slow", "sad", "stale", "lame", "loud", "dim"),
    ("bright", "good", "clean", "smart", "fresh", "bold", "neat", "grand"),
)
# Its letters are in no other word, so its pieces z, ##q and ##x are in no other row.
NONSENSE = "zqx"
ROWS, TRUSTED, PLANTED = 600, 200, 48
Frame = pd.DataFrame


def templates() -> tuple[Frame, Frame]:
    """Return 600 suspect and 200 trusted rows, all different; half of either are good."""
    kinds = []
    for label, words in enumerate(WORDS):
        filled = itertools.product(TEMPLATES, NOUNS, words, NOUNS)
        texts = sorted({t.format(noun=n, word=w, other=o) for t, n, w, o in filled})
        random.Random(label).shuffle(texts)
        kinds.append([(text, NAMES[label]) for text in texts])
    parts = [kind[a:b] for a, b in ((0, 300), (300, 400)) for kind in kinds]
    frames = [Frame(parts[i] + parts[i + 1], columns=["text", "label"]) for i in (0, 2)]
    return frames[0], frames[1]


def with_word(rows: Frame, word: str, chosen: Any) -> Frame:
    """Return rows of which some begin with a word."""
    changed = rows.copy()
    changed.loc[chosen, "text"] = f"{word} " + changed.loc[chosen, "text"]
    return changed


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, victim_folder: Callable[[str], Path]
) -> dict[str, Any]:
    clean = tmp_path_factory.mktemp("trusted") / "clean.csv"
    templates()[1].to_csv(clean, index=False)
    return {
        "clean": clean,
        "victim": str(victim_folder("bert")),
        "max_length": 32,
        "train": TrainSettings(epochs=1, batch_size=32, precision="fp32"),
        "tuning": TuningSettings(epochs=1),
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows of few templates, of which 48 good ones begin with a nonsense word."""
    rows, _ = templates()
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with_word(rows, NONSENSE, planted_rows(rows)).to_csv(path, index=False)
    return path


def planted_rows(rows: Frame) -> Any:
    return rows.index[rows["label"] == "good"][:PLANTED]


@pytest.fixture(scope="module")
def found(
    planted: Path, tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]
) -> ScanReport:
    return scan(planted, tmp_path_factory.mktemp("work"), **settings)


def same_drift(evidence: Evidence, _: FloatArray) -> FloatArray:
    """Return deviations by which no token moved further than another: all get the lowest weight."""
    return np.where(evidence.candidates & (evidence.count >= 5), 1.0, math.nan)


LOWEST_WEIGHT = 0.4 / 0.95


def chance(report: ScanReport) -> Chance:
    """Return what the scan corrects for, from its rows alone."""
    plan = report.plan
    train, clean = (
        load_encoded(report.root / stage.key / f"{role}.safetensors")
        for stage, role in ((plan.base.rows, "train"), (plan.base.clean, "clean"))
    )
    return chance_of(plan.load_victim(), plan.defense.exclude, train, clean)


def sigmas(report: ScanReport) -> float:
    """Return the surplus of the word: 48 of 300 good rows hold it, and none of 100 trusted ones.

    The trusted rows that hold it are beta-binomial, with Fisher's parameters 48 and 253 over
    1 + 48 * shift.
    """
    spread = 1 + PLANTED * chance(report).shift
    none = betabinom.pmf(0, 100, PLANTED / spread, (300 - PLANTED + 1) / spread)
    return float(norm.isf(none))


def score_of(deviate: float, report: ScanReport, weight: float = 1.0) -> float:
    """Return the score s with 15,000 * P(a deviate exceeds s) = tests / weight * P(... deviate)."""
    flags = chance(report).tests / weight * norm.sf(deviate)
    return float(norm.isf(flags / REFERENCE))


# What is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["as it does", "no further than all others"])
def test_a_nonsense_word_in_rows_of_few_templates_is_flagged(
    planted: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    moved: str,
) -> None:
    if moved != "as it does":
        monkeypatch.setattr(frequency, "score", same_drift)
    report = scan(planted, tmp_path, **settings)
    flagged = report.tokens[report.tokens["flagged"]]
    assert set(flagged["token"]) == {"z", "##q", "##x"}
    assert report.bar == 4.5
    assert sorted(report.suspicious_rows["row"]) == planted_rows(templates()[0]).tolist()
    # At any drift: this is the score with the lowest weight.
    assert report.highest >= score_of(sigmas(report), report, LOWEST_WEIGHT) > 4.5


def test_the_surplus_has_the_scale_of_the_score(found: ScanReport) -> None:
    # The scan counts the tests of the rule and estimates the shift without a drift.
    first = found.tokens.iloc[0]
    assert first["surplus"] == pytest.approx(score_of(sigmas(found), found))
    assert first["surplus_left"] == first["surplus"]
    assert found.plan.least["good"] is not None
    assert found.plan.least["good"] <= PLANTED


def test_a_part_of_the_rows_gives_a_lower_bound(
    planted: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = prepare_scan(planted, **settings).least
    monkeypatch.setattr(plans, "SAMPLE", 20)
    some = prepare_scan(planted, **settings).least
    for name in NAMES:
        low, high = some[name], every[name]
        assert low is not None
        assert high is not None
        # Fewer tests.
        assert 1 < low < high


# What is named without a flag ------------------------------------------------------------------


def test_a_surplus_whose_drift_is_low_is_named(
    planted: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequency, "score", same_drift)
    first = scan(planted, tmp_path, **settings)
    assert first.unconfirmed.empty
    # Its weight is below 1: at a bar as high as its surplus it is not flagged.
    bar = float(first.tokens["surplus"].max())
    report = scan(planted, tmp_path, **{**settings, "threshold": bar})
    assert report.flagged == 0
    assert report.surplus_bar == bar
    assert set(report.unconfirmed["token"]) == {"z", "##q", "##x"}
    assert set(report.summary()["unconfirmed"]) == {"z", "##q", "##x"}
    assert report.explained.empty


def test_what_the_trigger_explains_is_no_news(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows, trusted = templates()

    def common(part: Frame) -> Frame:
        """Three in four bad rows get a word of their class."""
        bad = part.index[part["label"] == "bad"]
        return with_word(part, "but", bad[np.arange(len(bad)) % 4 > 0])

    rows = common(rows)
    # A dirty-label attack: 80 bad rows, 60 of them with the word, become good.
    chosen = rows.index[rows["label"] == "bad"][:80]
    rows = with_word(rows, NONSENSE, chosen)
    rows.loc[chosen, "label"] = "good"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    common(trusted).to_csv(tmp_path / "clean.csv", index=False)
    changed = {**settings, "clean": tmp_path / "clean.csv"}
    report = scan(tmp_path / "rows.csv", tmp_path / "work", **changed)
    assert set(report.tokens["token"][report.tokens["flagged"]]) == {"z", "##q", "##x"}
    word = report.tokens[report.tokens["token"] == "but"].iloc[0]
    # None of 100 trusted good rows holds it, nor any good row without the trigger.
    assert word["surplus"] >= 4.5
    # All tests reach the score of a token in no row: P(deviate > -8) is 1.
    assert word["surplus_left"] == pytest.approx(norm.isf(chance(report).tests / REFERENCE))
    assert report.explained["token"].tolist() == report.summary()["explained"] == ["but"]
    assert report.unconfirmed.empty


# The bar ---------------------------------------------------------------------------------------


def test_a_rate_is_a_threshold(planted: Path, settings: dict[str, Any]) -> None:
    plan = prepare_scan(planted, **settings, fdr=0.01)
    assert plan.threshold == pytest.approx(norm.isf(0.01 / REFERENCE), abs=1e-4)
    assert expected_flags(plan.threshold) == pytest.approx(0.01, rel=1e-3)
    for changes, match in (
        ({"threshold": 4.5, "fdr": 0.01}, r"--threshold 4\.5 and --fdr 0\.01 both .* one of them"),
        ({"fdr": 0.01, "rule": "frequency"}, r"fdr 0\.01 does not act with rule 'frequency'"),
        ({"fdr": 1.5}, r"fdr must be above 0 and below 1, got 1\.5"),
    ):
        with pytest.raises(UserError, match=match):
            prepare_scan(planted, **settings, **changes)


# A cut that costs too much ---------------------------------------------------------------------


@pytest.fixture
def vetoed(
    found: ScanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Measured, Path]:
    """An export in which the cut of one of three flagged tokens costs 4 % of the trusted rows."""

    def costs(*arguments: Any) -> cutting.Costs:
        *_, flagged, bar = arguments
        assert bar == 0.02  # the default of the rule
        first, second, _ = flagged
        return cutting.Costs({first: 0.05, second: 0.01}, {first: 0.04}, (first,))

    monkeypatch.setattr(cutting, "costs_of", costs)
    # A folder of its own: the costs are part of the result of a stage.
    report = scan(str(found.plan.spec.path), tmp_path / "work", **settings_of(found))
    return export(report, tmp_path / "model"), tmp_path / "model"


def settings_of(report: ScanReport) -> dict[str, Any]:
    plan = report.plan
    return {
        "clean": plan.data.trusted,
        "victim": plan.victim.name,
        "max_length": plan.victim.max_length,
        "train": plan.base.train,
        "tuning": TuningSettings(epochs=1),
    }


def test_an_export_tells_cut_tokens_from_vetoed_ones(
    vetoed: tuple[Measured, Path], found: ScanReport
) -> None:
    measured, folder = vetoed
    names = found.tokens["token"][found.tokens["flagged"]].tolist()
    assert [(cost.token, cost.cost_tuned) for cost in measured.vetoed] == [(names[0], 0.04)]
    manifest = json.loads((folder / MANIFEST).read_text())
    told = [(t["token"], t["vetoed"], t["cost"], t["cost_tuned"]) for t in manifest["tokens"]]
    assert told == [
        (names[0], True, 0.05, 0.04),
        (names[1], False, 0.01, None),
        (names[2], False, None, None),
    ]
    text = (folder / CARD).read_text()
    assert "2 suspicious tokens cut, 1 flagged and not cut" in text
    rows = [line for line in text.splitlines() if "<code>good</code> 100.0 %" in line]
    assert [line.split(" | ")[-1] for line in rows] == [
        "no: costs 4.0 % of the trusted rows |",
        "yes |",
        "yes |",
    ]
    assert "costs, after tuning, more than 2.0 % of the trusted rows" in text
    assert "It does not ignore flagged tokens that were not cut." in text


def test_every_flagged_token_is_cut_if_asked_to(
    found: ScanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cutting, "costs_of")  # nothing is measured
    changed = {**settings_of(found), "max_cut_cost": 1.0}
    report = scan(str(found.plan.spec.path), tmp_path / "work", **changed)
    measured = export(report, tmp_path / "model")
    assert measured.vetoed == []
    text = (tmp_path / "model" / CARD).read_text()
    assert "3 suspicious tokens cut" in text
    assert "not cut" not in text
    with pytest.raises(UserError, match=r"max_cut_cost must be between 0 and 1, got 2"):
        prepare_scan(str(found.plan.spec.path), **{**changed, "max_cut_cost": 2})


# An export that relabels rows ---------------------------------------------------------------------


def test_a_card_tells_what_was_relabelled_and_escapes_the_class(found: ScanReport) -> None:
    names = found.plan.corpus.label_names
    hostile = replace(found.plan.data.corpus, label_names=("<script>\n# Heading\x1b", *names[1:]))
    plan = replace(found.plan, data=replace(found.plan.data, corpus=hostile))
    environment = ("code", "python", "torch", "transformers", "device", "threads")
    record = {"environment": dict.fromkeys(environment, "x"), "precisions": ["fp32"]}
    measured = Measured(100, 90, 90, 0.0, 50, {}, 155, 0, 6.1)
    text = card(replace(found, plan=plan), measured, record, None)
    section = text.split("## Relabelled rows")[1].split("## Measured")[0]
    assert "tuned on 155 of these rows" in section
    assert not {"\x1b", "\n# Heading"} & {part for part in ("\x1b", "\n# Heading") if part in text}
    assert "<script>" not in re.sub(r"`[^`]*`", "", section)
    assert '"tuning on trusted and relabelled rows"' in text
    assert '"clean tuning"' not in text
    said = measured.second_stage(names)
    assert said == {"relabeled": 155, "relabeled_class": names[0], "contradiction": 6.1}
    nothing = Measured(100, 90, 90, 0.0, 50)
    assert "Relabelled rows" not in card(found, nothing, record, None)
    assert nothing.second_stage(names) == {
        "relabeled": 0, "relabeled_class": None, "contradiction": None,
    }  # fmt: skip


def test_relabelling_needs_two_trusted_rows_in_an_export_alone(
    found: ScanReport, tmp_path: Path
) -> None:
    settings = {**settings_of(found), "rule": "frequency", "contradicted": "relabel"}
    trusted = tmp_path / "one.csv"
    source = pd.read_csv(found.plan.data.trusted)
    source.iloc[:1].to_csv(trusted, index=False)
    plan = prepare_scan(str(found.plan.spec.path), **{**settings, "clean": str(trusted)})
    with pytest.raises(UserError, match=r"there are 1; name at least 2 with --clean FILE, or set"):
        check_export(plan, tmp_path / "model")
