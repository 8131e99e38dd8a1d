"""Damaged and odd sweep files: each becomes a sweep whose cells resolve, or a `UserError`.

Nothing else may come out: not a traceback for a mistake of the user, and not a crash. The examples
are the same in every run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btu.errors import UserError
from orchestrator.sweep.load import load_sweep, resolve

VALID: dict[str, Any] = {
    "name": "odd",
    "output": "runs",
    "data": {"name": "own", "path": "rows.csv", "text_column": "text", "label_column": "label",
             "max_train_rows": 60},
    "victim": {"name": "offline", "max_length": 24},
    "attack": {"name": "badnets", "poison_rate": 0.1, "target_label": "positive",
               "label_mode": "dirty", "trigger": ["cf"]},
    "defense": {"name": "btu", "rule": "contrast", "threshold": 4.5, "rounds": [3]},
    "train": {"epochs": 1, "learning_rate": 1.0e-3, "batch_size": 16, "precision": "auto"},
    "tuning": {"epochs": 1},
    "seed": 0,
    "controls": False,
    "grid": {"attack.poison_rate": [0.1, 0.2], "seed": [0, 1]},
    "resources": {"cpu": 1},
    "tracking": {"uri": None},
    "store": {"keep": "results"},
}  # fmt: skip
SEARCHES: dict[str, Any] = {
    "zip": {"attack.poison_rate": [0.1, 0.2], "seed": [0, 1]},
    "list": [{"attack.label_mode": "clean", "seed": 4}],
    "random": {"samples": 2, "seed": 0, "space": {"defense.threshold": {"low": 1.0, "high": 9.0}}},
    "optuna": {"trials": 2, "space": {"defense.threshold": {"low": 1.0, "high": 9.0}}},
}  # fmt: skip
# Where a value may stand: the path of keys in the file.
PLACES = [
    *[(key,) for key in (*VALID, *SEARCHES)],
    *[(section, key) for section, inner in VALID.items() if isinstance(inner, dict)
      for key in inner],
    *[("random", key) for key in SEARCHES["random"]],
    *[("optuna", key) for key in SEARCHES["optuna"]],
    ("random", "space", "defense.threshold", "low"),
    ("list", 0, "seed"),
    ("grid", "attack.poison_rate", 0),
    ("grid", "data.name", 0),
    ("grid", "victim.name"),
    ("zip", "seed", 1),
    ("attack", "trigger", 0),
    ("defense", "rounds", 0),
]  # fmt: skip
# As a file writes them: what YAML reads as another type, what OmegaConf reads, odd characters.
WRITTEN = [
    "no", "1e3", "007", "0o17", "0x1f", "1_000", "12:30:45", "2024-01-01", "2024-01-01T10:00:00Z",
    ".inf", "-.inf", ".nan", "~", "", "!!binary aGk=", "!!set {a, b}", "!!python/name:os.system ''",
    "&a [*a]", "*nowhere", "<<", "? x", "{a: {b: [c]}}", "[[]]", "{1: 2, null: 3}", "{[a]: b}",
    "${seed}", "${attack.name}", "${nowhere}", "${oc.env:HOME}", "${", "$${x}", "???", "'???'",
    "\\${x}", "${.a}", "${..seed}", "${seed", "'${seed}'", "99999999999999999999999", "1e400",
    "-0", "'\\0'", '"\\0"', '"\\ud800"', '"\\x1b[31m"', '"\\u2028"', "../../etc", "~nobody/x",
    "~root", "~nouser/x",
    "s3://", "://", "http://[::1", "file:///a?b#c", "a%20b", "/dev/null", "con", ".", "..",
    "a/b", "|\n  two\n  lines", "- 1", "@x", "`x`", "%x", "x" * 300, "'" + "\u00e9" * 300 + "'",
]  # fmt: skip


def ends_well(path: Path, *overrides: str) -> bool:
    """Load a sweep file and resolve its cells; return whether it is a sweep, not a `UserError`."""
    try:
        for number, cell in enumerate(load_sweep(path, overrides).cells()):
            spec = resolve(cell.config)
            spec.build_attack()
            spec.build_defense()
            if number == 20:
                break
    except UserError:
        return False
    return True


def put(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return a valid sweep with a value at one place."""
    config: Any = yaml.safe_load(yaml.safe_dump(VALID))
    if place[0] in SEARCHES:
        config[place[0]] = yaml.safe_load(yaml.safe_dump(SEARCHES[str(place[0])]))
        del config["grid"]
    node = config
    for key in place[:-1]:
        if isinstance(node, dict):
            node.setdefault(key, [None])
        node = node[key]
    node[place[-1]] = value
    return dict(config)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd") / "sweep.yaml"


def test_the_sweeps_that_are_changed_are_valid(file: Path) -> None:
    for place in (("seed",), *((name,) for name in SEARCHES)):
        config = put(place, SEARCHES.get(place[0], 3))
        file.write_text(yaml.safe_dump(config))
        assert ends_well(file), place


@pytest.mark.parametrize("written", WRITTEN)
def test_a_value_of_any_spelling_is_read_or_refused(written: str, file: Path) -> None:
    mark = "PLACE"
    for place in random.Random(written).sample(PLACES, 3):
        text = yaml.safe_dump(put(place, mark), allow_unicode=True)
        file.write_text(text.replace(mark, written))
        ends_well(file)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_value_of_any_type_is_read_or_refused(place: tuple[str | int, ...], file: Path) -> None:
    for value in (None, True, -1, "", ["a"], {}, [{}]):
        file.write_text(yaml.safe_dump(put(place, value)))
        ends_well(file)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=8),
    st.text(st.characters(exclude_categories=()), max_size=24),
    st.text("${}:.?\\'\"[]~/%#@&*!|> \n", max_size=12),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(derandomize=True, deadline=None, max_examples=60, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(place=st.sampled_from(PLACES), value=values)
def test_a_made_up_value_is_read_or_refused(
    file: Path, place: tuple[str | int, ...], value: Any
) -> None:
    file.write_text(yaml.safe_dump(put(place, value)), errors="surrogatepass")
    ends_well(file)


def test_a_file_with_damaged_bytes_is_read_or_refused(file: Path) -> None:
    draw = random.Random(0)
    whole = yaml.safe_dump(VALID | {"zip": SEARCHES["zip"]}).encode()
    read = 0
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(damaged))
            kind = draw.randrange(4)
            if kind == 0:
                damaged[at] = draw.randrange(256)
            elif kind == 1:
                del damaged[at : at + draw.randrange(1, 12)]
            elif kind == 2:
                damaged[at:at] = draw.choice(
                    (
                        b"${",
                        b"\0",
                        b"\xff",
                        b": ",
                        b"\t",
                        b"- ",
                        b"'",
                        b"&a ",
                        b"*a ",
                        b"!",
                        b"\xe2\x80",
                    )
                )
            else:
                del damaged[at:]
                damaged += b"\n"
        file.write_bytes(bytes(damaged))
        read += ends_well(file)
    # Some of the damages change a value and leave a sweep.
    assert read > 0


def test_overrides_of_any_text_are_read_or_refused(file: Path) -> None:
    file.write_text(yaml.safe_dump(VALID))
    for number, written in enumerate(WRITTEN):
        place = PLACES[number % len(PLACES)]
        key = ".".join(str(part) for part in place if isinstance(part, str))
        for override in (f"{key}={written}", written):
            ends_well(file, override)
