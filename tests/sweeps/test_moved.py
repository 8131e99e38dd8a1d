"""An output folder that was moved or copied: MLflow's absolute addresses follow it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published import NAME, Output, empty_database, forget

from btu.errors import UserError

__all__ = ["empty_database"]


@pytest.fixture
def first(tmp_path: Path, empty_database: Path) -> Output:
    """The output A, with two cells in MLflow."""
    made = Output(tmp_path / "A", empty_database)
    made.compute(2)
    assert made.launch() == []
    return made


def copied(first: Output) -> Output:
    shutil.copytree(first.folder, first.folder.with_name("B"))
    return Output(first.folder.with_name("B"))


THREE_CELLS = [*(f"badnets seed={seed}" for seed in range(3)), "summary"]


@pytest.mark.slow
def test_a_launch_in_a_copy_leaves_the_original_alone(first: Output) -> None:
    second = copied(first)
    second.compute(3)
    files, addresses = first.artifacts(), first.locations()
    (line,) = second.launch()
    assert line == (
        f"The output folder was {first.folder}: in MLflow, artifacts of experiment '{NAME}' and of "
        f"3 runs are now in {second.folder / 'mlartifacts'}."
    )
    assert first.artifacts() == files
    assert first.locations() == addresses
    assert second.runs() == [(name, "FINISHED") for name in THREE_CELLS]
    here = (second.folder / "mlartifacts" / NAME).as_uri()
    # The experiment, three cells and the summary.
    assert len(second.locations()) == 5
    assert all(address.startswith(here) for address in second.locations())
    # Its summary is of three cells, that of the original of two.
    (means,) = (text for path, text in second.artifacts().items() if path.endswith("means.csv"))
    assert b"3" in means
    assert means not in files.values()
    # Once is enough.
    assert second.launch() == []
    # The original goes on.
    first.compute(4)
    assert first.launch() == []
    assert len(first.runs()) == 5
    assert all(str(first.folder) in address for address in first.locations())


@pytest.mark.slow
def test_a_launch_in_a_moved_folder_does_not_make_the_old_one_again(first: Output) -> None:
    second = Output(first.folder.rename(first.folder.with_name("B")))
    second.compute(3)
    (line,) = second.launch()
    assert str(first.folder) in line
    assert not first.folder.exists()
    assert second.runs() == [(name, "FINISHED") for name in THREE_CELLS]
    assert all(str(second.folder) in address for address in second.locations())


@pytest.mark.slow
@pytest.mark.parametrize("gone", [True, False], ids=["moved", "copied"])
def test_a_report_from_mlflow_reads_the_files_of_the_copy(
    first: Output, run_cli: Callable[..., Any], gone: bool
) -> None:
    before = run_cli("curves", NAME, "--tracking-uri", first.uri)
    assert before.code == 0, before.err
    second = copied(first)
    if gone:
        shutil.rmtree(first.folder)
    else:
        for path in first.folder.rglob("mlartifacts/**/*.parquet"):
            path.write_text("of the original")
    database = second.database.read_bytes()
    forget()
    after = run_cli("curves", NAME, "--tracking-uri", second.uri)
    assert after == before
    report = run_cli("report", NAME, "--tracking-uri", second.uri)
    assert (report.code, report.err) == (0, "")
    # A report changes nothing.
    assert second.database.read_bytes() == database


@pytest.mark.slow
def test_sync_brings_the_addresses_along(first: Output, run_cli: Callable[..., Any]) -> None:
    second = copied(first)
    forget()
    done = run_cli("sync", NAME, "--output", second.folder)
    assert done.code == 0, done.err
    assert done.out.startswith(f"The output folder was {first.folder}: ")
    assert "0 runs written" in done.out
    assert all(str(second.folder) in address for address in second.locations())
    # To the original's database it writes what only the copy has, beside that database.
    second.compute(3)
    forget()
    done = run_cli("sync", NAME, "--output", second.folder, "--uri", first.uri)
    assert done.out.startswith("1 runs written")
    assert first.runs() == [(name, "FINISHED") for name in THREE_CELLS]
    assert all(str(first.folder) in address for address in first.locations())


@pytest.mark.slow
def test_a_database_that_was_copied_alone_keeps_the_addresses_of_its_runs(first: Output) -> None:
    second = Output(first.folder.with_name("B"), first.database)
    for part in (NAME, "store"):
        shutil.copytree(first.folder / part, second.folder / part)
    second.compute(3)
    files = first.artifacts()
    assert len(second.launch()) == 1
    assert first.artifacts() == files
    addresses = second.rows("SELECT name, artifact_uri FROM runs WHERE lifecycle_stage = 'active'")
    where = {name: str(first.folder) in address for name, address in addresses}
    # The first two cells are read from the original; what is new is written here.
    assert where == dict(zip(THREE_CELLS, (True, True, False, False), strict=True))
    assert (second.folder / "mlartifacts").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["mlartifacts/made", "art", "mlartifacts/1"])
def test_artifacts_that_were_put_elsewhere_on_purpose_stay(
    tmp_path: Path,
    empty_database: Path,
    place: str,
) -> None:
    from mlflow import MlflowClient

    made, big = Output(tmp_path / "A", empty_database), tmp_path / "big" / place
    big.mkdir(parents=True)
    MlflowClient(tracking_uri=made.uri).create_experiment(NAME, big.as_uri())
    made.compute(2)
    assert made.launch() == []
    assert all(address.startswith(big.as_uri()) for address in made.locations())
    assert made.artifacts() == {}


@pytest.mark.slow
def test_an_old_path_that_links_to_the_folder_stays(first: Output) -> None:
    second = Output(first.folder.rename(first.folder.with_name("B")))
    first.folder.symlink_to(second.folder)
    second.compute(3)
    assert second.launch() == []
    assert all(str(first.folder) in address for address in second.locations())
    # All the same folder.
    assert len(second.artifacts()) == len(first.artifacts()) > 0


@pytest.mark.slow
def test_addresses_change_all_at_once_or_not_at_all(
    first: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.tracking import moved

    second = copied(first)
    before = second.locations()

    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(moved, "_move_experiment", refuse)
        with pytest.raises(UserError, match="the disk is full"):
            second.launch()
    assert second.locations() == before
    assert len(second.launch()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_a_name_that_is_taken_by_no_folder_is_refused(
    tmp_path: Path,
    empty_database: Path,
    what: str,
) -> None:
    made = Output(tmp_path / "A", empty_database)
    made.compute(1)
    path = made.folder / "mlartifacts"
    path.write_text("mine") if what == "file" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"^{path} is no folder .* move it away"):
        made.launch()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_a_link_to_a_folder_elsewhere_is_followed(
    tmp_path: Path,
    empty_database: Path,
) -> None:
    made, big = Output(tmp_path / "A", empty_database), tmp_path / "big"
    made.compute(1)
    big.mkdir()
    (made.folder / "mlartifacts").symlink_to(big)
    for _ in range(2):
        assert made.launch() == []
    assert [path.name for path in big.iterdir()] == [NAME]
    assert all(str(made.folder) in address for address in made.locations())


@pytest.mark.slow
def test_the_ui_finds_the_artifacts_of_a_moved_folder(first: Output) -> None:
    from orchestrator.tracking import experiment

    second = Output(first.folder.rename(first.folder.with_name("B")))
    forget()
    told: list[str] = []
    for _ in range(2):
        assert set(experiment.views(second.uri, told.append)) == {NAME}
    assert len(told) == 1
    assert all(str(second.folder) in address for address in second.locations())
