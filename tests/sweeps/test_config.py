"""From a sweep file to trial specs: what parses, what is refused, and what moves a fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from btu.errors import UserError
from orchestrator.config import Sweep, TrialSpec, load_sweep, resolve

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


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    """A function from YAML text and overrides to a sweep."""

    def build(text: str, *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return load_sweep(path, overrides)

    return build


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
    assert spec.attack_params == {"trigger": ["cf"]}
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
    assert load("name: x\noutput: out").folder == tmp_path / "out" / "x"
    assert load("name: x").folder == tmp_path / "runs" / "x"


def test_relative_paths_are_made_absolute_since_workers_start_elsewhere(
    load: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    spec = only(load("seed: 0", "data.path=rows.csv", "victim.name=weights"))
    assert spec.data.path == str(tmp_path / "rows.csv")
    assert spec.victim.name == str(tmp_path / "weights")


@pytest.mark.parametrize("file", sorted(Path("sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_parses_and_resolves(file: Path) -> None:
    cells = list(load_sweep(file).cells())
    assert cells
    for cell in cells:
        assert resolve(cell.config).poison.name == cell.config["attack"]["name"]


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
    assert spec.attack_params == {"trigger": ["cf", "mn"]}
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
    assert (sweep.name, sweep.output.name, sweep.resources.gpu) == ("other", "elsewhere", 0.5)


def test_a_grid_override_adds_or_replaces_an_axis(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE, "grid.seed=[5]", "grid.train.epochs=[1,2]")
    assert sweep.grid["seed"] == [5]
    assert sweep.grid["train.epochs"] == [1, 2]
    # 4 attacks x 3 rates x 3 alphas x 1 seed x 2 epochs
    assert len(list(sweep.cells())) == 72


def test_overriding_a_grid_key_pins_it(load: Callable[..., Sweep]) -> None:
    sweep = load(EXAMPLE, "attack.name=style", "seed=4", "defense.alpha=0.01")
    assert list(sweep.grid) == ["attack.poison_rate"]
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
        # What does not change a result is no axis.
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
        ("train: {epochs: [", "is no valid YAML"),
        ("seed: ${nowhere}", "is no valid YAML"),
        ("name: a/b", "name must be a plain word that can name a folder, got 'a/b'"),
        ("name: ..", r"name must be a plain word that can name a folder, got '\.\.'"),
        ("name: ''", "name must be a plain word"),
        ("name: null", "name must be a plain word"),
        ("resources: {cpu: 0}", r"resources.cpu must be above 0, got 0"),
        ("resources: {gpu: 2}", r"resources.gpu must be at most 1, got 2.*one device"),
        ("resources: {gpu: -1}", "resources.gpu must be at least 0"),
        ("resources: {cpu: many}", "resources.cpu: .*'many'"),
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
        ("seed.x=1", "key 'seed.x' does not fit: 'seed' holds the value 0"),
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
        ("attack.poison_rate=lots", "attack.poison_rate: .*lots"),
        ("attack.poison_rate=1.5", r"attack.poison_rate must be in \[0, 1\], got 1.5"),
        ("attack.poison_rate=-0.1", r"attack.poison_rate must be in \[0, 1\], got -0.1"),
        ("attack.label_mode=dirt", "unknown attack.label_mode 'dirt'; did you mean 'dirty'?"),
        ("attack.trigger=cf", "attack.trigger: "),
        ("attack.trigger=[]", "attack.trigger must hold non-blank text"),
        ("attack.trigger=[' ']", "attack.trigger must hold non-blank text"),
        ("defense.preset=refrence", "unknown defense.preset 'refrence'; did you mean 'reference'?"),
        ("defense.alpha=0", "defense.alpha must be above 0 and below 1, got 0"),
        ("defense.alpha=1", "defense.alpha must be above 0 and below 1, got 1"),
        ("defense.alpha=small", "defense.alpha must be above 0 and below 1, got 'small'"),
        ("defense.alpha=[0.1,0.2]", "defense.alpha has 2 values for 3 rounds"),
        ("defense.rounds=[2,3]", "round 2 without round 1"),
        ("victim.max_length=long", "victim.max_length: .*long"),
        ("victim.allow_pickle=perhaps", "victim.allow_pickle: .*perhaps"),
        ("data.max_train_rows=1", "data.max_train_rows must be at least 2 or null, got 1"),
        ("tuning.epochs=0", "tuning.epochs must be at least 1, got 0"),
        ("seed=zero", "seed must be an integer, got 'zero'"),
        ("seed=1.5", r"seed must be an integer, got 1\.5"),
        ("seed=true", "seed must be an integer, got True"),
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


def test_keys_of_other_attacks_are_left_out(load: Callable[..., Sweep]) -> None:
    sweep = load(
        "attack: {trigger: [mn], sentence: so it goes ., column: style_bible}\n"
        "grid: {attack.name: [badnets, addsent, style]}"
    )
    badnets, addsent, style = (resolve(cell.config) for cell in sweep.cells())
    assert badnets.attack_params == {"trigger": ["mn"]}
    assert addsent.attack_params == {"sentence": "so it goes ."}
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
    assert again.key("d", "v") == spec.key("d", "v")


# Fingerprints ----------------------------------------------------------------------------------


def key(sweep: Sweep, data: str = "rows", victim: str = "weights") -> str:
    return only(sweep).key(data, victim)


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
        # Rows and weights stand for themselves: where they came from does not act.
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
    one, other = ([resolve(c.config).key("d", "v") for c in load(text % w).cells()] for w in "ab")
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
        "from orchestrator.config import load_sweep, resolve\n"
        f"(cell,) = load_sweep({str(tmp_path / 'sweep.yaml')!r}).cells()\n"
        "print(resolve(cell.config).key('rows', 'weights'))"
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
    assert len(found) == 20
    assert set(found) <= set("0123456789abcdef")


def test_one_paraphrase_source_for_two_attacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "attack: {name: style, column: style_bible}\ngrid: {attack.name: [style, syntactic]}\n"
    )
    with pytest.raises(UserError, match=r"attack\.column 'style_bible' would serve style and synt"):
        load_sweep(path)
    assert load_sweep(path, ["attack.name=style"]).grid == {}


def test_a_local_paraphrase_model_is_told_by_its_files(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("attack: {name: style, model: MODEL}\n")
    keys = []
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        sweep = load_sweep(path, [f"attack.model={tmp_path / name}"])
        keys.append(resolve(next(iter(sweep.cells())).config).key("d", "v"))
    # a and b hold the same files in other folders; c holds other weights
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
