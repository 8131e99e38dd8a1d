"""Stages: what their keys contain, and what computing them leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cells import files_in

from btu.errors import UserError
from btu.private_folder import private_folder, publish
from btu.provenance import code_version, environment
from btu.settings import TrainSettings
from btu.stages import (
    MODEL,
    RECORD,
    Stage,
    StageFunction,
    StageRun,
    as_config,
    compute,
    read_record,
    run_stage,
    stage,
)
from btu.training import Encoded
from btu.types import Progress

CPU = torch.device("cpu")
CALLS: list[str] = []


def work(id: str, version: int) -> StageFunction:
    """Return a stage function with this id in keys."""
    return stage(version=version, id=id)(lambda run: {})


# Toy stages ------------------------------------------------------------------------------------


@stage(version=1)
def write_number(run: StageRun) -> dict[str, Any]:
    """Write a number; fail if the config demands it, after half of it was written."""
    CALLS.append(run.config["label"])
    (run.folder / "number.txt").write_text(str(run.config["number"]))
    if run.where.get("fails"):
        raise RuntimeError("the power went")
    return {"number": run.config["number"]}


@stage(version=1)
def add_up(run: StageRun) -> dict[str, Any]:
    """Write the sum of all inputs."""
    CALLS.append("sum")
    numbers = [int((folder / "number.txt").read_text()) for folder in run.inputs.values()]
    assert [run.facts(role)["number"] for role in run.inputs] == numbers
    (run.folder / "number.txt").write_text(str(sum(numbers)))
    return {"number": sum(numbers)}


class Parrot(torch.nn.Module):
    """Logits that its only weight decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        class Output:
            logits = self.weight.expand(len(input_ids), -1)

        return Output


@stage(version=1)
def train_parrot(run: StageRun) -> dict[str, Any]:
    data = Encoded.from_lists([[1]] * 10, [0, 1] * 5, pad_id=0)
    run.fit(
        Parrot(),
        data,
        TrainSettings(epochs=2, batch_size=4, precision="fp32"),
        seed=0,
        stage="parrot",
    )
    return {"device": str(run.device), "accumulation": run.accumulation}


@pytest.fixture
def calls() -> list[str]:
    """What the toy stages did, in order."""
    CALLS.clear()
    return CALLS


def number(label: str, value: int = 1, **changes: Any) -> Stage:
    return Stage(
        f"number {label}",
        write_number,
        {"label": label, "number": value},
        **changes,
    )


def total(*parts: Stage, **changes: Any) -> Stage:
    inputs = {f"part {i}": part for i, part in enumerate(parts)}
    return Stage("sum", add_up, {}, inputs, **changes)


# Keys ------------------------------------------------------------------------------------------


def hand_made() -> Stage:
    inner = Stage("inner", work("m:g", 1), {})
    return Stage("outer", work("m:f", 3), {"b": "ü", "a": [0.5, None, True]}, {"rows": inner})


def test_the_key_is_the_hash_of_what_acts() -> None:
    # printf '%s' TEXT | sha256sum, the first 24 digits, for the inner stage's TEXT
    # {"config": {}, "function": "m:g", "inputs": {}, "version": 1}
    inner = "07db43afff6e088edda94de2"
    # and for the outer's, keys sorted, what is not ASCII escaped:
    text = (
        r'{"config": {"a": [0.5, null, true], "b": "\u00fc"}, "function": "m:f", '
        r'"inputs": {"rows": "07db43afff6e088edda94de2"}, "version": 3}'
    )
    assert hand_made().inputs["rows"].key == inner
    assert hand_made().key == "7724b3b58246953058c5d25c"
    assert hashlib.sha256(text.encode()).hexdigest()[:24] == hand_made().key


def test_a_function_that_moves_keeps_its_keys() -> None:
    # The id of its function identifies a stage; where a worker imports it from has no effect.
    moved = StageFunction(write_number.call, 1, "old.place:old_name")
    stages = [Stage("x", function, {"n": 1}) for function in (work("old.place:old_name", 1), moved)]
    assert stages[0].key == stages[1].key
    assert stages[1].node()["function"] == f"{__name__}:write_number"


def test_a_stage_function_is_known_by_its_place_where_no_id_is_given() -> None:
    assert (write_number.id, write_number.version) == (f"{__name__}:write_number", 1)
    assert write_number.path == write_number.id
    assert work("m:f", 3).id == "m:f"


def test_the_key_is_the_same_in_every_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import test_stages; print(test_stages.hand_made().key)"],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hand_made().key


