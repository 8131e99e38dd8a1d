"""One cell on a tiny victim: what it measures and what is written."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from store_fixtures import Tried

import btu.scoring as trial_module
from btu import stealth
from btu.defenses.base import DEFENSES, Given
from btu.defenses.kit import cutting
from btu.defenses.kit.cutting import Costs
from btu.errors import UserError
from btu.findings import Suspects
from btu.foundation import Foundation, tune
from btu.metrics import METRICS
from btu.scoring import detection_metrics, flagged_table, row_table, token_table
from btu.stage_files import model_of, save_model
from btu.stages import Stage, StageRun, compute, read_record
from btu.stages import stage as stage_function
from btu.training import Encoded, NonFiniteLossError
from btu.types import Progress
from btu.victims import Victim, VictimSpec, find_victim
from orchestrator.report.marks import marks
from orchestrator.run.worker import Outcome, run_node
from orchestrator.store.store import Store
from orchestrator.sweep.load import load_sweep, resolve

if TYPE_CHECKING:
    from orchestrator.plan.planner import PlannedCell

EVAL_ROWS = 30
NAN = math.nan


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restore the number of threads: a trial sets it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def with_(cell: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = copy.deepcopy(cell)
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def comparable(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return all that does not depend on the clock; repr, so that NaN equals NaN."""
    return {k: repr(v) for k, v in metrics.items() if not k.startswith("seconds")}


def records(tried: Tried) -> dict[str, dict[str, Any]]:
    """Return the record of each stage of a cell, by name."""
    inputs = tried.stage.inputs.items()
    return {name: read_record(tried.root / stage.key) for name, stage in inputs}


# What is measured ------------------------------------------------------------------------------


RATES = ("asr", "cacc", "ftr")
SCORED = ("precision", "recall", "f1")


def test_every_metric_is_there_and_no_other(trial_result: Tried) -> None:
    names = {name for name in trial_result.metrics if "/" not in name}
    assert names <= set(METRICS)
    always = {
        *(f"{state}{name}" for state in ("", "undefended_", "tuned_") for name in RATES),
        *("poison_rate_reached", "poisoned_rows", "relabeled_rows", "truncated_rows"),
        *("triggers_cut_train", "triggers_cut_eval"),
        *("seconds", "seconds_defense", "clean_rows_used"),
    }
    found = {
        *(f"detection_{name}" for name in ("precision", "recall", "f1", "auprc")),
        *(f"{of}_{name}" for of in ("sample", "suspicion") for name in SCORED),
        *("sample_auroc", "flagged", "cut_cost", "cut_flips"),
    }
    spread = {f"{name}_{end}" for name in always | found for end in ("low", "high", "n")}
    # Each of the others belongs to a defense of another kind.
    assert names == always | found | (spread & set(METRICS))
    assert all(isinstance(value, int | float) for value in trial_result.metrics.values())


@pytest.mark.parametrize("state", ["", "undefended_", "tuned_"])
@pytest.mark.parametrize("name", ["asr", "cacc", "ftr"])
def test_every_rate_has_its_n_and_interval(trial_result: Tried, state: str, name: str) -> None:
    metrics = trial_result.metrics
    value, n = metrics[f"{state}{name}"], metrics[f"{state}{name}_n"]
    low, high = metrics[f"{state}{name}_low"], metrics[f"{state}{name}_high"]
    assert 0 <= low <= value <= high <= 1
    hits = value * n
    assert hits == pytest.approx(round(hits))
    # Wilson score interval at z = 1.96, solved for its ends: (p + z^2/2n -+ w) / (1 + z^2/n)
    z = 1.959964
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)


@pytest.mark.parametrize(
    ("prefix", "stage"),
    [
        ("", "evaluate defended"),
        ("undefended_", "evaluate undefended"),
        ("tuned_", "evaluate tuned"),
    ],
)
def test_rates_are_hits_over_rows_of_their_stage(
    trial_result: Tried, prefix: str, stage: str
) -> None:
    facts = records(trial_result)[stage]["facts"]
    for name in ("asr", "cacc", "ftr"):
        counts = facts[name]
        assert trial_result.metrics[f"{prefix}{name}"] == counts["hits"] / counts["n"]
        assert trial_result.metrics[f"{prefix}{name}_n"] == counts["n"]


def test_rates_stand_on_the_rows_they_should(trial_result: Tried, corpus_folder: Path) -> None:
    labels = pd.read_parquet(corpus_folder / "eval.parquet").label
    assert trial_result.metrics["cacc_n"] == len(labels) == EVAL_ROWS
    # ASR and FTR: rows that are not of the target class (1) already.
    assert trial_result.metrics["asr_n"] == trial_result.metrics["ftr_n"] == (labels != 1).sum()


