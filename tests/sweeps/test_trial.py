"""One trial on a tiny victim: what it measures, what the defense sees, what is written."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

import orchestrator.trial as trial_module
from btu.defense import DEFENSES, DefenseContext, DefenseOutcome
from btu.errors import UserError
from btu.metrics import METRICS
from btu.training import NonFiniteLossError
from btu.types import Progress
from orchestrator.config import load_sweep, resolve
from orchestrator.store import ResultStore
from orchestrator.trial import TrialResult, run_and_store, run_trial

EVAL_ROWS = 30


def with_(cell: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = copy.deepcopy(cell)
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def run(config: dict[str, Any]) -> TrialResult:
    return run_trial(resolve(config))


def comparable(result: TrialResult) -> dict[str, str]:
    """Return all that does not depend on the clock; repr, so that NaN equals NaN."""
    return {k: repr(v) for k, v in result.metrics.items() if not k.startswith("seconds")}


# What is measured ------------------------------------------------------------------------------


def test_every_metric_is_there_and_no_other(trial_result: TrialResult) -> None:
    names = {name for name in trial_result.metrics if "/" not in name}
    assert names == set(METRICS)
    assert all(isinstance(value, int | float) for value in trial_result.metrics.values())


@pytest.mark.parametrize("state", ["", "undefended_", "tuned_"])
@pytest.mark.parametrize("name", ["asr", "cacc", "ftr"])
def test_every_rate_has_its_n_and_interval(
    trial_result: TrialResult, state: str, name: str
) -> None:
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


def test_rates_stand_on_the_rows_they_should(
    trial_result: TrialResult, corpus_folder: Path
) -> None:
    labels = pd.read_parquet(corpus_folder / "eval.parquet").label
    assert trial_result.metrics["cacc_n"] == len(labels) == EVAL_ROWS
    # ASR and FTR: rows that are not of the target class (1) already.
    assert trial_result.metrics["asr_n"] == trial_result.metrics["ftr_n"] == (labels != 1).sum()


def test_poisoned_rows_are_counted(trial_result: TrialResult) -> None:
    metrics = trial_result.metrics
    # 20 % of 80 rows, none of them of the target class before (dirty)
    assert (metrics["poisoned_rows"], metrics["relabeled_rows"]) == (16, 16)
    assert metrics["poison_rate_reached"] == 0.2
    assert (trial_result.notes["rows_train"], trial_result.notes["rows_clean"]) == (80, 20)
    assert (metrics["triggers_cut_train"], metrics["triggers_cut_eval"]) == (0, 0)


def test_the_label_mapping_is_recorded(trial_result: TrialResult) -> None:
    assert trial_result.label_names == tuple(trial_result.tags["labels"].split())


def test_every_stage_reports_its_epochs(trial_result: TrialResult) -> None:
    epochs = [(e["stage"], e["epoch"]) for e in trial_result.history]
    assert epochs == [
        ("poisoned fine-tune", 1),
        ("poisoned fine-tune", 2),
        ("exposure round 1", 1),
        ("exposure round 2", 1),
        ("exposure round 3", 1),
        ("clean tuning (defended)", 1),
        ("clean tuning (control)", 1),
    ]
    stages = {name.partition("/")[2] for name in trial_result.metrics if "/" in name}
    assert stages == {*dict(epochs), "unlearn", "evaluate"}
    parts = sum(v for k, v in trial_result.metrics.items() if k.startswith("seconds/"))
    assert parts <= trial_result.metrics["seconds"]


def test_the_token_table_agrees_with_the_metrics(trial_result: TrialResult) -> None:
    tokens, metrics = trial_result.tokens, trial_result.metrics
    assert tokens.flagged.sum() == metrics["flagged"] > 0
    hits = (tokens.flagged & tokens.trigger).sum()
    assert metrics["detection_precision"] == hits / tokens.flagged.sum()
    assert metrics["detection_recall"] == hits / tokens.trigger.sum()
    assert tokens[tokens.trigger].token.tolist() == ["cf"]
    assert {"drift_1", "drift_2", "drift_3", "count", "score"} <= set(tokens.columns)
    # 16 poisoned rows hold the trigger word once each, and none of them is cut.
    assert metrics["truncated_rows"] == 0
    assert tokens[tokens.trigger]["count"].item() == 16


def test_flagged_tokens_stand_with_the_most_suspicious_first(trial_result: TrialResult) -> None:
    table = trial_result.flagged_table()
    assert table.flagged.all()
    assert table.score.is_monotonic_decreasing


def test_the_data_and_the_machine_are_noted(trial_result: TrialResult) -> None:
    notes = trial_result.notes
    assert (notes["rows_train"], notes["rows_clean"], notes["rows_eval"]) == (80, 20, 30)
    assert trial_result.tags["device"] == "cpu"
    assert trial_result.tags["precision"] == "fp32"
    assert trial_result.tags["threads"] == "1"
    assert trial_result.tags["torch"] == str(torch.__version__)
    assert set(trial_result.tags) >= {"code", "host", "python", "transformers"}


def test_the_same_spec_gives_the_same_result(
    cell: dict[str, Any], trial_result: TrialResult
) -> None:
    torch.manual_seed(123)  # whatever ran before must not act
    again = run(cell)
    assert comparable(again) == comparable(trial_result)
    pd.testing.assert_frame_equal(again.tokens, trial_result.tokens)
    losses = [[e["loss"] for e in result.history] for result in (again, trial_result)]
    assert losses[0] == losses[1]


def test_another_seed_gives_another_result(cell: dict[str, Any], trial_result: TrialResult) -> None:
    other = run(with_(cell, seed=1))
    assert [e["loss"] for e in other.history] != [e["loss"] for e in trial_result.history]


def test_without_poison_there_is_nothing_to_find(cell: dict[str, Any]) -> None:
    result = run(with_(cell, attack={"poison_rate": 0}))
    metrics = result.metrics
    assert (metrics["poisoned_rows"], metrics["poison_rate_reached"]) == (0, 0)
    assert math.isnan(metrics["detection_recall"])
    assert math.isnan(metrics["detection_auprc"])
    assert math.isnan(metrics["sample_recall"])
    assert metrics["detection_precision"] == 0  # k tokens flagged, none of them right
    assert not result.tokens.trigger.any()
    for name in ("undefended_asr", "undefended_cacc", "tuned_asr", "asr", "cacc"):
        assert 0 <= metrics[name] <= 1


@pytest.mark.parametrize("attack", ["style", "syntactic"])
def test_an_attack_without_trigger_tokens_has_no_token_precision(
    cell: dict[str, Any], attack: str
) -> None:
    metrics = run(with_(cell, attack={"name": attack})).metrics
    for name in ("precision", "recall", "f1", "auprc"):
        assert math.isnan(metrics[f"detection_{name}"])
    # Which rows are poisoned is known all the same.
    assert 0 <= metrics["sample_recall"] <= 1
    assert metrics["flagged"] > 0


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "deberta-v2", "gpt2"])
@pytest.mark.slow
def test_every_architecture_runs(
    cell: dict[str, Any], victim_folder: Callable[[str], Path], architecture: str
) -> None:
    result = run(with_(cell, victim={"name": str(victim_folder(architecture))}))
    assert result.tokens.trigger.any()
    assert 0 <= result.metrics["asr"] <= 1


def test_progress_tells_every_epoch(cell: dict[str, Any], trial_result: TrialResult) -> None:
    told: list[Progress] = []
    run_trial(resolve(cell), told.append)
    assert [(p.stage, p.step) for p in told] == [
        (e["stage"], e["epoch"]) for e in trial_result.history
    ]


def test_a_gpu_that_is_not_there_is_named(cell: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"resources.gpu is 1.* no CUDA device is visible"):
        run(with_(cell, resources={"gpu": 1}))


def test_a_loss_that_explodes_names_step_and_settings(cell: dict[str, Any]) -> None:
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss became (nan|inf) in stage 'poisoned fine-tune' at step \d+.*1e\+30",
    ):
        run(with_(cell, train={"learning_rate": 1e30}))


def test_an_alpha_that_flags_everything_is_refused(cell: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"defense.alpha 0.99 flags all of the \d+ tokens"):
        run(with_(cell, defense={"alpha": 0.99}))


# What the defense sees -------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy:
    """A defense that keeps what it was given and changes nothing."""

    strength: float = 1.0

    seen = []  # noqa: RUF012
    checked = []  # noqa: RUF012

    def check(self, vocabulary: int) -> None:
        self.checked.append(vocabulary)

    def defend(self, context: DefenseContext) -> DefenseOutcome:
        self.seen.append(context)
        return DefenseOutcome(copy.deepcopy(context.model))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Spy]]:
    """The spy, registered as the defense ``spy`` for one test."""
    module = "tests_spy_defense"
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    monkeypatch.setattr(sys.modules[module], "Spy", Spy, raising=False)
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))
    DEFENSES.register("spy", f"{module}:Spy", "keeps what it is given")
    Spy.seen.clear()
    Spy.checked.clear()
    yield Spy
    Spy.seen.clear()


def spied(cell: dict[str, Any], **attack: Any) -> dict[str, Any]:
    return {**with_(cell, attack=attack), "defense": {"name": "spy", "strength": 2.0}}


@pytest.mark.parametrize("attack", ["badnets", "style"])
def test_the_defense_gets_neither_mask_nor_paraphrases(
    cell: dict[str, Any], spy: type[Spy], attack: str
) -> None:
    run(spied(cell, name=attack))
    (context,) = spy.seen
    assert {f.name for f in dataclasses.fields(context)} == {
        "victim", "train_rows", "train", "clean", "model", "settings", "tuning", "seed", "device",
        "progress", "history", "seconds",
    }  # fmt: skip
    # A column that equals the text would give the poisoned rows away.
    assert context.train_rows.columns == {}
    assert len(context.train_rows) == len(context.train) == 80
    assert len(context.clean) == 20


def test_a_defense_of_its_own_is_a_config_key_and_runs(
    cell: dict[str, Any], spy: type[Spy], tmp_path: Path
) -> None:
    spec = resolve(spied(cell))
    assert spec.build_defense() == Spy(2.0)
    store = ResultStore(tmp_path / "runs")
    record = run_and_store(spec, "k", "s", {}, store)
    assert record["status"] == "finished", record.get("traceback")
    metrics = record["metrics"]
    (vocabulary,) = spy.checked
    assert vocabulary > 100
    # It flags no tokens: detection does not apply, rather than being 0.
    assert not [name for name in metrics if name.startswith(("detection", "sample", "flagged"))]
    # It changes nothing: the model is the undefended one.
    for name in ("asr", "cacc", "ftr"):
        assert metrics[name] == metrics[f"undefended_{name}"]
    written = {p.name for p in store.path("k").iterdir()}
    assert written == {"result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json"}


def test_clean_tuning_of_defense_and_control_is_the_same(
    cell: dict[str, Any], spy: type[Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A defense that only tunes ends with the control's model.
    def tunes(self: Spy, context: DefenseContext) -> DefenseOutcome:
        model = copy.deepcopy(context.model)
        context.clean_tune(model, "clean tuning (defended)")
        return DefenseOutcome(model)

    monkeypatch.setattr(spy, "defend", tunes)
    config = spied(cell)
    config["tuning"] = {"learning_rate": 1e-2, "epochs": 2}
    result = run(config)
    for name in ("asr", "cacc", "ftr"):
        assert result.metrics[name] == result.metrics[f"tuned_{name}"]
    tuned = {e["stage"]: e["loss"] for e in result.history if e["stage"].startswith("clean")}
    assert len(set(tuned.values())) == 1


# What is written -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    made = ResultStore(tmp_path / "runs" / "s")
    made.prepare()
    return made


def test_a_finished_cell_is_written_whole(
    cell: dict[str, Any], store: ResultStore, trial_result: TrialResult
) -> None:
    spec = resolve(cell)
    key = spec.key("rows", "weights")
    record = run_and_store(spec, key, "s", {"seed": 0}, store)
    assert record["status"] == "finished"
    folder = store.path(key)
    assert {p.name for p in folder.iterdir()} == {
        "result.json", "config.yaml", "tokens.parquet", "flagged_tokens.json", "drift.png",
    }  # fmt: skip
    (read,) = store.records()
    assert (read["key"], read["sweep"], read["varied"]) == (key, "s", {"seed": 0})
    assert read["started"] < read["ended"]
    for name, value in comparable(trial_result).items():
        assert repr(read["metrics"][name]) == value
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tokens.parquet"), trial_result.tokens)
    flagged = json.loads((folder / "flagged_tokens.json").read_text())
    assert [row["token"] for row in flagged] == trial_result.flagged_table().token.tolist()
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    # The written config is a sweep file of the same cell.
    (again,) = load_sweep(folder / "config.yaml").cells()
    assert resolve(again.config).key("rows", "weights") == key
    yaml.safe_load((folder / "config.yaml").read_text())


def test_a_loss_that_explodes_is_a_failed_record(cell: dict[str, Any], store: ResultStore) -> None:
    spec = resolve(with_(cell, train={"learning_rate": 1e30}))
    record = run_and_store(spec, "k", "s", {}, store)
    assert record["status"] == "failed"
    assert record["reason"].startswith("loss became ")
    assert "lower the learning rate" in record["reason"]
    assert "NonFiniteLossError" in record["traceback"]
    assert store.is_failed("k")
    assert not store.is_done("k")
    assert [r["reason"] for r in store.failures()] == [record["reason"]]


def test_an_unexpected_exception_is_a_failed_record(
    cell: dict[str, Any], store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(trial_module, "poison", broken)
    record = run_and_store(resolve(cell), "k", "s", {}, store)
    assert record["status"] == "failed"
    assert record["reason"] == "ZeroDivisionError: deep inside"
    assert "in broken" in record["traceback"]
    assert set(record["tags"]) >= {"code", "host"}
    assert store.is_failed("k")


def test_an_interruption_is_no_failure(
    cell: dict[str, Any], store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_module, "poison", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_and_store(resolve(cell), "k", "s", {}, store)
    assert not store.is_failed("k")


def test_a_full_disk_is_no_result_of_the_trial(
    cell: dict[str, Any],
    store: ResultStore,
    monkeypatch: pytest.MonkeyPatch,
    trial_result: TrialResult,
) -> None:
    # Another machine may have room: the error escapes, so that Ray tries again.
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial_module, "run_trial", lambda *_: trial_result)
    monkeypatch.setattr(ResultStore, "commit", full)
    with pytest.raises(OSError, match="No space left"):
        run_and_store(resolve(cell), "k", "s", {}, store)
    assert not store.is_failed("k")


def test_the_code_version_starts_with_the_package_version() -> None:
    import btu

    assert trial_module.code_version().split("+")[0] == btu.__version__


def test_triggers_beyond_max_length_are_counted(cell: dict[str, Any]) -> None:
    # 8 tokens, 2 of them special, hold 6 pieces; the texts have at least 6 words before the
    # trigger finds its slot, so that of 16 triggers some are cut and some are not.
    metrics = run(with_(cell, victim={"max_length": 8})).metrics
    assert 0 < metrics["triggers_cut_train"] < metrics["poisoned_rows"] == 16
    assert 0 < metrics["triggers_cut_eval"] < metrics["asr_n"]


def test_the_threshold_free_score_does_not_move_with_alpha(cell: dict[str, Any]) -> None:
    # Round 2 trains without what round 1 flagged at alpha, so it must not be in the ranking.
    scores = [run(with_(cell, defense={"alpha": alpha})) for alpha in (0.01, 0.05)]
    one, other = (result.tokens.set_index("token_id").score for result in scores)
    assert one.equals(other)
    assert scores[0].metrics["detection_auprc"] == scores[1].metrics["detection_auprc"]
    assert scores[0].metrics["flagged"] < scores[1].metrics["flagged"]


def test_a_table_that_cannot_be_written_is_a_failed_record(
    cell: dict[str, Any], store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("count")

    monkeypatch.setattr("orchestrator.plots.drift_plot", broken)
    record = run_and_store(resolve(cell), "k", "tiny", {}, store)
    assert (record["status"], record["reason"]) == ("failed", "KeyError: 'count'")
    assert store.is_failed("k")
    assert record["tags"]["device"] == "cpu"
