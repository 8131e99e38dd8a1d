"""What a cut costs on clean rows, and the veto of cuts that cost too much."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from defending import CPU, RULED, defend, word_rows
from tiny_cells import Lab
from torch import Tensor, nn

from btu.defenses.cuts import RandomCut
from btu.defenses.kit import cutting
from btu.defenses.kit.cutting import LEAST_ROWS, Costs, costs_of
from btu.defenses.token_unlearning import TokenUnlearning
from btu.errors import UserError
from btu.settings import TrainSettings
from btu.stages import StageRun, as_config, read_record
from btu.training import Encoded

pytestmark = pytest.mark.usefixtures("short_halves")

GOOD, BAD, DOMINANT, REPAIRED, TRIGGER = range(1, 6)


class Votes(nn.Module):
    """Adds up its tokens' rows: the logits."""

    def __init__(self) -> None:
        super().__init__()
        votes = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 9.0]]
        self.rows: nn.Embedding = nn.Embedding(6, 2)
        self.rows.weight.data = torch.tensor(votes)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.rows

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=(self.rows(input_ids) * attention_mask[..., None]).sum(1))


# 100 clean rows. DOMINANT decides 40 rows of class 0, in which GOOD would vote for 1; REPAIRED
# decides 20 more; 2 rows hold TRIGGER, of class 0, and are predicted as 1 because of it.
CLEAN = Encoded.from_lists(
    [[GOOD, DOMINANT]] * 40
    + [[GOOD, REPAIRED]] * 20
    + [[BAD, TRIGGER]] * 2
    + [[BAD]] * 8
    + [[GOOD]] * 30,
    [0] * 70 + [1] * 30,
    pad_id=0,
)


class Zeroing:
    """Cuts tokens by zeroing their rows."""

    def cut(self, model: Any, tokens: list[int]) -> None:
        with torch.no_grad():
            model.rows.weight[list(tokens)] = 0.0


@dataclasses.dataclass
class Tuned:
    """What the tuning was given: which rows, how many times."""

    rows: list[int]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Tuned:
    """Replaces the training: it teaches REPAIRED its vote again, and nothing else."""
    seen = Tuned([])

    def fit(self: StageRun, model: Any, data: Encoded, *_: Any, **__: Any) -> None:
        seen.rows.append(len(data))
        with torch.no_grad():
            model.rows.weight[REPAIRED] = torch.tensor([3.0, 0.0])

    monkeypatch.setattr(StageRun, "fit", fit)
    monkeypatch.setattr(cutting, "clean_rows_of", lambda _: CLEAN)
    return seen


def measure(flagged: list[int], bar: float) -> Costs:
    config = {"tuning": as_config(TrainSettings(precision="fp32")), "seed": 0}
    model: Any = Votes()
    cutter: Any = Zeroing()
    before = model.rows.weight.clone()
    found = costs_of(StageRun(config, {}, {}, Path(), CPU), model, cutter, flagged, bar)
    assert torch.equal(before, model.rows.weight)  # the model is as it was
    return found


def test_a_cut_that_costs_nothing_needs_no_tuning(tuned: Tuned) -> None:
    # Without the trigger its two rows are predicted rightly: the cost is negative.
    assert measure([TRIGGER], 0.02) == Costs({TRIGGER: -0.02})
    assert tuned.rows == []


def test_what_tuning_does_not_repair_is_refused(tuned: Tuned) -> None:
    found = measure([DOMINANT, REPAIRED, TRIGGER], 0.02)
    assert found.at_once == {DOMINANT: 0.4, REPAIRED: 0.2, TRIGGER: -0.02}
    # Each row is in one half to be measured on, so that the halves add up to all rows.
    assert found.tuned == {DOMINANT: 0.4, REPAIRED: 0.0}
    assert found.refused == (DOMINANT,)
    # Both halves: without the cut of the costly tokens, and with it.
    assert tuned.rows == [50] * 4


def test_a_higher_bar_refuses_less(tuned: Tuned) -> None:
    assert measure([DOMINANT], 0.39).refused == (DOMINANT,)
    assert measure([DOMINANT], 0.4) == Costs({DOMINANT: 0.4})