def test_poisoned_rows_are_counted(trial_result: Tried) -> None:
    metrics, notes = trial_result.metrics, trial_result.result["notes"]
    # 20 % of 80 rows, none of them of the target class before (dirty)
    assert (metrics["poisoned_rows"], metrics["relabeled_rows"]) == (16, 16)
    assert metrics["poison_rate_reached"] == 0.2
    assert (notes["rows_train"], notes["rows_clean"], notes["rows_eval"]) == (80, 20, 30)
    assert (metrics["triggers_cut_train"], metrics["triggers_cut_eval"]) == (0, 0)


def test_the_label_mapping_is_recorded(trial_result: Tried) -> None:
    assert trial_result.result["label_names"] == ["0", "1"]
    assert trial_result.result["tags"]["labels"] == "0 1"


def test_every_stage_reports_its_epochs_and_its_time(trial_result: Tried) -> None:
    epochs = [(e["stage"], e["epoch"]) for e in trial_result.result["history"]]
    # In the order of the cell: control before defense, each trained for `epochs`.
    assert epochs == [
        ("poisoned fine-tune", 1),
        ("poisoned fine-tune", 2),
        ("clean tuning (control)", 1),
        ("exposure round 1", 1),
        ("exposure round 2", 1),
        ("exposure round 3", 1),
        ("clean tuning (defended)", 1),
    ]
    metrics = trial_result.metrics
    seconds = {n.partition("/")[2]: v for n, v in metrics.items() if n.startswith("seconds/")}
    assert seconds == {name: r["seconds"] for name, r in records(trial_result).items()}
    # What the cell costs alone, shared stages included.
    assert metrics["seconds"] == pytest.approx(sum(seconds.values()))


def test_a_cell_lasts_from_its_own_first_stage_to_its_last(trial_result: Tried) -> None:
    made = records(trial_result)
    # Round 2, unlearning and the scoring of the defended model belong to this cell alone.
    own = [record for record in made.values() if record["kind"] == "cell"]
    assert len(own) == 3
    assert trial_result.result["started"] == min(record["started"] for record in own)
    ends = [record["started"] + record["seconds"] for record in made.values()]
    assert trial_result.result["ended"] == max(ends)


def test_a_cell_does_not_last_from_what_it_took_over(
    cell: dict[str, Any], try_cell: Callable[..., Tried], tmp_path: Path
) -> None:
    tried = try_cell(cell, tmp_path)
    stages = tried.stage.inputs
    own = ("exposure round 2", "unlearn", "evaluate defended")
    for name in own[1:]:
        # As if an equal stage had been computed a week before.
        file = tmp_path / stages[name].key / "record.json"
        record = json.loads(file.read_text())
        old = {"started": record["started"] - 7 * 86400, "computed_as": "0" * 24}
        file.write_text(json.dumps({**record, **old}))
    shutil.rmtree(tried.folder)
    again = try_cell(cell, tmp_path)
    made = records(again)
    assert again.result["started"] == made[own[0]]["started"]
    # Without round 2 there is nothing of its own: it began with its flags, the last stage before.
    file = tmp_path / stages[own[0]].key / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "computed_as": "0" * 24}))
    shutil.rmtree(again.folder)
    last = try_cell(cell, tmp_path)
    left = [record["started"] for name, record in records(last).items() if name not in own]
    assert last.result["started"] == max(left)
    assert last.result["ended"] >= last.result["started"]
    # What it costs stays what it costs.
    assert comparable(last.metrics) == comparable(tried.metrics)


