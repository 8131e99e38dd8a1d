"""The stages of a cell: what changes their keys, what they write to disk, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cells import MAX_LENGTH, Lab, files_in, own_stages, write_corpus

from btu.attacked import HIDDEN, mask_of
from btu.attacks.badnets import BadNets
from btu.attacks.poisoning import ATTACKS, PoisonSpec, poison, triggered_eval
from btu.data.spec import DataSpec
from btu.defenses.base import DEFENSES, Defense, Given
from btu.defenses.token_unlearning import TokenUnlearning
from btu.errors import UserError
from btu.findings import Suspects
from btu.foundation import Foundation, tune
from btu.metrics import Proportion
from btu.recipe import CellInputs, Prepared, evaluation, prepare, scores_of
from btu.rules.base import RULES
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import model_of, read_rows, save_model, training_rows_of, victim_of, write_rows
from btu.stages import MODEL, Stage, StageRun, compute, read_record, run_stage
from btu.stages import stage as stage_function
from btu.types import Corpus, IntArray, ProgressCallback, Rows, silent
from btu.victims import Victim, VictimSpec

CPU = torch.device("cpu")
VOCABULARY = 400


def evaluations(prepared: Prepared, defense: Defense) -> list[Stage]:
    """The stages that a cell ends with; they depend on all others."""
    base = prepared.foundation
    return [
        evaluation(prepared, base.model, "undefended"),
        evaluation(prepared, base.tuned, "tuned"),
        evaluation(prepared, defense.stages(base), "defended", kind="cell"),
    ]


def by_name(prepared: Prepared, defense: Defense) -> dict[str, Stage]:
    """All stages of a cell."""
    return {s.name: s for last in evaluations(prepared, defense) for s in last.closure()}


# What moves which key --------------------------------------------------------------------------

SPECS: dict[str, Any] = {
    "data": DataSpec("tiny", path="/data/tiny"),
    "victim": VictimSpec("/models/tiny", MAX_LENGTH),
    "attack": PoisonSpec(poison_rate=0.2),
    "train": TrainSettings(),
    "tuning": TuningSettings(),
    # With all three rounds. The other rules: `test_what_a_rule_without_round_2...`.
    "defense": TokenUnlearning(alpha=0.0005),
}
ARGUMENTS: dict[str, Any] = {
    "data_fingerprints": {"train": "d" * 64, "clean": "c" * 64, "eval": "e" * 64},
    "victim_identity": "v" * 64,
    "attack_params": {"trigger": ["cf"]},
    "seed": 0,
    "counts": {"rows_train": 240, "rows_clean": 60, "rows_eval": 60},
}


def declared(changes: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages of a cell with these config keys changed, by name; nothing is read or run."""
    specs, arguments = dict(SPECS), dict(ARGUMENTS)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            specs[section] = dataclasses.replace(specs[section], **{name: value})
        else:
            arguments[key] = value
    defense = specs.pop("defense")
    specs["poison"] = specs.pop("attack")
    return by_name(prepare(CellInputs(**specs, **arguments)), defense)


EVALUATED = {"evaluation rows", "evaluate undefended", "evaluate tuned", "evaluate defended"}
ROWS = {"training rows", "clean rows", "evaluation rows"}
ATTACKED = {"poison", "triggered rows"}
ROUNDS = {"exposure round 1", "exposure round 2", "exposure round 3"}
DEFENDED = {"unlearn", "evaluate defended"}
# What the scores move, and what a threshold does.
FLAGS = {"score tokens", "flag tokens"}
SCORED, FLAGGED = FLAGS | DEFENDED, {"flag tokens"} | DEFENDED
# Behind `contradicted: relabel`.
HALVES = {"model of clean half 1", "model of clean half 2"}
SECOND = HALVES | {"contradicted rows"}
TUNED = {"clean tuning (control)", "evaluate tuned"}
TRAINED = {"poisoned fine-tune", "evaluate undefended"} | TUNED | DEFENDED
BUT_POISON = ROWS | ROUNDS | FLAGS | TRAINED
ALL = BUT_POISON | ATTACKED
# Clean rows are drawn from no seed and no attack.
BUT_CLEAN = ALL - {"clean rows"}
# What the poisoned training set acts on.
POISONED = BUT_CLEAN - {"triggered rows", "evaluation rows"}

ROLES = ARGUMENTS["data_fingerprints"]

