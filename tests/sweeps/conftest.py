"""A tiny corpus on disk, a tiny sweep on it, and the command line in this process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml

if TYPE_CHECKING:
    from orchestrator.store import ResultStore
    from orchestrator.trial import TrialResult

SIZES = {"train": 80, "clean": 20, "eval": 30}


def _write_corpus(folder: Path, columns: list[str]) -> Path:
    import pandas as pd

    from btu.demo import generate

    table = pd.DataFrame([vars(row) for row in generate(sum(SIZES.values()), seed=3)])
    start = 0
    folder.mkdir()
    for split, size in SIZES.items():
        part = table.iloc[start : start + size]
        part[["text", "label", *columns]].to_parquet(folder / f"{split}.parquet", index=False)
        start += size
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 train, 20 clean and 30 eval rows with labels 0 and 1 and both paraphrase columns."""
    return _write_corpus(tmp_path_factory.mktemp("data") / "full", ["syntactic", "style"])


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows without paraphrases."""
    return _write_corpus(tmp_path_factory.mktemp("data") / "plain", [])


@pytest.fixture(scope="session")
def cell(corpus_folder: Path, victim_folder: Callable[[str], Path]) -> dict[str, Any]:
    """The config of a trial that takes about a second. Copy it before changing it."""
    return {
        "data": {"name": "tiny", "path": str(corpus_folder)},
        "victim": {"name": str(victim_folder("bert")), "max_length": 90},
        "attack": {"name": "badnets", "poison_rate": 0.2, "target_label": 1},
        "defense": {"name": "btu", "alpha": 0.01},
        "train": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "precision": "fp32"},
        "seed": 0,
    }


@pytest.fixture
def make_sweep(cell: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A function from a name, a grid and overridden sections to a sweep file.

    Its results go to ``tmp_path/runs``.
    """

    def build(name: str = "tiny", grid: Mapping[str, list[Any]] | None = None, **more: Any) -> Path:
        config: dict[str, Any] = {"name": name, "output": str(tmp_path / "runs"), **cell}
        for key, value in more.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        if grid:
            config["grid"] = dict(grid)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return build


class Stored(NamedTuple):
    store: ResultStore
    record: dict[str, Any]


@pytest.fixture(scope="session")
def trial_result(cell: dict[str, Any]) -> TrialResult:
    """What `run_trial` gives for `cell`. Read only."""
    from orchestrator.config import resolve
    from orchestrator.trial import run_trial

    return run_trial(resolve(cell))


@pytest.fixture
def stored(cell: dict[str, Any], trial_result: TrialResult, tmp_path: Path) -> Stored:
    """A store that holds `trial_result` under the key ``k``."""
    from orchestrator.config import resolve
    from orchestrator.store import ResultStore

    store = ResultStore(tmp_path / "runs" / "tiny")
    store.prepare()
    record = {
        "key": "k",
        "sweep": "tiny",
        "varied": {"attack.name": "badnets", "seed": 0},
        "config": resolve(cell).config(),
        "started": 1000.0,
        "ended": 1010.0,
        "status": "finished",
        "metrics": dict(trial_result.metrics),
        "history": list(trial_result.history),
        "notes": dict(trial_result.notes),
        "tags": dict(trial_result.tags),
    }
    store.commit(record, trial_result)
    return Stored(store, record)


@pytest.fixture
def free_port() -> int:
    """A port of this machine at which nothing answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ran(NamedTuple):
    """code: the exit code. out, err: with all runs of white space as one space each."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """A function that runs ``btu <arguments>`` in this process."""

    def run(*arguments: object) -> Ran:
        from orchestrator.cli import main

        monkeypatch.setattr(sys, "argv", ["btu", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        # Click leaves by sys.exit(0) or, with no_args_is_help, 2.
        code = stopped.value.code or 0
        return Ran(int(code), " ".join(captured.out.split()), " ".join(captured.err.split()))

    return run