def test_a_cell_says_what_its_poisoned_rows_look_like_if_it_is_asked(
    cell: dict[str, Any],
    try_cell: Callable[..., Tried],
    trial_result: Tried,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A tiny encoder in place of the packaged one.
    tiny = VictimSpec(cell["victim"]["name"], 64)
    monkeypatch.setattr(stealth, "ENCODER", tiny)
    monkeypatch.setattr(stealth, "find_encoder", lambda: find_victim(tiny))
    tried = try_cell({**cell, "stealth": True})
    asked = {"perplexity_rise", "edit_distance", "embedding_similarity", "label_flips"}
    own = {name for name in tried.metrics if "/" not in name}
    assert own - trial_result.metrics.keys() == asked <= METRICS.keys()
    # All else is what it was, down to the last digit.
    assert comparable(trial_result.metrics).items() <= comparable(tried.metrics).items()
    # Dirty label: all 16 of 80 rows were of the other class, and one word was inserted in each.
    assert tried.metrics["label_flips"] == 1
    assert 0 < tried.metrics["edit_distance"] < 0.5
    # Without poison there is no such metric, rather than a 0.
    clean = try_cell(with_({**cell, "stealth": True}, attack={"poison_rate": 0.0}))
    assert not asked & clean.metrics.keys()


def test_the_token_table_agrees_with_the_metrics(trial_result: Tried) -> None:
    tokens, metrics = trial_result.tokens, trial_result.metrics
    assert tokens.flagged.sum() == metrics["flagged"] > 0
    hits = (tokens.flagged & tokens.trigger).sum()
    assert metrics["detection_precision"] == hits / tokens.flagged.sum()
    assert metrics["detection_recall"] == hits / tokens.trigger.sum()
    assert tokens[tokens.trigger].token.tolist() == ["cf"]
    assert {"drift_1", "drift_2", "drift_3", "count", "score"} <= set(tokens.columns)
    # 16 poisoned rows contain the trigger word once each, and none of them is cut.
    assert metrics["truncated_rows"] == 0
    assert tokens[tokens.trigger]["count"].item() == 16


def test_the_row_table_agrees_with_the_metrics(trial_result: Tried) -> None:
    rows, metrics = pd.read_parquet(trial_result.folder / "rows.parquet"), trial_result.metrics
    assert rows.columns.tolist() == ["poisoned", "suspicion", "top"]
    assert len(rows) == 80
    assert rows.poisoned.sum() == metrics["poisoned_rows"] == 16
    # The share of pairs of a poisoned and another row that are in order; ties count half.
    poisoned, others = (rows.suspicion[mask].to_numpy() for mask in (rows.poisoned, ~rows.poisoned))
    difference = poisoned[:, None] - others
    expected = ((difference > 0).sum() + (difference == 0).sum() / 2) / difference.size
    assert metrics["sample_auroc"] == pytest.approx(expected)
    assert rows.top.max() == trial_result.tokens.score.max()


def test_rows_at_the_bar_are_those_that_hold_a_flagged_token(
    cell: dict[str, Any], try_cell: Callable[..., Tried]
) -> None:
    # Chance flags 15,000 * P(a normal deviate exceeds 3) = 20 tokens of these few rows, at most.
    tried = try_cell(with_(cell, defense={"alpha": None, "threshold": 3.0}))
    rows, metrics = pd.read_parquet(tried.folder / "rows.parquet"), tried.metrics
    held = rows.top >= 3.0
    assert 0 < held.sum() < 80
    assert metrics["sample_precision"] == (held & rows.poisoned).sum() / held.sum()
    assert metrics["sample_recall"] == (held & rows.poisoned).sum() / 16
    # Round 3 alone, and its plot.
    epochs = {epoch["stage"] for epoch in tried.result["history"]}
    assert "exposure round 3" in epochs
    assert not epochs & {"exposure round 1", "exposure round 2"}
    assert (tried.folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert set(tried.tokens.columns) >= {"surplus", "label", "train_rows", "clean_rows", "drift_3"}


def test_a_flagged_token_that_is_not_cut_is_told_apart_with_the_reason(
    cell: dict[str, Any],
    try_cell: Callable[..., Tried],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(run: Any, model: Any, cutter: Any, flagged: list[int], bar: float) -> Costs:
        return Costs({flagged[0]: 0.5, flagged[1]: 0.0}, {flagged[0]: 0.35}, (flagged[0],))

    monkeypatch.setattr(cutting, "costs_of", refuse)
    defense = {"alpha": None, "threshold": 3.0, "max_cut_cost": 0.02}
    tried = try_cell(with_(cell, defense=defense), root=tmp_path)
    first, second, *_ = tried.flagged
    assert (first["vetoed"], first["cost"], first["cost_tuned"]) == (1, 0.5, 0.35)
    assert (second["vetoed"], second["cost"], second["cost_tuned"]) == (0, 0.0, None)
    # Detection is of all flagged tokens, in the table and in the metrics.
    assert tried.metrics["vetoed"] == 1
    assert tried.metrics["flagged"] == len(tried.flagged) > 1
    (mark,) = [mark for mark in marks(tried.result) if mark.name == "token vetoed"]
    assert mark.detail == (
        f"1 of {len(tried.flagged)} flagged tokens is not cut: after clean tuning the cut costs "
        "more than 0.02 of the clean rows"
    )


def test_a_rule_that_flags_nothing_leaves_the_control(
    cell: dict[str, Any], try_cell: Callable[..., Tried], tmp_path: Path
) -> None:
    # Nothing is a million sigmas. What is undefined is NaN, through the store as well.
    tried = try_cell(with_(cell, defense={"alpha": None, "threshold": 1e6}))
    store = Store(tmp_path / "store")
    store.prepare()
    for stage in tried.stage.closure():
        report = run_node(stage.node(), store, owner="me")
        assert report.outcome is Outcome.done, report.reason
    stored = store.read_json(tried.stage.key, "result.json")["metrics"]
    for metrics in (tried.metrics, {k: NAN if v is None else v for k, v in stored.items()}):
        assert metrics["flagged"] == 0
        for name in ("asr", "cacc", "ftr"):
            assert metrics[name] == metrics[f"tuned_{name}"]
        assert metrics["cut_cost"] == 0
        assert math.isnan(metrics["cut_flips"])
        assert math.isnan(metrics["detection_precision"])
        assert (metrics["detection_recall"], metrics["sample_recall"]) == (0, 0)
        # The scores are there all the same.
        assert 0 < metrics["detection_auprc"] <= 1
        assert 0 < metrics["sample_auroc"] <= 1
    assert tried.flagged == []


def test_what_the_defense_measured_of_itself_is_reported(trial_result: Tried) -> None:
    measured = records(trial_result)["unlearn"]["facts"]["measured"]
    assert measured == {name: trial_result.metrics[name] for name in ("cut_cost", "cut_flips")}
    # Of 20 clean rows, some whole number of them.
    assert measured["cut_cost"] * 20 == pytest.approx(round(measured["cut_cost"] * 20))
    assert 0 <= measured["cut_flips"] <= 1


def test_flagged_tokens_stand_with_the_most_suspicious_first(trial_result: Tried) -> None:
    table = flagged_table(trial_result.tokens)
    assert table.flagged.all()
    assert table.score.is_monotonic_decreasing
    assert [token["token"] for token in trial_result.flagged] == table.token.tolist()


def test_the_machine_and_what_was_computed_are_noted(trial_result: Tried) -> None:
    tags = trial_result.result["tags"]
    assert tags["device"] == "cpu"
    assert tags["precision"] == "fp32"
    assert tags["threads"] == "1"
    assert tags["torch"] == str(torch.__version__)
    assert set(tags) >= {"code", "host", "python", "transformers"}
    revisions = trial_result.stage.where["revisions"]
    assert revisions == {name: tags[name] for name in ("data", "victim", "recipe")}


def test_the_precision_of_every_stage_that_computes_is_told(trial_result: Tried) -> None:
    told = {name for name, record in records(trial_result).items() if record["precisions"]}
    # Neither rows nor what is read off the drifts depends on one.
    without = {name for name in trial_result.stage.inputs if name.endswith("rows")}
    without |= {"poison", "score tokens", "flag tokens"}
    assert told == set(trial_result.stage.inputs) - without


def test_several_precisions_are_all_in_the_tags(
    cell: dict[str, Any], try_cell: Callable[..., Tried], tmp_path: Path
) -> None:
    # As if the fine-tune had run where `auto` means another precision.
    tried = try_cell(cell, tmp_path)
    record = tmp_path / tried.stage.inputs["poisoned fine-tune"].key / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "precisions": ["bf16"]}))
    shutil.rmtree(tried.folder)
    assert try_cell(cell, tmp_path).result["tags"]["precision"] == "bf16, fp32"