@pytest.mark.parametrize("rows", [LEAST_ROWS - 1, LEAST_ROWS])
def test_a_few_rows_are_chance(tuned: Tuned, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    few = Encoded.from_lists([[GOOD, DOMINANT]] * rows + [[GOOD]] * 7, [0] * rows + [1] * 7, 0)
    monkeypatch.setattr(cutting, "clean_rows_of", lambda _: few)
    assert measure([DOMINANT], 0.0).refused == ((DOMINANT,) if rows == LEAST_ROWS else ())


def test_without_clean_rows_nothing_is_refused(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "clean_rows_of", lambda _: Encoded.from_lists([], [], 0))
    assert measure([DOMINANT], 0.0) == Costs()


def test_costs_stand_in_columns() -> None:
    columns = Costs({3: 0.4, 5: 0.0}, {3: 0.1}, (3,)).columns(6)
    nan = math.nan
    np.testing.assert_array_equal(columns["cost"], [nan, nan, nan, 0.4, nan, 0.0])
    np.testing.assert_array_equal(columns["cost_tuned"], [nan, nan, nan, 0.1, nan, nan])
    np.testing.assert_array_equal(columns["vetoed"], [0, 0, 0, 1, 0, 0])


# In the defense ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenUnlearning, RandomCut])
def test_a_refused_token_is_not_cut_and_is_marked(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TokenUnlearning]
) -> None:
    monkeypatch.setattr(cutting, "tune", lambda *_: None)
    refused: list[int] = []

    def refuse(run: Any, model: Any, cutter: Any, flagged: list[int], bar: float) -> Costs:
        assert bar == 0.01
        refused.append(flagged[0])
        return Costs({flagged[0]: 0.5}, {flagged[0]: 0.3}, (flagged[0],))

    monkeypatch.setattr(cutting, "costs_of", refuse)
    prepared = lab.prepare()
    root = lab.base_root(tmp_path, prepared)
    defense = kind(**RULED["contrast"] | {"max_cut_cost": 0.01, "cut": "row"})
    outcome = defend(defense, prepared, root)
    (token,) = refused
    assert len(outcome.flagged) > 1
    assert token in outcome.flagged
    before, after = word_rows(outcome.poisoned_model), word_rows(outcome.model)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == set(outcome.flagged) - {token}
    assert read_record(outcome.folder)["facts"]["measured"]["vetoed"] == 1
    assert np.flatnonzero(outcome.table["vetoed"]).tolist() == [token]
    assert outcome.table["cost_tuned"][token] == 0.3


def test_a_bar_of_1_measures_no_cost(lab: Lab) -> None:
    defense = TokenUnlearning(**RULED["contrast"] | {"max_cut_cost": 1})
    outcome = defend(defense, lab.prepare(), lab.root)
    assert "vetoed" not in outcome.table
    assert "vetoed" not in read_record(outcome.folder)["facts"]["measured"]


def test_only_contrast_refuses_cuts_by_default() -> None:
    assert TokenUnlearning().max_cut_cost == 0.02
    assert TokenUnlearning(rule="mad").max_cut_cost == 1.0
    assert TokenUnlearning(rule="mad", max_cut_cost=0.1).max_cut_cost == 0.1


@pytest.mark.parametrize("cost", [-0.1, 1.5, "low", math.nan, True])
def test_the_bar_is_a_fraction(cost: Any) -> None:
    with pytest.raises(UserError, match=r"defense\.max_cut_cost must be between 0 and 1, got "):
        TokenUnlearning(max_cut_cost=cost)


# The false-discovery rate ------------------------------------------------------------------------


def test_a_rate_states_the_threshold() -> None:
    # 15,000 * P(a normal deviate exceeds 4.5041) = 15,000 * 3.333e-6 = 0.05.
    assert TokenUnlearning(fdr=0.05).threshold == 4.5041
    assert TokenUnlearning(fdr=0.01).threshold == 4.8347
    assert TokenUnlearning().threshold == 4.5


def test_a_rate_shares_the_stages_of_its_threshold(lab: Lab) -> None:
    base = lab.prepare().foundation
    by_rate = TokenUnlearning(fdr=0.05).stages(base)
    assert by_rate.key == TokenUnlearning(threshold=4.5041).stages(base).key


def test_a_resolved_rate_can_be_read_again() -> None:
    # A run's config.yaml has the rate and its threshold.
    once = TokenUnlearning(fdr=0.05)
    assert TokenUnlearning(**as_config(once)) == once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fdr": 0.05, "threshold": 4.0}, r"defense\.fdr 0\.05 and defense\.threshold 4\.0 both"),
        ({"fdr": 0.05, "rule": "mad"}, r"0\.05 does not act with rule 'mad'.*set defense\.thres"),
        ({"fdr": 0.05, "alpha": 0.01}, r"with rule 'top_fraction'.*set defense\.alpha"),
        ({"fdr": 0}, r"defense\.fdr must be above 0 and below 1, got 0"),
        ({"fdr": 1.0}, r"defense\.fdr must be above 0 and below 1, got 1\.0"),
        ({"fdr": "5%"}, r"defense\.fdr must be above 0 and below 1, got '5%'"),
    ],
)  # fmt: skip
def test_a_rate_that_cannot_act_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenUnlearning(**settings)
