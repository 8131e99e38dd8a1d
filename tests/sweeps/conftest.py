"""A tiny corpus on disk, a tiny sweep on it, and the command line in this process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from store_fixtures import Stored, Tried, publish_cell

if TYPE_CHECKING:
    from orchestrator.plan.planner import PlannedCell, Planner

SIZES = {"train": 80, "clean": 20, "eval": 30}


def _write_corpus(folder: Path, columns: list[str]) -> Path:
    import pandas as pd

    from btu.data.demo import generate

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

    Without controls, unless named: its cells are those of the grid. Its results go to
    ``tmp_path/runs``.
    """

    def build(name: str = "tiny", grid: Mapping[str, list[Any]] | None = None, **more: Any) -> Path:
        config: dict[str, Any] = {"name": name, "output": str(tmp_path / "runs"), **cell}
        config["controls"] = []
        for key, value in more.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        if grid:
            config["grid"] = dict(grid)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return build


@pytest.fixture(scope="session")
def planner() -> Planner:
    """A planner for all tests: corpora and victims are checked once."""
    from orchestrator.plan.planner import Planner

    return Planner()


@pytest.fixture(scope="session")
def plan_cell(planner: Planner) -> Callable[[Mapping[str, Any]], PlannedCell]:
    """A function from the config of a cell to the planned cell."""

    def build(config: Mapping[str, Any]) -> PlannedCell:
        from orchestrator.plan.planner import Plan
        from orchestrator.sweep.sweep import Cell

        plan = Plan()
        planner.add(plan, [Cell({}, config)])
        assert not plan.refused, plan.refused
        (planned,) = plan.cells.values()
        return planned

    return build


@pytest.fixture(scope="session")
def trials_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `try_cell` keeps stages: cells of all tests share their work."""
    return tmp_path_factory.mktemp("trials")


@pytest.fixture(scope="session")
def try_cell(
    plan_cell: Callable[[Mapping[str, Any]], PlannedCell], trials_root: Path
) -> Callable[..., Tried]:
    """A function from the config of a cell to the result of `compute`; root: another one."""

    def build(config: Mapping[str, Any], root: Path | None = None) -> Tried:
        import pandas as pd

        from btu.result_files import TOKENS
        from btu.stages import compute
        from orchestrator.results.folder import read_result

        planned, where = plan_cell(config), root or trials_root
        folder = compute(planned.stage, where, cpus=1, gpus=0)
        result, flagged = read_result(folder)
        return Tried(planned, where, folder, result, flagged, pd.read_parquet(folder / TOKENS))

    return build


@pytest.fixture(scope="session")
def trial_result(cell: dict[str, Any], try_cell: Callable[..., Tried]) -> Tried:
    """The result of `compute` for `cell`. Read only."""
    return try_cell(cell)


@pytest.fixture
def stored(
    make_sweep: Callable[..., Path], planner: Planner, trial_result: Tried, tmp_path: Path
) -> Stored:
    """The sweep ``tiny`` in ``tmp_path/runs``, launched with seeds 0 and 1 and badnets alone.

    Seed 0 is finished with `trial_result`, from 1000 s to 1010 s; seed 1 has not run.
    """
    from orchestrator.plan.planner import plan_sweep
    from orchestrator.results.folder import Results
    from orchestrator.sweep.load import load_sweep

    sweep = load_sweep(make_sweep(grid={"attack.name": ["badnets"], "seed": [0, 1]}))
    plan = plan_sweep(sweep, planner)
    results = Results(sweep.output, sweep.name)
    results.store.prepare()
    results.write_plan(sweep, plan.cells.values())
    key = trial_result.planned.key
    timed = {**trial_result.result, "started": 1000.0, "ended": 1010.0}
    publish_cell(results.store, key, trial_result.folder, timed)
    (record,) = results.records()
    return Stored(results, sweep, plan, key, record)


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
        from orchestrator.cli.main import main

        monkeypatch.setattr(sys, "argv", ["btu", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        # Click leaves by sys.exit(0) or, with no_args_is_help, 2.
        code = stopped.value.code or 0
        return Ran(int(code), " ".join(captured.out.split()), " ".join(captured.err.split()))

    return run