MOVES: list[tuple[str, Any, set[str]]] = [
    # The location of rows and weights has no effect: keys contain their hashes.
    ("data.path", "/elsewhere/tiny", set()),
    ("data.name", "called-otherwise", set()),
    # A role affects the stages that read it: scoring on more rows trains nothing again.
    ("data_fingerprints", {**ROLES, "train": "0" * 64}, POISONED),
    ("data_fingerprints", {**ROLES, "clean": "0" * 64}, {"clean rows"} | TUNED | SCORED),
    ("data_fingerprints", {**ROLES, "eval": "0" * 64}, {"triggered rows"} | EVALUATED),
    ("victim.name", "/elsewhere/model", set()),
    ("victim_identity", "w" * 64, BUT_POISON),
    ("victim.max_length", 32, BUT_POISON),
    ("victim.sha256", "0" * 64, set()),
    ("victim.revision", "v2", set()),  # of a hub model; it is part of the identity
    ("victim.trust_remote_code", True, set()),
    ("victim.allow_pickle", True, set()),
    ("seed", 1, BUT_CLEAN),
    ("attack_params", {"trigger": ["mn"]}, BUT_CLEAN),
    ("attack.name", "addsent", BUT_CLEAN),
    ("attack.poison_rate", 0.1, POISONED),
    ("attack.target_label", 0, BUT_CLEAN),
    ("attack.label_mode", "mixed", POISONED),
    ("attack.insert", "append", POISONED),
    ("attack.cover_rate", 0.1, POISONED),
    # The exposure rounds have settings of their own, except for these two.
    ("train.precision", "fp32", TRAINED | ROUNDS | FLAGS),
    ("train.weight_decay", 0.1, TRAINED | ROUNDS | FLAGS),
    ("train.epochs", 1, TRAINED),
    ("train.learning_rate", 1e-4, TRAINED),
    ("train.batch_size", 32, TRAINED),
    ("train.warmup_fraction", 0.0, TRAINED),
    ("train.schedule", "constant", TRAINED),
    ("train.max_grad_norm", None, TRAINED),
    ("tuning.epochs", 2, TUNED | DEFENDED),
    ("tuning.learning_rate", 1e-4, TUNED | DEFENDED),
    # Round 2 drops what round 1 flagged; it has no part in the scores.
    ("defense.alpha", 0.01, {"exposure round 2"} | FLAGGED),
    ("defense.exclude", "cls_sep", {"exposure round 2"} | SCORED),
    ("defense.removal", "substring", {"exposure round 2"} | FLAGGED),
    ("defense.exposure_epochs", 2, ROUNDS | SCORED),
    ("defense.exposure_learning_rate", 1e-4, ROUNDS | SCORED),
    ("defense.exposure_schedule", "linear", ROUNDS | SCORED),
    ("defense.bag_batch_size", 32, ROUNDS - {"exposure round 3"} | SCORED),
    ("defense.bag_embeddings", "full", ROUNDS - {"exposure round 3"} | SCORED),
    ("defense.bag_pooling", "padded", ROUNDS - {"exposure round 3"} | SCORED),
    ("defense.exposure_batch_size", 32, {"exposure round 3"} | SCORED),
    ("defense.cut", "row", DEFENDED),
    ("defense.cut_norm", "running", DEFENDED),
    ("defense.max_cut_cost", 0.1, DEFENDED),
    ("counts", {}, set()),  # estimates of time
]


@pytest.mark.parametrize(("key", "value", "expected"), MOVES, ids=[key for key, _, _ in MOVES])
def test_what_moves_which_stage(key: str, value: Any, expected: set[str]) -> None:
    # The trigger of the table is badnets' own.
    changes = {key: value, **({"attack_params": {}} if value == "addsent" else {})}
    before, after = declared({}), declared(changes)
    assert set(before) == set(after) == ALL
    assert {name for name in ALL if before[name].key != after[name].key} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # What is scored carries the trigger; what is trained on does not.
        ({"attack.name": "addsent", "attack_params": {}}, {"triggered rows"} | EVALUATED),
        ({"attack.name": "style", "attack_params": {}}, {"triggered rows"} | EVALUATED),
        ({"attack_params": {"trigger": ["mn"]}}, {"triggered rows"} | EVALUATED),
        ({"attack.target_label": 0}, {"triggered rows"} | EVALUATED),
        ({"attack.label_mode": "mixed"}, set()),
        ({"attack.insert": "append"}, set()),
        ({"attack.cover_rate": 0.1}, set()),
        ({"data_fingerprints": {**ROLES, "train": "0" * 64}}, POISONED),
        # Nothing is drawn.
        ({"seed": 1}, BUT_CLEAN - {"poison", "training rows"}),
    ],
)
def test_without_poison_all_attacks_share_what_is_trained(
    changes: dict[str, Any], expected: set[str]
) -> None:
    before = declared({"attack.poison_rate": 0.0})
    after = declared({"attack.poison_rate": 0.0, **changes})
    assert set(before) == set(after) == ALL
    assert {name for name in ALL if before[name].key != after[name].key} == expected


ELSEWHERE = ("rounds", "rule", "threshold", "fdr", "contradicted")


def test_the_table_above_has_every_config_key() -> None:
    listed = {key for key, _, _ in MOVES}
    for section, spec in SPECS.items():
        keys = {f"{section}.{field.name}" for field in dataclasses.fields(spec)}
        if section == "data":
            # Each of them acts through the rows, if it does: the next test.
            continue
        # Rounds that do not run are not stages (`test_rounds_that_do_not_run...`), and alpha is the
        # threshold of its rule (`test_what_a_rule_without_round_2...`). A rate states a threshold
        # (`test_cutting.py`).
        # With the second stage there are more stages (`test_the_second_stage...`).
        elsewhere = {f"defense.{name}" for name in ELSEWHERE}
        assert keys - listed == (elsewhere if section == "defense" else set())
    arguments = {field.name for field in dataclasses.fields(CellInputs)}
    assert arguments == {*ARGUMENTS, "data", "victim", "poison", "train", "tuning"}


def test_of_the_data_only_the_rows_act() -> None:
    other = {
        "data.path": None,
        "data.name": "sst2",
        "data.clean_fraction": 0.2,
        "data.max_train_rows": 100,
        "data.split_seed": 1,
        "data.revision": "main",
    }
    before, after = declared({}), declared(other)
    assert {name for name in ALL if before[name].key != after[name].key} == set()


def test_rounds_that_do_not_run_are_no_stages_and_leave_the_others() -> None:
    before, after = declared({}), declared({"defense.rounds": [1, 3]})
    assert set(before) - set(after) == {"exposure round 2"}
    assert {name for name in after if before[name].key != after[name].key} == FLAGGED