def test_the_same_cell_gives_the_same_result(
    cell: dict[str, Any], try_cell: Callable[..., Tried], trial_result: Tried, tmp_path: Path
) -> None:
    torch.manual_seed(123)  # whatever ran before must have no effect
    again = try_cell(cell, tmp_path)
    assert again.folder != trial_result.folder
    assert comparable(again.metrics) == comparable(trial_result.metrics)
    pd.testing.assert_frame_equal(again.tokens, trial_result.tokens)
    losses = [[e["loss"] for e in tried.result["history"]] for tried in (again, trial_result)]
    assert losses[0] == losses[1]


def test_the_same_cell_stage_by_stage_gives_the_same_result(
    trial_result: Tried, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    for stage in trial_result.stage.closure():
        report = run_node(stage.node(), store, owner="me")
        assert report.outcome is Outcome.done, report.reason
    # Shown as the cell ends.
    assert report.facts == {name: trial_result.metrics[name] for name in ("asr", "cacc")}
    result = store.read_json(trial_result.stage.key, "result.json")
    metrics = {k: float("nan") if v is None else v for k, v in result["metrics"].items()}
    assert comparable(metrics) == comparable(trial_result.metrics)
    tokens = pd.read_parquet(store.fetch(trial_result.stage.key) / "tokens.parquet")
    pd.testing.assert_frame_equal(tokens, trial_result.tokens)


def test_another_seed_gives_another_result(
    cell: dict[str, Any], try_cell: Callable[..., Tried], trial_result: Tried
) -> None:
    other = try_cell(with_(cell, seed=1))
    losses = [[e["loss"] for e in tried.result["history"]] for tried in (other, trial_result)]
    assert losses[0] != losses[1]


def test_without_poison_there_is_nothing_to_find(
    cell: dict[str, Any], try_cell: Callable[..., Tried]
) -> None:
    tried = try_cell(with_(cell, attack={"poison_rate": 0}))
    metrics = tried.metrics
    assert (metrics["poisoned_rows"], metrics["poison_rate_reached"]) == (0, 0)
    assert math.isnan(metrics["detection_recall"])
    assert math.isnan(metrics["detection_auprc"])
    assert math.isnan(metrics["sample_recall"])
    assert math.isnan(metrics["sample_auroc"])
    assert metrics["detection_precision"] == 0  # k tokens flagged, none of them right
    assert not tried.tokens.trigger.any()
    for name in ("undefended_asr", "undefended_cacc", "tuned_asr", "asr", "cacc"):
        assert 0 <= metrics[name] <= 1


@pytest.mark.parametrize("attack", ["style", "syntactic"])
def test_an_attack_without_trigger_tokens_has_no_token_precision(
    cell: dict[str, Any], try_cell: Callable[..., Tried], attack: str
) -> None:
    metrics = try_cell(with_(cell, attack={"name": attack})).metrics
    for name in ("precision", "recall", "f1", "auprc"):
        assert math.isnan(metrics[f"detection_{name}"])
    # Which rows are poisoned is known all the same.
    assert 0 <= metrics["sample_recall"] <= 1
    assert metrics["flagged"] > 0
    # A trigger without fixed tokens cannot be cut off either.
    assert not [name for name in metrics if name.startswith("triggers_cut")]


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "deberta-v2", "gpt2"])
@pytest.mark.slow
def test_every_architecture_runs(
    cell: dict[str, Any],
    victim_folder: Callable[[str], Path],
    try_cell: Callable[..., Tried],
    architecture: str,
) -> None:
    tried = try_cell(with_(cell, victim={"name": str(victim_folder(architecture))}))
    assert tried.tokens.trigger.any()
    assert 0 <= tried.metrics["asr"] <= 1


