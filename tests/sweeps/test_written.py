"""Values and names that are not what they look like: types of YAML, names of folders."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btu.errors import UserError
from btu.types import Corpus, Rows
from orchestrator.sweep.load import _parse_overrides, load_sweep, resolve
from orchestrator.sweep.output import ARTIFACTS, DATABASE, MOST_NAME_BYTES, taken_name
from orchestrator.sweep.sections import TrialSpec, pins

if TYPE_CHECKING:
    from conftest import Ran


@pytest.fixture
def only(tmp_path: Path) -> Callable[..., TrialSpec]:
    """A function from YAML text and overrides to the spec of the only cell."""

    def build(text: str, *overrides: str) -> TrialSpec:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        (cell,) = load_sweep(path, overrides).cells()
        return resolve(cell.config)

    return build


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("no", "False .so it does no, off and false."),
        ("yes", "True .so it does yes, on and true."),
        ("on", "True"),
        ("1e3", "the number 1000.0"),
        ("007", "the number 7"),
        ("12", "the number 12"),
        ("1_0", "the number 10"),
        ("null", "nothing .so it does null, ~ and an empty place."),
        ("~", "nothing"),
    ],
)
@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("attack: {{trigger: [cf, {}]}}", r"attack.trigger\[1\]"),
        ("attack: {{name: addsent, sentence: {}}}", "attack.sentence"),
        ("data: {{name: {}}}", "data.name"),
        ("grid: {{attack.trigger: [[{}]]}}", r"attack.trigger\[0\]"),
        ("list: [{{victim.name: {}}}]", "victim.name"),
    ],
)
def test_a_text_that_yaml_reads_as_something_else_is_refused(
    only: Callable[..., TrialSpec], place: str, key: str, written: str, read: str
) -> None:
    match = f"^{key} must be a text, and YAML reads what is written as {read}.*quote it"
    with pytest.raises(UserError, match=match):
        only(place.format(written))
    only(place.format(f'"{written}"').replace("data: {name", "data: {path: x, name"))


def test_an_override_that_is_no_text_is_refused_with_its_quotes(
    only: Callable[..., TrialSpec],
) -> None:
    with pytest.raises(UserError, match=r"victim\.revision must be .* KEY='\"\.\.\.\"' on the"):
        only("seed: 0", "victim.revision=1234567")
    assert only("seed: 0", 'victim.revision="1234567"').victim.revision == "1234567"


def test_null_stays_where_a_text_may_be_missing(only: Callable[..., TrialSpec]) -> None:
    assert only("data: {hub_config: null}\nvictim: {revision: ~}").victim.revision is None


@pytest.mark.parametrize(("written", "label"), [("1", 1), ('"1"', "1"), ("positive", "positive")])
def test_a_label_is_a_number_or_a_text(
    only: Callable[..., TrialSpec], written: str, label: int | str
) -> None:
    found = only(f"attack: {{target_label: {written}}}").poison.target_label
    assert (found, type(found)) == (label, type(label))


@pytest.mark.parametrize("written", ["no", "True", "1.5"])
def test_a_label_that_is_neither_has_to_be_quoted(
    only: Callable[..., TrialSpec], written: str
) -> None:
    with pytest.raises(UserError, match=r"^attack\.target_label must be a text.*quote it"):
        only(f"attack: {{target_label: {written}}}")
    assert only(f'attack: {{target_label: "{written}"}}').poison.target_label == written


def test_an_unknown_label_shows_those_of_the_data_and_says_to_quote() -> None:
    rows = Rows(("a", "b"), (0, 1), {})
    corpus = Corpus("zeros", rows, rows, rows, ("007", "010"))
    assert corpus.label_index("007") == 0
    # 010 is 8 in YAML.
    match = r"unknown target_label '8' .*\(known: 007, 010\); a label .* quote it"
    with pytest.raises(UserError, match=match):
        corpus.label_index(8)


HARD = [
    "no",
    "1e3",
    "007",
    "null",
    "~",
    "a: b",
    "x # y",
    "[cf]",
    " a ",
    "",
    "'",
    '"',
    "1:30",
    "é😀",
]


@pytest.mark.parametrize("text", HARD)
def test_pins_keep_a_text_as_it_is(only: Callable[..., TrialSpec], text: str) -> None:
    (override,) = shlex.split(pins({"attack.sentence": text}))
    assert list(_parse_overrides([override])) == [("attack.sentence", text)]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_pins_keep_any_text(text: str) -> None:
    if "${" in text or "???" in text:  # the syntax of OmegaConf
        return
    (override,) = shlex.split(pins({"attack.sentence": text}))
    assert list(_parse_overrides([override])) == [("attack.sentence", text)]


def test_pins_quote_no_plain_word() -> None:
    assert pins({"attack.name": "badnets", "seed": 3, "data.path": "a/b"}) == (
        "attack.name=badnets seed=3 data.path=a/b"
    )


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("store", "the results of all sweeps"),
        ("Store", "the results of all sweeps"),
        ("scan", "the work folders of btu scan"),
        ("mlflow.db", "the files of MLflow"),
        ("mlflow.db-wal", "the files of MLflow"),
        ("MLflow.DB", "the files of MLflow"),
        ("mlflow.db.bak", "the files of MLflow"),
        ("mlartifacts", "the files of MLflow"),
    ],
)
def test_a_name_of_the_output_folders_own_is_taken(
    run_cli: Callable[..., Ran], tmp_path: Path, name: str, what: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data: {name: demo}")
    done = run_cli("plan", path, f"name={name}", f"output={tmp_path / 'runs'}")
    assert done.code == 2
    assert f"name '{name}' is taken: under that name the output folder has {what}" in done.err


@pytest.mark.parametrize("name", ["storeroom", "mlflow-ablation", "scans", "mlflow"])
def test_other_names_are_free(only: Callable[..., Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "sweep.yaml").write_text(f"name: {name}")
    assert load_sweep(tmp_path / "sweep.yaml").name == name


def test_the_names_that_are_taken_are_those_in_use(tmp_path: Path) -> None:
    from orchestrator.tracking.experiment import _artifacts
    from orchestrator.tracking.server import default_uri

    assert default_uri(str(tmp_path)).endswith(f"/{DATABASE}")
    artifacts = _artifacts(tmp_path / DATABASE, "tiny")
    assert artifacts is not None
    assert artifacts.endswith(f"/{ARTIFACTS}/tiny")
    assert taken_name("tiny") is None


@pytest.mark.parametrize("letter", ["a", "é", "实"])
def test_a_name_is_as_long_as_a_folders_may_be(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "sweep.yaml"
    most = MOST_NAME_BYTES // len(letter.encode())
    path.write_text(f"name: {letter * most}", encoding="utf-8")
    sweep = load_sweep(path)
    (tmp_path / f"{sweep.name}.yaml").mkdir()  # the file system takes it
    path.write_text(f"name: {letter * (most + 1)}", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"bytes; a folder of that name needs at most 200\. Shorten"
    ):
        load_sweep(path)