def contrast(**changes: Any) -> dict[str, Stage]:
    """The stages of a cell whose rule takes round 3 alone, by name."""
    return by_name(
        prepare(
            CellInputs(
                **{name: spec for name, spec in SPECS.items() if name not in ("attack", "defense")},
                poison=SPECS["attack"],
                **ARGUMENTS,
            )
        ),
        TokenUnlearning(**changes),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"threshold": 5.0}, FLAGGED),
        ({"rule": "frequency", "contradicted": "relabel"}, SCORED),
        ({"exclude": "cls_sep"}, SCORED),
        ({"exposure_batch_size": 32}, {"exposure round 3"} | SCORED),
        # Named or null, the defaults are the same.
        ({"rule": "contrast", "threshold": 4.5, "rounds": [3]}, set()),
        # They act in rounds that do not run.
        ({"removal": "substring"}, set()),
        ({"bag_batch_size": 32}, set()),
        ({"bag_embeddings": "full"}, set()),
        ({"bag_pooling": "padded"}, set()),
    ],
)
def test_what_a_rule_without_round_2_moves(changes: dict[str, Any], expected: set[str]) -> None:
    before, after = contrast(), contrast(**changes)
    assert set(before) == set(after) == (ALL | SECOND) - {"exposure round 1", "exposure round 2"}
    assert {name for name in before if before[name].key != after[name].key} == expected


def test_the_second_stage_adds_stages_and_moves_the_cut_alone() -> None:
    relabel, keep = contrast(), contrast(contradicted="keep")
    assert set(relabel) - set(keep) == SECOND
    assert {name for name in keep if relabel[name].key != keep[name].key} == DEFENDED
    # Only contrast has it by default.
    assert SECOND.isdisjoint(contrast(rule="mad"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        # The models of the clean rows are shared by attacks and rates.
        ("attack.poison_rate", 0.01, {"contradicted rows"}),
        ("attack.name", "addsent", {"contradicted rows"}),
        ("seed", 1, SECOND),
        ("train.epochs", 1, SECOND),
        ("train.precision", "fp32", SECOND),
        ("tuning.epochs", 2, set()),
    ],
)
def test_what_moves_the_second_stage(key: str, value: Any, expected: set[str]) -> None:
    changes = {"attack_params": {}} if value == "addsent" else {}
    rule = {"defense.contradicted": "relabel"}
    before, after = declared(rule), declared({**rule, key: value, **changes})
    assert {name for name in SECOND if before[name].key != after[name].key} == expected


def test_rules_share_their_rounds_with_each_other() -> None:
    # Whichever rule reads it, a drift is the same drift.
    three = declared({})
    for rule in RULES:
        stages = contrast(rule=rule)
        assert stages["exposure round 3"].key == three["exposure round 3"].key
    both = contrast(rule="mad", rounds=[1, 3])
    assert both["exposure round 1"].key == three["exposure round 1"].key
    assert both["unlearn"].key != contrast(rule="mad")["unlearn"].key


def test_the_control_and_the_defense_tune_alike() -> None:
    stages = declared({"tuning.epochs": 2})
    tuned, unlearned = stages["clean tuning (control)"], stages["unlearn"]
    assert tuned.config["tuning"] == unlearned.config["tuning"]
    assert tuned.config["tuning"]["epochs"] == 2
    assert tuned.config["seed"] == unlearned.config["seed"]
    assert {tuned.inputs["clean"].key} == {unlearned.inputs["clean"].key}


def test_the_versions_of_an_attack_act(monkeypatch: pytest.MonkeyPatch) -> None:
    before = declared({})
    monkeypatch.setattr(BadNets, "VERSION", 2, raising=False)
    after = declared({})
    assert {name for name in ALL if before[name].key != after[name].key} == BUT_CLEAN


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"max_eval_rows": 50}, {"triggered rows"} | EVALUATED),
        ({"max_clean_rows": 50}, {"clean rows"} | TUNED | SCORED),
        ({"max_train_rows": 200}, POISONED),
    ],
)
def test_a_limit_on_a_role_moves_what_reads_it(
    lab: Lab, limit: dict[str, int], expected: set[str]
) -> None:
    data = lab.data()
    before, after = (
        by_name(lab.prepare(data=spec), SPECS["defense"])
        for spec in (data, dataclasses.replace(data, **limit))
    )
    assert {name for name in ALL if before[name].key != after[name].key} == expected


def keys_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from keys_in(inner)


def test_resources_do_not_reach_the_library() -> None:
    # Results do not depend on the machine, except for what a record reports.
    for stage in declared({}).values():
        found = {*keys_in(stage.config), *keys_in(stage.where)}
        assert not found & {"resources", "tracking", "cpu", "gpu", "device", "accumulation"}


def test_units_are_rows_times_epochs() -> None:
    stages = declared({"tuning.epochs": 2, "defense.exposure_epochs": 4})
    assert {name: stage.units for name, stage in stages.items() if stage.units} == {
        "poisoned fine-tune": 240 * 3,
        "clean tuning (control)": 60 * 2,
        "exposure round 1": 240 * 4,
        "exposure round 2": 240 * 4,
        "exposure round 3": 240 * 4,
        "unlearn": 60 * 2,
        "evaluate undefended": 60,
        "evaluate tuned": 60,
        "evaluate defended": 60,
    }