def test_progress_tells_every_stage_and_epoch(trial_result: Tried, tmp_path: Path) -> None:
    told: list[Progress] = []
    compute(trial_result.stage, tmp_path, cpus=1, gpus=0, progress=told.append)
    # Each stage as it begins, then its epochs.
    began = [event.stage for event in told if event.step == 0]
    assert began == [stage.name for stage in trial_result.stage.closure()]
    epochs = [(event.stage, event.step) for event in told if event.step and event.metrics]
    assert sorted(epochs) == sorted(
        (e["stage"], e["epoch"]) for e in trial_result.result["history"]
    )


def test_a_trial_computes_only_what_is_not_there(
    trial_result: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr("btu.stages.run_stage", computed)
    folder = compute(trial_result.stage, trial_result.root, cpus=1, gpus=0)
    assert folder == trial_result.folder


def test_a_gpu_that_is_not_there_is_named(trial_result: Tried, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"resources.gpu is 1.* no CUDA device is visible"):
        compute(trial_result.stage, tmp_path, cpus=1, gpus=1)


def test_a_loss_that_explodes_names_step_and_settings(
    cell: dict[str, Any], try_cell: Callable[..., Tried]
) -> None:
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss became (nan|inf) in stage 'poisoned fine-tune' at step \d+.*1e\+30",
    ):
        try_cell(with_(cell, train={"learning_rate": 1e30}))


def test_an_alpha_that_flags_everything_is_refused(
    cell: dict[str, Any], try_cell: Callable[..., Tried], tmp_path: Path
) -> None:
    # Not while planning: how many tokens occur is known with the rows alone.
    with pytest.raises(UserError, match=r"defense.alpha 0.99 flags all of the \d+ tokens"):
        try_cell(with_(cell, defense={"alpha": 0.99}), tmp_path)


def test_triggers_beyond_max_length_are_counted(
    cell: dict[str, Any], try_cell: Callable[..., Tried]
) -> None:
    # 8 tokens, 2 of them special, fit 6 pieces; the texts have at least 6 words before the
    # trigger finds its slot, so that of 16 triggers some are cut and some are not.
    metrics = try_cell(with_(cell, victim={"max_length": 8})).metrics
    assert 0 < metrics["triggers_cut_train"] < metrics["poisoned_rows"] == 16
    assert 0 < metrics["triggers_cut_eval"] < metrics["asr_n"]


