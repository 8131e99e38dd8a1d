"""The controls: clean tuning, the cut of other tokens, and the model of the clean originals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from defending import SOME
from tiny_cells import Lab, own_stages

from btu.defenses.base import CLEAN_ROWS, DEFENSES, ORIGINALS, POISONED_MODEL, Defense
from btu.defenses.clean_fine_tune import CleanFineTune
from btu.defenses.clean_tuning import CleanTuning
from btu.defenses.cuts import FrequencyCut, RandomCut, as_frequent
from btu.defenses.token_unlearning import TokenUnlearning
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared
from btu.stage_files import load_encoded, model_of
from btu.stages import Stage, StageRun, compute, read_record
from btu.victims import Victim

pytestmark = pytest.mark.usefixtures("short_halves")

CPU = torch.device("cpu")
BAR: dict[str, Any] = {
    "rule": "contrast",
    "threshold": SOME,
    "exposure_learning_rate": 1e-3,
    "exposure_batch_size": 32,
}
CUTS = (RandomCut, FrequencyCut)


def suspects(lab: Lab, stage: Stage) -> Suspects:
    folder = compute(stage, lab.root)
    found = Suspects.load(folder, read_record(folder)["facts"])
    assert found is not None
    return found


def weights(lab: Lab, stage: Stage) -> dict[str, torch.Tensor]:
    folder = compute(stage, lab.root)
    run = StageRun({}, {}, {"model": folder}, lab.root, CPU)
    return dict(model_of(run, "model").state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cut(kind: type[TokenUnlearning], prepared: Prepared, **changes: Any) -> Stage:
    return kind(**BAR | changes).stages(prepared.foundation)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_takes_as_many_tokens_as_btu_and_none_of_its(
    lab: Lab, bert: Victim, kind: type[TokenUnlearning]
) -> None:
    prepared = lab.prepare()
    by_btu = suspects(lab, TokenUnlearning(**BAR).stages(prepared.foundation))
    drawn = suspects(lab, cut(kind, prepared)).flagged
    assert by_btu.flagged
    assert drawn is not None
    assert len(set(drawn)) == len(drawn) == len(by_btu.flagged)
    assert not set(drawn) & set(by_btu.flagged)
    rows = load_encoded(lab.root / prepared.foundation.rows.key / "train.safetensors")
    assert (rows.counts(1000)[list(drawn)] > 0).all()
    assert not set(drawn) & set(bert.tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_leaves_the_rest_of_the_words_to_the_tuning(
    lab: Lab, kind: type[TokenUnlearning]
) -> None:
    prepared = lab.prepare()
    stage = cut(kind, prepared)
    drawn = suspects(lab, stage).flagged
    # Not the clean-tuned control, which is the same except for the cut.
    assert not same(weights(lab, stage), weights(lab, prepared.foundation.tuned))
    # Without a cut it is.
    uncut = cut(kind, prepared, cut="none")
    assert suspects(lab, uncut).flagged == drawn
    assert same(weights(lab, uncut), weights(lab, prepared.foundation.tuned))


@pytest.mark.parametrize("kind", CUTS)
def test_nothing_is_cut_where_btu_flags_nothing(lab: Lab, kind: type[TokenUnlearning]) -> None:
    prepared = lab.prepare()
    stage = cut(kind, prepared, threshold=1000.0)
    assert suspects(lab, stage).flagged == ()
    assert same(weights(lab, stage), weights(lab, prepared.foundation.tuned))


def test_another_seed_draws_other_tokens(lab: Lab) -> None:
    stage = cut(RandomCut, lab.prepare())
    config = {**stage.config, "seed": 1}
    # The same poisoned model and flags: only the seed of the draw differs.
    other = dataclasses.replace(stage, config=config)
    drawn = [suspects(lab, one).flagged for one in (stage, other)]
    assert drawn[0] != drawn[1]


def test_a_token_is_replaced_by_one_as_frequent() -> None:
    counts = np.array([0, 100, 1, 90, 2, 1000, 40])
    rng = np.random.default_rng(0)
    # 1 occurs 100 times: token 3, 90 times, is nearest. 5, 1,000 times, then gets 6, since 3 is
    # taken: log(1000/40) is smaller than log(1000/2).
    assert as_frequent([1, 5], np.array([2, 3, 4, 6]), counts, rng) == [3, 6]
    # Ratios count, not differences: 2 is twice 1, and 90 is not near it.
    assert as_frequent([2], np.array([3, 4]), counts, rng) == [4]


def test_equally_frequent_tokens_are_drawn() -> None:
    counts, others = np.full(50, 7), np.arange(1, 50)
    drawn = {as_frequent([0], others, counts, np.random.default_rng(seed))[0] for seed in range(20)}
    assert len(drawn) > 5


def test_frequency_cut_takes_tokens_that_occur_about_as_often(lab: Lab) -> None:
    prepared = lab.prepare()
    by_btu = suspects(lab, TokenUnlearning(**BAR).stages(prepared.foundation)).flagged
    rows = load_encoded(lab.root / prepared.foundation.rows.key / "train.safetensors")
    logs = np.log(np.maximum(rows.counts(1000), 1))

    def distance(kind: type[TokenUnlearning]) -> float:
        drawn = suspects(lab, cut(kind, prepared)).flagged
        assert by_btu is not None
        assert drawn is not None
        return float(np.abs(logs[list(by_btu)] - logs[list(drawn)]).mean())

    assert distance(FrequencyCut) < distance(RandomCut)


def test_more_flags_than_other_tokens_are_refused(lab: Lab) -> None:
    # Almost every token of the training set reaches so low a bar.
    stage = cut(RandomCut, lab.prepare(), rule="top_fraction", threshold=None, alpha=0.7)
    with pytest.raises(UserError, match=r"tokens are flagged and only \d+ are left"):
        compute(stage, lab.root)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_shares_exposure_and_flags_with_btu(lab: Lab, kind: type[TokenUnlearning]) -> None:
    prepared = lab.prepare()
    base = prepared.foundation
    rounds = TokenUnlearning(**BAR).exposure(base)
    stages = {stage.name: stage for stage in own_stages(kind(**BAR), prepared)}
    assert stages["exposure round 3"].key == rounds["round 3"].key
    assert stages["flag tokens"].key == TokenUnlearning(**BAR).flags(base).key
    # Its keys are btu's: an axis over rule or threshold applies to all three.
    assert vars(kind(**BAR)) == vars(TokenUnlearning(**BAR))
    with pytest.raises(UserError, match="unknown rule"):
        kind(rule="contrst")


def test_clean_tuning_is_the_control_of_every_cell(lab: Lab) -> None:
    base = lab.prepare().foundation
    assert CleanTuning().stages(base) is base.tuned


def test_finetune_clean_starts_from_the_rows_before_the_poison(lab: Lab) -> None:
    prepared = lab.prepare()
    base = prepared.foundation_for(CleanFineTune.NEEDS)
    assert CleanFineTune().stages(base) is prepared.originals
    with pytest.raises(ValueError, match="take the foundation from"):
        CleanFineTune().stages(prepared.foundation)


def test_a_model_of_the_clean_originals_is_that_of_a_set_without_poison(lab: Lab) -> None:
    stage = lab.prepare().originals
    unpoisoned = lab.prepare(rate=0.0).foundation.model
    assert same(weights(lab, stage), weights(lab, unpoisoned))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("none", {POISONED_MODEL}),
        ("clean_tuning", {POISONED_MODEL, CLEAN_ROWS}),
        ("random_cut", {POISONED_MODEL, CLEAN_ROWS}),
        ("frequency_cut", {POISONED_MODEL, CLEAN_ROWS}),
        ("finetune_clean", {ORIGINALS}),
    ],
)
def test_controls_say_what_they_need(name: str, needs: set[str]) -> None:
    defense: type[Defense] = DEFENSES.load(name)
    assert defense.KIND == "control"
    assert set(defense.NEEDS) == needs