@pytest.mark.parametrize(
    "changes",
    [
        {"function": work("m:other", 3)},
        {"function": work("m:f", 4)},
        {"config": {"b": "ü", "a": [0.5, None, False]}},
        {"config": {"b": "ü", "a": [0.5, None, True], "c": None}},
        {"inputs": {}},
        {"inputs": {"rows": Stage("inner", work("m:g", 2), {})}},
        {"inputs": {"other role": Stage("inner", work("m:g", 1), {})}},
        {
            "inputs": {
                "rows": Stage(
                    "inner", work("m:g", 1), {}, {"deep": Stage("deep", work("m:h", 1), {"x": 1})}
                )
            }
        },
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_acts_moves_the_key(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(hand_made(), **changes).key != hand_made().key


@pytest.mark.parametrize(
    "changes",
    [
        {"where": {"path": "/elsewhere"}},
        {"name": "called otherwise"},
        {"kind": "cell"},
        {"units": 7},
        {"light": ("rows",)},
        {"model": True},
        # The same content in another order, and another object with the same key.
        {"config": {"a": [0.5, None, True], "b": "ü"}},
        {"inputs": {"rows": Stage("called otherwise", work("m:g", 1), {}, kind="host", units=3)}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_does_not_act_leaves_the_key(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(hand_made(), **changes).key == hand_made().key


@pytest.mark.parametrize(
    "value",
    [Path("/x"), {1, 2}, b"bytes", object(), torch.tensor(1), 1j],
    ids=lambda value: type(value).__name__,
)
def test_a_config_that_json_cannot_hold_has_no_key(value: object) -> None:
    # Written out with str(), such values would differ between processes or machines.
    stage = Stage("x", work("m:f", 1), {"value": value})
    with pytest.raises(TypeError, match="not JSON serializable"):
        _ = stage.key


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'host'.*got 'gpu'"):
        number("a", kind="gpu")


def test_the_closure_is_inputs_first_and_each_key_once() -> None:
    # a <- left, right <- top, and `top` reads `a` itself too; "again" is another object with a's
    # key.
    a, again = number("a"), number("a")
    left, right = total(a), total(again, number("b"))
    top = total(left, right, a)
    found = list(top.closure())
    assert [stage.key for stage in found] == [
        stage.key for stage in (a, left, number("b"), right, top)
    ]
    assert found[-1] is top
    assert [stage.key for stage in a.closure()] == [a.key]


def test_a_node_is_plain_data() -> None:
    inner = number("a")
    stage = total(
        inner,
        where={"path": "/data"},
        light=("part 0",),
        reads=("part 0",),
        kind="cell",
        units=7,
        model=True,
    )
    node = stage.node()
    assert json.loads(json.dumps(node)) == node
    assert node == {
        "key": stage.key,
        "name": "sum",
        "function": f"{__name__}:add_up",
        "config": {},
        "where": {"path": "/data"},
        "inputs": {"part 0": inner.key},
        "light": ["part 0"],
        "reads": ["part 0"],
        "kind": "cell",
        "units": 7,
    }


def test_settings_become_plain_data_of_their_own() -> None:
    settings = TrainSettings(max_grad_norm=None)
    assert as_config(settings) == dataclasses.asdict(settings)
    # Equal settings may be written differently; which were seen first must not decide the key.
    texts = [json.dumps(as_config(TrainSettings(max_grad_norm=norm))) for norm in (1, 1.0)]
    assert ['"max_grad_norm": 1}' in text for text in texts] == [True, False]
    as_config(settings)["epochs"] = 99
    assert as_config(settings)["epochs"] == 3


# Computing -------------------------------------------------------------------------------------


def test_each_key_is_computed_once(tmp_path: Path, calls: list[str]) -> None:
    a, again, b = number("a", 1), number("a", 1), number("b", 2)
    top = total(total(a, b), again)
    folder = compute(top, tmp_path)
    # 1 + 2, and 1 again
    assert (folder / "number.txt").read_text() == "4"
    assert calls == ["a", "b", "sum", "sum"]
    assert folder == tmp_path / top.key
    assert {path.name for path in tmp_path.iterdir()} == {s.key for s in top.closure()}


def test_stages_under_one_root_share_their_work(tmp_path: Path, calls: list[str]) -> None:
    compute(total(number("a")), tmp_path)
    assert calls == ["a", "sum"]
    before = files_in(tmp_path)
    compute(total(number("a"), number("b")), tmp_path)
    assert calls == ["a", "sum", "b", "sum"]  # a was there
    assert compute(total(number("a")), tmp_path).is_dir()
    assert len(calls) == 4
    after = files_in(tmp_path)
    assert {path: after[path] for path in before} == before
    compute(number("a"), tmp_path / "other" / "root")
    assert calls[-1] == "a"


def test_a_stage_that_raises_leaves_nothing_behind(tmp_path: Path, calls: list[str]) -> None:
    failing = number("b", where={"fails": True})
    with pytest.raises(RuntimeError, match="the power went"):
        compute(total(number("a"), failing), tmp_path)
    assert calls == ["a", "b"]
    # Finished results stay; a failed stage leaves nothing.
    assert [path.name for path in tmp_path.iterdir()] == [number("a").key]
    # The same key, now without the fault (`where` has no effect): only the rest is computed.
    folder = compute(total(number("a"), number("b", where={})), tmp_path)
    assert calls == ["a", "b", "b", "sum"]
    assert (folder / "number.txt").read_text() == "2"


def test_what_a_killed_process_left_is_not_taken_for_a_result(
    tmp_path: Path, calls: list[str]
) -> None:
    # A process that is killed cannot clean up after itself.
    left = tmp_path / f".{number('a').key}-{'0' * 32}"
    left.mkdir()
    (left / "half.txt").write_text("hal")
    Path(f"{left}.lock").touch()
    folder = compute(number("a"), tmp_path)
    assert {path.name for path in folder.iterdir()} == {"number.txt", RECORD}
    assert calls == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_processes_compute_one_stage_at_once_and_keep_the_first_result(
    tmp_path: Path, calls: list[str]
) -> None:
    key = number("a").key
    with private_folder(tmp_path, key) as slower:
        (slower / "half.txt").write_text("hal")
        folder = compute(number("a"), tmp_path)
        # What another process is writing is neither removed nor in the way.
        assert (slower / "half.txt").exists()
        publish(slower, folder)
    assert {path.name for path in folder.iterdir()} == {"number.txt", RECORD}
    assert calls == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_moved_is_an_error(tmp_path: Path) -> None:
    with private_folder(tmp_path, "key") as made, pytest.raises(FileNotFoundError):
        publish(made, tmp_path / "missing" / "key")
    assert list(tmp_path.iterdir()) == []


def test_a_record_says_what_ran(tmp_path: Path) -> None:
    seen: list[Progress] = []
    stage = Stage("parrot", train_parrot, {}, units=20)
    folder = compute(stage, tmp_path, progress=seen.append)
    record = read_record(folder)
    assert record == json.loads((folder / RECORD).read_text())
    assert {name: record[name] for name in ("key", "stage", "kind", "units")} == {
        "key": stage.key,
        "stage": "parrot",
        "kind": "stage",
        "units": 20,
    }
    assert record["facts"] == {"device": "cpu", "accumulation": 1}
    assert [(e["stage"], e["epoch"], e["rows"]) for e in record["history"]] == [
        ("parrot", 1, 10),
        ("parrot", 2, 10),
    ]
    # Five rows of each class and a model that has seen none: ln 2 before its first step.
    assert record["history"][0]["loss"] == pytest.approx(0.693, abs=0.01)
    assert 0 < sum(epoch["seconds"] for epoch in record["history"]) <= record["seconds"]
    assert record["started"] > 1.6e9  # seconds since 1970, not of a clock that starts anywhere
    assert record["environment"] == environment(CPU)
    assert record["environment"]["code"] == code_version()
    assert record["environment"]["threads"] == str(torch.get_num_threads())
    # First that the stage began, then its epochs.
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        ("parrot", 0, 1),
        ("parrot", 1, 2),
        ("parrot", 2, 2),
    ]


def test_accumulation_is_told_where_it_acts(tmp_path: Path) -> None:
    stage = Stage("parrot", train_parrot, {})
    records = {}
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        folder.mkdir()
        records[parts] = run_stage(stage.node(), {}, folder, accumulation=parts)
        assert read_record(folder) == records[parts]
    assert "accumulation" not in records[1]["environment"]
    assert records[2]["environment"]["accumulation"] == "2"
    assert records[2]["facts"]["accumulation"] == 2
    # It changes results by rounding at most: the stage is the same.
    assert records[1]["key"] == records[2]["key"]
    assert records[1]["history"][1]["loss"] == pytest.approx(
        records[2]["history"][1]["loss"], rel=1e-6
    )


def test_a_host_stage_takes_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_host = Stage("parrot", train_parrot, {}, kind="host")
    folder = compute(on_host, tmp_path / "host", gpus=1)
    assert read_record(folder)["facts"]["device"] == "cpu"
    for kind in ("stage", "cell"):
        with pytest.raises(UserError, match=r"resources\.gpu is 1 but no CUDA device is visible"):
            compute(dataclasses.replace(on_host, kind=kind), tmp_path / kind, gpus=1)


def test_large_outputs_lie_in_one_folder() -> None:
    # Stores drop what is in there and computed again: its name is part of what is on disk.
    assert (MODEL, RECORD) == ("model", "record.json")


def test_the_global_random_state_is_left_alone(tmp_path: Path, global_random_state: None) -> None:
    compute(Stage("parrot", train_parrot, {}), tmp_path)