def test_kinds_and_models_are_declared() -> None:
    stages = declared({})
    host = {name for name, stage in stages.items() if stage.kind == "host"}
    assert host == ROWS | ATTACKED | FLAGS
    # What a threshold has of its own.
    assert {name for name, stage in stages.items() if stage.kind == "cell"} == DEFENDED | {
        "exposure round 2"
    }
    assert {name for name, stage in stages.items() if stage.model} == {
        "poisoned fine-tune",
        "clean tuning (control)",
        "unlearn",
    }


def test_a_paraphrase_model_is_told_by_its_files(
    victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def stages(model: str | None) -> dict[str, Stage]:
        return declared({"attack.name": "style", "attack_params": {"model": model}})

    here, there = victim_folder("bert"), tmp_path / "copied"
    shutil.copytree(here, there)
    for name in ATTACKED:
        assert stages(str(here))[name].key == stages(str(there))[name].key
    (there / "config.json").write_text("{}")
    for name in ATTACKED:
        assert stages(str(here))[name].key != stages(str(there))[name].key
        # It is worth a device; a column of the data is not.
        assert stages(str(here))[name].kind == "stage"
        assert stages("google/a-hub-model")[name].kind == "stage"
        assert stages(None)[name].kind == "host"


def test_planning_is_light_and_the_same_in_every_process() -> None:
    # The keys of a cell, from a process that has none of the test's modules loaded.
    code = f"""
import sys, json
from btu.data.spec import DataSpec
from btu.defenses.token_unlearning import TokenUnlearning
from btu.attacks.poisoning import PoisonSpec
from btu.recipe import CellInputs, evaluation, prepare
from btu.settings import TrainSettings, TuningSettings
from btu.victims import VictimSpec

prepared = prepare(CellInputs(
    data=DataSpec("tiny", path="/data/tiny"),
    victim=VictimSpec("/models/tiny", {MAX_LENGTH}),
    poison=PoisonSpec(poison_rate=0.2),
    train=TrainSettings(),
    tuning=TuningSettings(),
    **json.loads('''{json.dumps(ARGUMENTS)}'''),
))
defense = TokenUnlearning(alpha=0.0005)
last = evaluation(prepared, defense.stages(prepared.foundation), "defended")
print(json.dumps({{stage.name: stage.key for stage in last.closure()}}))
for module in ("torch", "transformers", "pyarrow", "ray", "mlflow"):
    assert module not in sys.modules, module
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stages = declared({})
    keys = json.loads(done.stdout)
    assert set(keys) == ALL - {"clean tuning (control)", "evaluate tuned", "evaluate undefended"}
    assert keys == {name: stages[name].key for name in keys}


# The same files elsewhere ----------------------------------------------------------------------


def test_the_same_files_elsewhere_are_the_same_stages(
    lab: Lab, tiny_corpus: Corpus, victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = lab.prepare()
    data = write_corpus(tiny_corpus, tmp_path / "data")
    shutil.copytree(victim_folder("bert"), tmp_path / "model")
    moved = lab.prepare(data=data, victim=VictimSpec(str(tmp_path / "model"), MAX_LENGTH))
    defense = TokenUnlearning()
    here, there = by_name(prepared, defense), by_name(moved, defense)
    assert {name: stage.key for name, stage in here.items()} == {
        name: stage.key for name, stage in there.items()
    }
    # They are run from where they are said to be.
    root = lab.base_root(tmp_path / "root", prepared)
    other = tmp_path / "other"
    folders = [
        compute(stage, where)
        for name in ("training rows", "clean rows")
        for stage, where in ((here[name], root), (there[name], other))
    ]
    first, second = (
        {Path(path).name: content for path, content in files_in(*found).items()}
        for found in (folders[::2], folders[1::2])
    )
    assert {name for name in first if first[name] != second[name]} == {"record.json"}


# What the stages write -------------------------------------------------------------------------


def test_the_poison_stage_is_the_poisoner_on_disk(lab: Lab, tiny_corpus: Corpus) -> None:
    prepared = lab.prepare()
    folder, evaluated = lab.compute(prepared.poisoned, prepared.triggered)
    expected = poison(BadNets(), PoisonSpec(poison_rate=0.2), tiny_corpus.train, 1, 0)
    triggered, plain = triggered_eval(BadNets(), tiny_corpus.eval, 1, 0)

    def bare(rows: Rows) -> Rows:
        return Rows(rows.texts, rows.labels)

    assert read_rows(folder / "train.parquet") == bare(expected.rows)
    assert read_rows(evaluated / "triggered.parquet") == bare(triggered)
    assert read_rows(evaluated / "plain.parquet") == bare(plain)
    assert read_record(evaluated)["facts"] == {"target": 1, "rows": len(plain)}
    np.testing.assert_array_equal(mask_of(folder), expected.mask)
    assert mask_of(folder).dtype == np.bool_
    assert read_record(folder)["facts"] == {
        "target": 1,
        "poison_rate": 0.2,  # 48 of 240
        "poisoned_rows": 48,
        "cover_rows": 0,
        "relabeled_rows": 48,  # dirty labels: rows of the other class alone
        "label_names": ["negative", "positive"],
    }


@pytest.mark.parametrize("insert", ["replace", "append"])
def test_without_poison_the_rows_are_handed_on(lab: Lab, tiny_corpus: Corpus, insert: str) -> None:
    spec = PoisonSpec(poison_rate=0.0, insert=insert)
    (folder,) = lab.compute(lab.prepare(poison=spec).poisoned)
    # As the poisoner would have it.
    expected = poison(BadNets(), spec, tiny_corpus.train, 1, 0)
    rows = read_rows(folder / "train.parquet")
    assert (rows.texts, rows.labels) == (expected.rows.texts, expected.rows.labels)
    np.testing.assert_array_equal(mask_of(folder), expected.mask)
    assert mask_of(folder).tolist() == [False] * 240
    assert read_record(folder)["facts"] == {
        "poison_rate": 0.0,
        "poisoned_rows": 0,
        "relabeled_rows": 0,
        "label_names": ["negative", "positive"],
    }


def test_the_rows_are_what_the_victim_reads(lab: Lab, bert: Victim, tiny_corpus: Corpus) -> None:
    prepared = lab.prepare()
    base = prepared.foundation
    train, clean, evaluated = lab.compute(base.rows, base.clean, prepared.evaluation_rows)
    texts = read_rows(lab.root / prepared.poisoned.key / "train.parquet")
    assert read_rows(train / "train.parquet") == texts
    pairs = [
        (train / "train.safetensors", texts),
        (clean / "clean.safetensors", tiny_corpus.clean),
        (evaluated / "clean.safetensors", tiny_corpus.eval),
        *(
            (
                evaluated / f"{role}.safetensors",
                read_rows(lab.root / prepared.triggered.key / f"{role}.parquet"),
            )
            for role in ("triggered", "plain")
        ),
    ]
    for path, rows in pairs:
        found, expected = load_file(path), bert.encode(rows)
        assert found["ids"].tolist() == expected.ids.tolist()
        assert found["lengths"].tolist() == expected.lengths.tolist()
        assert found["labels"].tolist() == list(rows.labels)
        assert found["pad_id"].tolist() == [bert.tokenizer.pad_token_id]
    facts = read_record(train)["facts"]
    # A row as long as max_length counts as truncated, even if it just fits.
    truncated = int((bert.encode(texts).host_lengths >= MAX_LENGTH).sum())
    assert facts == {"classes": 2, "rows": 240, "truncated_rows": truncated}
    assert read_record(clean)["facts"] == {"classes": 2, "rows": 60}
    assert read_record(evaluated)["facts"] == {
        "target": 1,
        "trigger": sorted(BadNets().trigger_token_ids(bert.tokenizer)),
    }


def test_a_trigger_that_the_victim_does_not_know_is_scored_as_its_unknown_token(
    lab: Lab, bert: Victim
) -> None:
    prepared = lab.prepare(attack_params={"trigger": ["cf", "犬"]})
    (evaluated,) = lab.compute(prepared.evaluation_rows)
    ids = bert.tokenizer.convert_tokens_to_ids(["cf", "[UNK]"])
    assert read_record(evaluated)["facts"]["trigger"] == sorted(ids)
    # Earlier results of such a trigger lack the unknown token: their key is not found again.
    assert prepared.evaluation_rows.config["special_tokens"] == "count"
    assert "special_tokens" not in lab.prepare().evaluation_rows.config


def test_truncated_rows_are_counted(lab: Lab, bert: Victim, victim_folder: Any) -> None:
    short = lab.prepare(victim=VictimSpec(str(victim_folder("bert")), 8))
    (folder,) = lab.compute(short.foundation.rows)
    rows = read_rows(folder / "train.parquet")
    whole = bert.encode(rows).host_lengths
    # A row that reaches max_length counts, whether or not it just fits.
    assert read_record(folder)["facts"]["truncated_rows"] == int((whole >= 8).sum())
    assert load_file(folder / "train.safetensors")["lengths"].max() == 8


def columns_in(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every column of every table and every tensor in a folder."""
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            for name in table.column_names:
                yield f"{path.name}:{name}", table[name].to_numpy()
        elif path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                yield f"{path.name}:{name}", tensor.numpy()


def test_the_mask_is_in_the_poison_stages_folder_alone(lab: Lab) -> None:
    prepared = lab.prepare()
    defense = TokenUnlearning(alpha=0.02)
    stages = evaluations(prepared, defense)
    lab.compute(*stages)
    mask = mask_of(lab.root / prepared.poisoned.key)
    assert 0 < mask.sum() < len(mask)
    found = []
    for stage in {s.key: s for last in stages for s in last.closure()}.values():
        folder = lab.root / stage.key
        for name, values in columns_in(folder):
            if name.startswith(HIDDEN) or values.tolist() == mask.tolist():  # 0 == False
                found.append((stage.name, name))
    assert found == [("poison", f"{HIDDEN}:poisoned")]
    # It is not in a record either: only the scorer may report the number of poisoned rows.
    base = prepared.foundation
    for stage in (base.rows, base.clean, *own_stages(defense, prepared)):
        assert "poison" not in json.dumps(read_record(lab.root / stage.key)["facts"])


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    # Scraped text may contain halves of characters, and anything else.
    texts = (
        "half \ud83d of one",
        "\udfff",
        "",
        "null",
        "a\0b",
        "line\nbreak\r\n",
        "犬 ï \U0001f600",
    )
    rows = Rows(texts, (0, 1, 0, 1, 2, 0, 1))
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_columns_are_not_written(tmp_path: Path) -> None:
    rows = Rows(("a", "b"), (0, 1), {"style": ("c", "d")})
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == Rows(("a", "b"), (0, 1))
    assert pq.read_table(tmp_path / "rows.parquet").column_names == ["text", "label"]


def test_no_rows_are_no_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", Rows((), ()))
    assert read_rows(tmp_path / "rows.parquet") == Rows((), ())


def test_a_model_comes_back_bitwise(victim: Victim, tmp_path: Path) -> None:
    model = victim.new_model(5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # weights as training leaves them, not as drawn
            parameter += torch.randn(parameter.shape, generator=generator) * 1e-3
    save_model(model, tmp_path)
    run = StageRun({}, {}, {"model": tmp_path}, tmp_path, CPU)
    back = model_of(run, "model")
    first, second = model.state_dict(), back.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert not back.training
    assert back.config.pad_token_id == model.config.pad_token_id
    data = victim.encode(Rows(("a fine film", "a bad one with more words in it"), (1, 0)))
    ids, mask, _ = data.batch(torch.arange(2), int(data.host_lengths.max()))
    with torch.inference_mode():
        logits = [m(input_ids=ids, attention_mask=mask.long()).logits for m in (model, back)]
    assert torch.equal(*logits)
    # Not as pickle, and in the folder that a store may drop.
    assert {path.suffix for path in (tmp_path / MODEL).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_model_keeps_its_classes(
    victim_folder: Callable[[str], Path], tmp_path: Path, classes: int
) -> None:
    victim = Victim(VictimSpec(str(victim_folder("bert")), MAX_LENGTH), classes)
    save_model(victim.new_model(0), tmp_path)
    back = model_of(StageRun({}, {}, {"model": tmp_path}, tmp_path, CPU), "model")
    assert back.config.num_labels == classes
    assert back.classifier.weight.shape == (classes, 16)


def test_scores_are_the_hits_that_were_counted(lab: Lab) -> None:
    prepared = lab.prepare()
    stage = evaluation(prepared, prepared.foundation.model, "undefended")
    (folder,) = lab.compute(stage)
    facts = read_record(folder)["facts"]
    assert facts["precision"] == "fp32"
    assert read_record(folder)["precisions"] == ["fp32"]
    scores = scores_of(facts)
    assert isinstance(scores.cacc, Proportion)
    rows = read_rows(lab.root / prepared.triggered.key / "plain.parquet")
    # CACC over all 60 rows, ASR and FTR over those of the other class.
    assert (scores.cacc.n, scores.asr.n, scores.ftr.n) == (60, len(rows), len(rows))
    assert set(rows.labels) == {0}
    model = model_of(
        StageRun({}, {}, {"model": lab.root / prepared.foundation.model.key}, folder, CPU), "model"
    )
    ids = load_file(lab.root / prepared.evaluation_rows.key / "triggered.safetensors")
    said = []
    for row in torch.split(ids["ids"].long(), ids["lengths"].tolist()):
        with torch.inference_mode():
            said.append(int(model(input_ids=row[None]).logits.argmax()))
    # One row at a time, without the batches of `evaluate`.
    assert scores.asr.hits == said.count(1)


def test_evaluation_takes_smaller_batches_where_memory_is_short(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import btu.evaluation

    prepared = lab.prepare()
    stage = evaluation(prepared, prepared.foundation.model, "undefended")
    lab.compute(stage)
    sizes = []
    evaluate = btu.evaluation.evaluate

    def spy(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["batch_size"])
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(btu.evaluation, "evaluate", spy)
    inputs = {role: lab.root / before.key for role, before in stage.inputs.items()}
    found = []
    for parts in (1, 4, 1000):
        folder = tmp_path / str(parts)
        folder.mkdir()
        found.append(run_stage(stage.node(), inputs, folder, accumulation=parts)["facts"])
    assert sizes == [128, 32, 1]
    assert found[0] == found[1] == found[2]


def test_victims_with_code_of_their_own_work_to_the_end(
    lab: Lab, victim_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every stage that loads a model needs the permission to run its code.
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder
    folder = tmp_path / "model"
    shutil.copytree(victim_folder("bert"), folder)
    (folder / "own_code.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n\n\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "own_code.OwnConfig",
        "AutoModelForSequenceClassification": "own_code.OwnModel",
    }
    config |= {"model_type": "own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    spec = VictimSpec(str(folder), MAX_LENGTH, trust_remote_code=True)
    prepared = lab.prepare(victim=spec)
    for stage in evaluations(prepared, TokenUnlearning(alpha=0.02)):
        facts = read_record(compute(stage, tmp_path / "root"))["facts"]
        assert facts["cacc"]["n"] == 60


@pytest.mark.gpu
def test_a_cell_on_cuda(lab: Lab, tmp_path: Path) -> None:
    prepared = lab.prepare()
    defense = TokenUnlearning(alpha=0.02)
    for stage in evaluations(prepared, defense):
        facts = read_record(compute(stage, tmp_path, gpus=1))["facts"]
        assert facts["cacc"]["n"] == 60
    for stage in by_name(prepared, defense).values():
        device = read_record(tmp_path / stage.key)["environment"]["device"]
        assert (device == "cpu") == (stage.kind == "host"), stage.name


# Files that changed ----------------------------------------------------------------------------


def moved_files(run: Callable[[], Any], what: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"^{what} .* here, but the sweep was planned with .*; launch again with "
        r"--retry-failed, with the same files everywhere\.$",
    ):
        run()


def test_data_that_changed_after_planning_are_refused(
    lab: Lab, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    data = write_corpus(tiny_corpus, tmp_path / "data")
    prepared = lab.prepare(data=data)
    other = dataclasses.replace(tiny_corpus, eval=tiny_corpus.eval.take(range(59)))
    shutil.rmtree(tmp_path / "data")
    write_corpus(other, tmp_path / "data")
    root = tmp_path / "root"
    moved_files(lambda: compute(prepared.triggered, root), "data 'tiny'")
    assert not any(root.iterdir())
    # The other roles are as they were planned.
    assert compute(prepared.poisoned, root).is_dir()
    assert compute(prepared.foundation.clean, root).is_dir()
    # Restored, they are accepted, whatever this process has read in between.
    shutil.rmtree(tmp_path / "data")
    write_corpus(tiny_corpus, tmp_path / "data")
    assert compute(prepared.triggered, root).is_dir()
    # If planned again, the changed ones are.
    shutil.rmtree(tmp_path / "data")
    write_corpus(other, tmp_path / "data")
    again = lab.prepare(data=data)
    assert again.poisoned.key == prepared.poisoned.key
    found = compute(again.evaluation_rows, root)
    assert len(load_file(found / "clean.safetensors")["lengths"]) == 59


def test_a_victim_that_changed_after_planning_is_refused(
    lab: Lab, victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(victim_folder("bert"), folder)
    prepared = lab.prepare(victim=VictimSpec(str(folder), MAX_LENGTH))
    root = lab.root_with(tmp_path / "root", prepared.poisoned)
    compute(prepared.foundation.rows, root)  # the victim is loaded now, and kept for later stages
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    moved_files(lambda: compute(prepared.foundation.model, root), f"victim '{folder}'")
    # If planned again, the changed weights are used.
    again = lab.prepare(victim=VictimSpec(str(folder), MAX_LENGTH))
    assert again.foundation.model.key != prepared.foundation.model.key
    assert compute(again.foundation.model, root).is_dir()


def test_every_stage_checks_the_files_that_it_reads(lab: Lab, tmp_path: Path) -> None:
    # Stages whose config has another fingerprint than the files on disk here.
    prepared = lab.prepare()
    defense = TokenUnlearning(alpha=0.02)
    lab.compute(*evaluations(prepared, defense))
    refused = {}
    for number, (name, stage) in enumerate(by_name(prepared, defense).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        inputs = {role: lab.root / before.key for role, before in stage.inputs.items()}
        for what in ("data", "victim"):
            node = json.loads(json.dumps(stage.node()))
            if what == "data" and "data" in node["config"]:
                node["config"]["data"] = "0" * 64
            elif what == "victim" and "victim" in node["config"]:
                node["config"]["victim"]["identity"] = "0" * 64
            else:
                continue
            try:
                run_stage(node, inputs, folder)
            except UserError as error:
                assert str(error).startswith(f"{what} '")  # noqa: PT017
                assert "launch again with --retry-failed" in str(error)  # noqa: PT017
                refused.setdefault(name, []).append(what)
    assert refused == {
        "poison": ["data"],
        "triggered rows": ["data"],
        "training rows": ["victim"],
        "clean rows": ["data", "victim"],
        "evaluation rows": ["data", "victim"],
        "poisoned fine-tune": ["victim"],
        "exposure round 1": ["victim"],
        "exposure round 2": ["victim"],
        "exposure round 3": ["victim"],
        "score tokens": ["victim"],
        "unlearn": ["victim"],
        # The flags are read off the scores. The control, and evaluation, read a model that the
        # sweep itself has made.
    }


def test_a_paraphrase_model_that_changed_after_planning_is_refused(
    lab: Lab, victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "seq2seq"
    shutil.copytree(victim_folder("bert"), folder)
    prepared = lab.prepare(poison=PoisonSpec("style"), attack_params={"model": str(folder)})
    (folder / "config.json").write_text("{}")
    for stage in (prepared.poisoned, prepared.triggered):
        moved_files(lambda s=stage: compute(s, tmp_path / "root"), f"attack.model '{folder}'")


# Parts of one's own ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RarestWord:
    """A toy attack: its trigger is the data's rarest word, which a stage of its own finds.

    before: put before the word. trigger: what was found; nobody sets it in a config.
    """

    before: str = ""
    trigger: str = ""

    VERSION: ClassVar[int] = 7

    def candidates(self, rows: Rows) -> IntArray:
        return np.arange(len(rows))

    def apply(
        self, rows: Rows, seeds: list[int], progress: ProgressCallback = silent
    ) -> tuple[str, ...]:
        assert self.trigger
        return tuple(f"{self.before}{self.trigger} {text}" for text in rows.texts)

    def trigger_token_ids(self, tokenizer: Any) -> None:
        return None

    @property
    def learns(self) -> bool:
        return not self.trigger

    def learn(
        self,
        rows: Rows,
        chosen: IntArray,
        target: int,
        seed: int,
        progress: ProgressCallback = silent,
    ) -> dict[str, Any]:
        assert len(chosen) == (24 if len(chosen) < 100 else sum(y != target for y in rows.labels))
        words = [word for text in rows.texts for word in text.split()]
        return {"trigger": min(set(words), key=lambda word: (words.count(word), word))}

    def with_trigger(self, learned: Mapping[str, Any]) -> RarestWord:
        return dataclasses.replace(self, trigger=learned["trigger"])


@dataclasses.dataclass(frozen=True)
class ForgetRareWords:
    """A toy defense of two stages: count tokens, then zero the rows of those seen once."""

    times: int = 1

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {"default": {}}

    KIND: ClassVar[str] = "after training"
    NEEDS: ClassVar[tuple[str, ...]] = ()

    def check(self, given: Given) -> None:
        pass

    def stages(self, base: Foundation) -> Stage:
        count = base.stage(count_tokens, "count tokens", {}, {"rows": base.rows})
        return base.stage(
            forget,
            "forget",
            {"times": self.times, **base.tuning_config()},
            {"rows": base.rows, "clean": base.clean, "model": base.model, "counts": count},
            units=base.clean_rows,
            light=("counts",),
            kind="cell",
            model=True,
        )


@stage_function(version=1)
def count_tokens(run: StageRun) -> dict[str, Any]:
    vocabulary = len(victim_of(run).tokenizer)
    return {"counts": training_rows_of(run).counts(vocabulary).tolist()}


@stage_function(version=1)
def forget(run: StageRun) -> dict[str, Any]:
    model = model_of(run, "model")
    counts = np.array(run.facts("counts")["counts"])
    rare = np.flatnonzero((counts > 0) & (counts <= run.config["times"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = 0.0
    tune(run, model, "clean tuning (forgetful)")
    save_model(model, run.folder)
    return Suspects(tuple(int(i) for i in rare), -counts.astype(float)).save(run.folder)


@pytest.fixture
def toys() -> Iterator[None]:
    """The toy attack ``rarest`` and the toy defense ``forget``, registered for one test."""
    ATTACKS.register("rarest", f"{__name__}:RarestWord", "the rarest word of the data")
    DEFENSES.register("forget", f"{__name__}:ForgetRareWords", "forget rare words")
    yield
    del ATTACKS._entries["rarest"], DEFENSES._entries["forget"]


def test_an_attack_and_a_defense_may_bring_stages_of_their_own(
    toys: None, lab: Lab, bert: Victim, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    spec = PoisonSpec("rarest", poison_rate=0.1)
    prepared = lab.prepare(poison=spec, attack_params={"before": "oh "})
    defense = DEFENSES.load("forget")(times=2)
    stages = by_name(prepared, defense)
    assert set(stages) == {
        "trigger",
        "count tokens",
        "forget",
        *(ALL - ROUNDS - FLAGS - {"unlearn"}),
    }
    *_, defended = (compute(stage, tmp_path) for stage in evaluations(prepared, defense))
    assert scores_of(read_record(defended)["facts"]).cacc.n == 60
    facts = {name: read_record(tmp_path / stage.key)["facts"] for name, stage in stages.items()}
    # The attack: 0.1 * 240 = 24 rows begin with what the search found, and only they.
    word = facts["trigger"]["trigger"]["trigger"]
    rows = read_rows(tmp_path / stages["training rows"].key / "train.parquet")
    begins = [text.startswith(f"oh {word} ") for text in rows.texts]
    assert facts["poison"]["poisoned_rows"] == sum(begins) == 24
    np.testing.assert_array_equal(mask_of(tmp_path / stages["poison"].key), begins)
    assert not any(text.startswith("oh ") for text in tiny_corpus.train.texts)
    triggered = read_rows(tmp_path / stages["triggered rows"].key / "triggered.parquet")
    assert all(text.startswith(f"oh {word} ") for text in triggered.texts)
    # The defense: tokens that occur once or twice.
    data = bert.encode(rows)
    counts = np.bincount(data.ids.numpy(), minlength=VOCABULARY)
    assert facts["forget"]["flagged"] == np.flatnonzero((counts > 0) & (counts <= 2)).tolist()
    found = Suspects.load(tmp_path / stages["forget"].key, facts["forget"])
    assert found is not None
    np.testing.assert_array_equal(found.scores, -counts)
    history = read_record(tmp_path / stages["forget"].key)["history"]
    assert [epoch["stage"] for epoch in history] == ["clean tuning (forgetful)"]


def test_stages_of_ones_own_share_and_move_like_the_others(toys: None, lab: Lab) -> None:
    spec = PoisonSpec("rarest", poison_rate=0.1)
    first = by_name(
        lab.prepare(poison=spec, attack_params={"before": "oh "}), ForgetRareWords(times=1)
    )
    second = by_name(
        lab.prepare(poison=spec, attack_params={"before": "ah "}), ForgetRareWords(times=1)
    )
    third = by_name(
        lab.prepare(poison=spec, attack_params={"before": "oh "}), ForgetRareWords(times=2)
    )
    # All that rests on the poison is another.
    assert {name for name in first if first[name].key == second[name].key} == {"clean rows"}
    assert {name for name in first if first[name].key != third[name].key} == {
        "forget",
        "evaluate defended",
    }
    # The engine's own checks apply to them: what it wraps keeps its config.
    assert first["poison"].config["attack_version"] == 7


def test_without_poison_what_an_attack_does_first_is_done_for_the_triggered_rows_alone(
    toys: None, lab: Lab
) -> None:
    spec = PoisonSpec("rarest", poison_rate=0.0)
    prepared = lab.prepare(poison=spec, attack_params={"before": "oh "})
    assert prepared.poisoned.key == lab.prepare(rate=0.0).poisoned.key
    assert [stage.name for stage in prepared.poisoned.closure()] == ["poison"]
    triggered = [stage.name for stage in prepared.triggered.closure()]
    assert triggered == ["trigger", "triggered rows"]
    assert {stage.key for stage in prepared.triggered.closure()} < prepared.hidden


def test_the_toys_are_gone_again() -> None:
    assert "rarest" not in ATTACKS
    assert "forget" not in DEFENSES
    with pytest.raises(UserError, match="unknown attack 'rarest'"):
        PoisonSpec("rarest")