def test_the_threshold_free_score_does_not_move_with_alpha(
    cell: dict[str, Any], try_cell: Callable[..., Tried], trial_result: Tried
) -> None:
    # Round 2 trains without what round 1 flagged at alpha, so it must not be in the ranking.
    tried = [trial_result, try_cell(with_(cell, defense={"alpha": 0.05}))]
    one, other = (each.tokens.set_index("token_id").score for each in tried)
    assert one.equals(other)
    first, second = (each.metrics for each in tried)
    assert first["detection_auprc"] == second["detection_auprc"]
    assert first["flagged"] < second["flagged"]


# The scoring itself ----------------------------------------------------------------------------


def test_detection_is_as_counted_by_hand() -> None:
    # Token 7 is the trigger, rows 0 and 1 are poisoned; 7 and 5 were flagged.
    train = Encoded.from_lists([[1, 7], [7, 2], [5, 1], [3]], [1, 1, 0, 0], pad_id=0)
    mask = np.array([True, True, False, False])
    scores = np.full(10, np.nan)
    scores[[1, 2, 3, 5, 7]] = [-5, -4, -3, -1, -2]
    found = detection_metrics(Suspects((7, 5), scores), mask, frozenset({7}), train)
    assert found["flagged"] == 2
    # 1 of 2 flagged tokens is the trigger's; its only token was flagged.
    assert (found["detection_precision"], found["detection_recall"]) == (0.5, 1)
    assert found["detection_f1"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    # Rows 0, 1 and 2 contain a flagged token; 0 and 1 are poisoned.
    assert found["sample_precision"] == pytest.approx(2 / 3)
    assert found["sample_recall"] == 1
    # The trigger stands second in the ranking: precision 1/2 where its recall jumps to 1.
    assert found["detection_auprc"] == pytest.approx(0.5)


def test_a_defense_that_ranks_nothing_has_no_ranking_score() -> None:
    train = Encoded.from_lists([[7]], [1], pad_id=0)
    found = detection_metrics(Suspects((7,)), np.array([True]), frozenset({7}), train)
    assert "detection_auprc" not in found
    assert found["detection_precision"] == 1
    assert detection_metrics(None, np.array([True]), frozenset({7}), train) == {}


def test_rows_are_told_by_hand() -> None:
    train = Encoded.from_lists([[1, 7], [7, 2], [3], []], [1, 1, 0, 0], pad_id=0)
    mask = np.array([True, True, False, False])
    scores = np.full(10, NAN)
    scores[[1, 2, 7]] = [5.0, 1.0, 3.0]
    suspects = Suspects((1,), scores, {}, np.array([2.0, 0.5, 1.0, 0.0]))
    table = row_table(suspects, mask, train)
    assert table.poisoned.tolist() == mask.tolist()
    assert table.suspicion.tolist() == [2.0, 0.5, 1.0, 0.0]
    # The higher of 5 and 3, and of 3 and 1; 3 has no score, the last row has no token.
    assert table.top.tolist() == [5.0, 3.0, -math.inf, -math.inf]
    # 2 is above 1 and 0, 0.5 above 0 alone: 3 of 4 pairs.
    found = detection_metrics(suspects, mask, frozenset({7}), train)
    assert found["sample_auroc"] == pytest.approx(0.75)


def test_rows_over_the_bar_are_counted_by_hand() -> None:
    train, mask = Encoded.from_lists([[7]] * 5, [1] * 5, pad_id=0), np.array([1, 1, 1, 0, 0]) > 0
    rows = np.array([2.0, 0.5, 0.1, 1.0, 0.0])
    found = detection_metrics(Suspects((7,), rows=rows, row_bar=0.5), mask, frozenset({7}), train)
    # 2.0, 0.5 and 1.0 reach 0.5, two of them poisoned; of the poisoned ones 0.1 does not. That the
    # token is in all 5 rows changes nothing.
    assert (found["suspicion_precision"], found["suspicion_precision_n"]) == (2 / 3, 3)
    assert (found["suspicion_recall"], found["suspicion_recall_n"]) == (2 / 3, 3)
    assert found["suspicion_f1"] == pytest.approx(2 / 3)
    higher = Suspects((7,), rows=rows, row_bar=1.5)
    found = detection_metrics(higher, mask, frozenset({7}), train)
    # 2.0 alone: 2 * 1 * (1/3) / (4/3) = 1/2
    assert (found["suspicion_precision"], found["suspicion_recall"]) == (1, 1 / 3)
    assert found["suspicion_f1"] == pytest.approx(0.5)
    assert found["sample_precision"] == 3 / 5
    assert set(found) <= set(METRICS)


def test_without_a_bar_no_row_is_said_to_be_over_it() -> None:
    train, mask = Encoded.from_lists([[7]] * 2, [1] * 2, pad_id=0), np.array([True, False])
    found = detection_metrics(Suspects((7,), rows=np.ones(2)), mask, frozenset({7}), train)
    undefined = ("suspicion_precision", "suspicion_recall", "suspicion_f1")
    assert [name for name in undefined if not math.isnan(found[name])] == []
    assert (found["suspicion_precision_n"], found["suspicion_recall_n"]) == (0, 0)


def test_of_rows_that_nobody_scored_the_mask_is_told() -> None:
    train, mask = Encoded.from_lists([[7]], [1], pad_id=0), np.array([True])
    assert row_table(None, mask, train).columns.tolist() == ["poisoned"]
    assert row_table(Suspects((7,)), mask, train).columns.tolist() == ["poisoned"]
    assert "sample_auroc" not in detection_metrics(Suspects((7,)), mask, frozenset({7}), train)


def test_the_table_holds_candidates_and_whatever_was_flagged(bert: Victim) -> None:
    scores = np.full(20, np.nan)
    scores[[6, 9]] = [-1.0, -2.0]
    # 3 was flagged without being a candidate.
    made = token_table(Suspects((6, 3), scores, {"count": np.arange(20)}), bert, frozenset({9}))
    assert made.token_id.tolist() == [3, 6, 9]
    assert made.flagged.tolist() == [True, True, False]
    assert made.trigger.tolist() == [False, False, True]
    assert made["count"].tolist() == [3, 6, 9]
    assert made.token.tolist() == bert.tokenizer.convert_ids_to_tokens([3, 6, 9])


def test_without_a_ranking_the_table_holds_what_was_flagged(bert: Victim) -> None:
    made = token_table(Suspects((9, 6)), bert, None)
    assert made.token_id.tolist() == [6, 9]
    assert made.score.isna().all()
    assert not made.trigger.any()
    assert token_table(None, bert, None).empty


# A defense of one's own ------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy:
    """A defense that changes nothing, or only tunes; it looks for no tokens."""

    strength: float = 1.0

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = ("poisoned model", "clean rows")

    def check(self, given: Given) -> None:
        CHECKED.append(given)

    def stages(self, base: Foundation) -> Stage:
        config = {"strength": self.strength, **base.tuning_config()}
        return base.stage(
            watch,
            "spy",
            config,
            {"rows": base.rows, "clean": base.clean, "model": base.model},
            model=True,
            kind="cell",
        )


CHECKED: list[Given] = []


@stage_function(version=1)
def watch(run: StageRun) -> dict[str, Any]:
    """Pass the poisoned model on, tuned if the strength is 2; report false metrics if it is 4."""
    model = model_of(run, "model")
    if run.config["strength"] == 2:
        tune(run, model, "clean tuning (spy)")
    save_model(model, run.folder)
    return {"measured": {"asr": 0.0}} if run.config["strength"] == 4 else {}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch, cell: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A function from the spy's strength, and other sections, to a config; for one test."""
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    DEFENSES.register("spy", f"{__name__}:Spy", "hands the model on")
    CHECKED.clear()

    def build(strength: float = 1.0, **sections: Any) -> dict[str, Any]:
        return {**with_(cell, **sections), "defense": {"name": "spy", "strength": strength}}

    return build


def test_a_defense_of_its_own_is_a_config_key_and_runs(
    spied: Callable[..., Any], try_cell: Callable[..., Tried]
) -> None:
    config = spied(strength=3.0)
    assert resolve(config).build_defense() == Spy(3.0)
    tried = try_cell(config)
    (given,) = CHECKED
    vocabulary = given.vocabulary
    assert vocabulary is not None
    assert vocabulary > 100
    assert given == Given(vocabulary, classes=2, train_rows=80, clean_rows=20)
    # It flags no tokens: detection does not apply, rather than being 0.
    metrics = tried.metrics
    found = ("detection", "sample", "suspicion", "flagged")
    assert not [name for name in metrics if name.startswith(found)]
    # It changes nothing: the model is the undefended one.
    for name in ("asr", "cacc", "ftr"):
        assert metrics[name] == metrics[f"undefended_{name}"]
    assert tried.tokens.empty
    assert tried.flagged == []
    # Without drift there is nothing to plot.
    assert {path.name for path in tried.folder.iterdir()} == {
        "record.json", "result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json",
        "rows.parquet",
    }  # fmt: skip
    # Nor is any row suspicious; which are poisoned is known all the same.
    rows = pd.read_parquet(tried.folder / "rows.parquet")
    assert rows.columns.tolist() == ["poisoned"]
    assert rows.poisoned.sum() == metrics["poisoned_rows"] == 16


def test_no_defense_is_a_cell_that_adds_nothing(
    cell: dict[str, Any], try_cell: Callable[..., Tried], trial_result: Tried
) -> None:
    tried = try_cell({**cell, "defense": {"name": "none"}})
    metrics = tried.metrics
    for name in ("asr", "cacc", "ftr"):
        assert metrics[name] == metrics[f"undefended_{name}"]
        assert metrics[f"undefended_{name}"] == trial_result.metrics[f"undefended_{name}"]
    found = ("detection", "sample", "suspicion", "flagged")
    assert not [name for name in metrics if name.startswith(found)]
    assert tried.tokens.empty
    assert tried.result["config"]["defense"] == {"name": "none"}
    # One evaluation under two names takes its time once.
    stages = {stage.key: stage for stage in tried.stage.inputs.values()}
    took = sum(read_record(tried.root / key)["seconds"] for key in stages)
    assert metrics["seconds"] == pytest.approx(took)
    assert metrics["seconds/evaluate defended"] == metrics["seconds/evaluate undefended"] > 0


def test_a_defense_does_not_say_what_the_scorer_says(
    spied: Callable[..., Any], try_cell: Callable[..., Tried]
) -> None:
    message = r"stage 'spy' measures \['asr'\], which only the scorer may"
    with pytest.raises(ValueError, match=message):
        try_cell(spied(strength=4.0))


def test_clean_tuning_of_defense_and_control_is_the_same(
    spied: Callable[..., Any], try_cell: Callable[..., Tried]
) -> None:
    # A defense that only tunes ends with the control's model.
    tried = try_cell(spied(2, tuning={"learning_rate": 1e-2, "epochs": 2}))
    for name in ("asr", "cacc", "ftr"):
        assert tried.metrics[name] == tried.metrics[f"tuned_{name}"]
    losses: dict[str, list[float]] = {}
    for epoch in tried.result["history"]:
        losses.setdefault(epoch["stage"], []).append(epoch["loss"])
    assert len(losses["clean tuning (spy)"]) == 2
    assert losses["clean tuning (spy)"] == losses["clean tuning (control)"]


# What is written -------------------------------------------------------------------------------


def test_a_cell_is_written_whole(
    trial_result: Tried, plan_cell: Callable[..., PlannedCell]
) -> None:
    folder = trial_result.folder
    assert {path.name for path in folder.iterdir()} == {
        "record.json", "result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json",
        "rows.parquet", "drift.png",
    }  # fmt: skip
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    flagged = json.loads((folder / "flagged_tokens.json").read_text())
    assert {"token_id", "token", "score", "flagged", "trigger"} <= set(flagged[0])
    assert len(flagged) == trial_result.metrics["flagged"]
    # The written config is a sweep file of the same cell.
    (again,) = load_sweep(folder / "config.yaml").cells()
    assert plan_cell(again.config).key == trial_result.stage.key
    # Its keys are those of the result, but for null splits, which hold a role out in a sweep file.
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert {"clean_split", "eval_split"}.isdisjoint(written["data"])
    for split in ("clean_split", "eval_split"):
        written["data"][split] = None
    assert written == trial_result.result["config"]


def test_a_result_is_strict_json(cell: dict[str, Any], try_cell: Callable[..., Tried]) -> None:
    tried = try_cell(with_(cell, attack={"poison_rate": 0}))
    text = (tried.folder / "result.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["metrics"]["detection_recall"] is None


def test_a_plot_that_cannot_be_drawn_is_a_failure_of_the_cell(
    trial_result: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("count")

    store = Store(tmp_path / "store")
    store.prepare()
    *stages, last = trial_result.stage.closure()
    for stage in stages:
        made = store.workspace(stage.key)
        shutil.copytree(trial_result.root / stage.key, made, dirs_exist_ok=True)
        store.publish(stage.key, made, stage.name, {})
    monkeypatch.setattr(trial_module, "drift_plot", broken)
    report = run_node(last.node(), store, owner="me")
    assert (report.outcome, report.reason) == (Outcome.failed, "KeyError: 'count'")
    failure = store.failure(last.key)
    assert failure is not None
    assert "in broken" in failure["traceback"]
