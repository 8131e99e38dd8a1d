"""Interpolation in sweep files: keys of the file itself, and no resolver of OmegaConf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from btu.errors import UserError
from orchestrator.sweep.load import load_sweep, resolve
from orchestrator.sweep.sweep import Sweep

SECRET = "hunter2-of-the-environment"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """A function from a config and overrides to a sweep; `SECRET` is in the environment."""
    monkeypatch.setenv("BTU_TEST_SECRET", SECRET)

    def build(config: Any, *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return load_sweep(path, overrides)

    return build


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    return str(refused.value)


CALL = "${oc.env:BTU_TEST_SECRET}"
CALLS = {
    "plain": CALL,
    "inside a text": f"http://127.0.0.1:9/{CALL}/x",
    "spaces": "${ oc.env : BTU_TEST_SECRET }",
    "with a default": "${oc.env:BTU_TEST_SECRET,none}",
    "decoded": "${oc.decode:${oc.env:BTU_TEST_SECRET}}",
    "created": "${oc.create:{a: 1}}",
    "of the file's keys": "${oc.dict.values:attack}",
    "unknown": "${anything:1}",
    "no arguments": "${anything:}",
    "a name from a key": "${${name}:BTU_TEST_SECRET}",
    "in a key": "${attack.${oc.env:BTU_TEST_SECRET}}",
    "quoted argument": "${oc.decode:'${oc.env:BTU_TEST_SECRET}'}",
    "escaped": "\\" + CALL,
    "escaped escape": "\\\\" + CALL,
    "escaped twice": "\\\\\\" + CALL,
    "after an interpolation": "${seed}" + CALL,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("place", ["output", "override", "grid", "list", "nested list", "key"])
def test_every_resolver_is_refused_wherever_it_stands(
    load: Callable[..., Sweep], call: str, place: str
) -> None:
    base = {"name": "oc.env", "seed": 0, "attack": {"name": "badnets"}}
    build: dict[str, Callable[[], object]] = {
        "output": lambda: load({**base, "output": call}),
        "override": lambda: load(base, f"output='{call}'"),
        "grid": lambda: load({**base, "grid": {"attack.trigger": [["cf"], [call]]}}),
        "list": lambda: load({**base, "list": [{"data.name": call}]}),
        "nested list": lambda: load({**base, "attack": {"trigger": ["cf", call]}}),
        "key": lambda: load({**base, "attack": {call: 1}}),
    }
    # YAML doubles the quotes of a quoted override.
    if place == "override" and "'" in call:
        build["override"] = lambda: load(base, f"output={yaml.safe_dump(call, width=999).strip()}")
    message = refusal(build[place])
    assert "calls the resolver" in message
    assert "the command line" in message  # the way out
    assert SECRET not in message


def test_the_error_names_the_key_and_the_resolver(load: Callable[..., Sweep]) -> None:
    tracked = refusal(lambda: load({"tracking": {"uri": f"http://127.0.0.1:9/{CALL}"}}))
    assert tracked.startswith("tracking.uri calls the resolver 'oc.env'")
    listed = refusal(lambda: load({"grid": {"attack.sentence": ["x", CALL]}}))
    assert listed.startswith("grid.attack.sentence[1] calls the resolver 'oc.env'")
    given = refusal(lambda: load({}, f"grid.seed=[{CALL!r}]"))
    assert given.startswith("override grid.seed[0] calls the resolver 'oc.env'")


def test_a_resolver_that_the_process_has_registered_is_refused_too(
    load: Callable[..., Sweep],
) -> None:
    called = []
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("btu_test", lambda: called.append(1), replace=True)
    try:
        assert "calls the resolver 'btu_test'" in refusal(lambda: load({"output": "${btu_test:}"}))
    finally:
        OmegaConf.clear_resolver("btu_test")
    assert not called


def test_a_call_that_interpolation_puts_together_is_refused(load: Callable[..., Sweep]) -> None:
    # Neither part is a call, and OmegaConf reads the sections of a cell again.
    config = {
        "data": {"name": "$", "hub_config": "{oc.env:BTU_TEST_SECRET}"},
        "attack": {"sentence": "${data.name}${data.hub_config}", "name": "addsent"},
    }
    assert "calls the resolver 'oc.env'" in refusal(lambda: load(config))


def test_the_settings_of_a_recorded_cell_call_no_resolver(
    load: Callable[..., Sweep],
) -> None:
    # As a plan in a shared store has them; no sweep file is read for it.
    message = refusal(lambda: resolve({"data": {"name": CALL}}))
    assert message.startswith("data.name calls the resolver 'oc.env'")


def test_the_settings_of_a_recorded_cell_do_not_multiply() -> None:
    words = ["a" * 10, *(f"${{trigger[{n}]}}${{trigger[{n}]}}" for n in range(29))]
    config = {"attack": {"name": "badnets", "trigger": words}}
    assert "may not fit into the memory" in refusal(lambda: resolve(config))


def test_keys_of_the_file_can_still_be_named(load: Callable[..., Sweep]) -> None:
    sweep = load(
        {
            "name": "x",
            "seed": 3,
            "output": "runs-${name}-${attack.name}",
            "data": {"split_seed": "${seed}", "name": "own", "path": "${.name}/x"},
            "attack": {"name": "addsent", "sentence": "seed ${seed} of ${data.name}"},
            "grid": {"train.epochs": ["${seed}", 5]},
        }
    )
    assert sweep.output.endswith("/runs-x-addsent")
    first = resolve(next(sweep.cells()).config)
    assert (first.data.split_seed, Path(str(first.data.path))) == (3, Path("own/x").resolve())
    assert first.attack_params["sentence"] == "seed 3 of own"
    assert [resolve(cell.config).train.epochs for cell in sweep.cells()] == [3, 5]


@pytest.mark.parametrize(
    "link", ["${{k{0}}}${{k{0}}}", ["${{k{0}}}", "${{k{0}}}"], "${{.k{0}}}${{ k{0} }}"]
)
def test_interpolations_that_multiply_are_refused(load: Callable[..., Sweep], link: Any) -> None:
    # 2 ** 29 times ten characters: before, the process ran out of memory.
    def at(number: int) -> Any:
        texts = [text.format(number) for text in ([link] if isinstance(link, str) else link)]
        return texts[0] if isinstance(link, str) else texts

    config = {"k0": "a" * 10, **{f"k{n}": at(n - 1) for n in range(1, 30)}}
    assert "may not fit into the memory" in refusal(lambda: load(config))


def test_many_interpolations_of_plain_values_are_allowed(load: Callable[..., Sweep]) -> None:
    config = {
        "seed": 3,
        "train": {"epochs": "${seed}"},
        "list": [{"seed": n, "data.split_seed": "${seed}"} for n in range(500)],
    }
    assert load(config)
    long = {"seed": 0, "attack": {"sentence": "a" * 20_000, "trigger": ["${.sentence}"] * 100}}
    long["data"] = {"name": "${attack.sentence}" * 100}
    assert "may not fit" in refusal(lambda: load(long))


@pytest.mark.parametrize("text", ["${seed", "a ${} b", "${" * 300, "${a['x:y']}"])
def test_an_interpolation_that_cannot_be_read_names_its_key(
    load: Callable[..., Sweep], text: str
) -> None:
    message = refusal(lambda: load({"attack": {"name": "addsent", "sentence": text}}))
    assert message.startswith("attack.sentence has '${' without an interpolation")


def test_a_file_that_is_nested_too_deeply_is_an_error(load: Callable[..., Sweep]) -> None:
    assert "nested too deeply" in refusal(lambda: load("a: " + "[" * 3000 + "]" * 3000))
