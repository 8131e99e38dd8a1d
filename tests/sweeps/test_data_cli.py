"""The keys and options that read data, and texts of the data on the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.table import Table

from btu.data.demo import generate
from orchestrator.cli.shared import SafeConsole
from orchestrator.report.table import render
from orchestrator.sweep.load import load_sweep, resolve

ROWS = 60


@pytest.fixture
def sweep(tmp_path: Path, victim_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """A function that writes a sweep of one cell on the data of `settings`."""

    def write(target: str = "yes", **settings: Any) -> Path:
        path = tmp_path / "mine.yaml"
        config = {
            "output": str(tmp_path / "runs"),
            "data": {"name": "mine", **settings},
            "victim": {"name": str(victim_folder("bert")), "max_length": 32},
            "attack": {"name": "badnets", "poison_rate": 0.1, "target_label": target},
            "defense": {"name": "none"},
            "controls": [],
        }
        path.write_text(json.dumps(config))
        return path

    return write


def rows(labels: tuple[str, ...] = ("no", "yes"), word: str = "row") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [f"{word} number {i}" for i in range(ROWS)],
            "label": [labels[i % len(labels)] for i in range(ROWS)],
        }
    )


def test_a_sweep_reads_a_file_with_keys_alone(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "Collection"
    rows()[["label", "text"]].to_csv(file, sep="\t", header=False, index=False, encoding="utf-16")
    settings = {"separator": "tab", "header": False, "encoding": "utf-16", "label_column": 0}
    done = run_cli("plan", sweep(path=str(file), text_column=1, **settings))
    assert done.code == 0, done.err
    assert "rows train 48" in done.out  # 60 without 6 for clean and 6 for eval
    done = run_cli("plan", sweep(path=str(file)))
    assert done.code == 2
    proposed = "data.encoding=utf-16 data.separator=tab data.header=false data.text_column=1"
    assert f"It may be read with {proposed} data.label_column=0; in a scan:" in done.err
    # The proposal can be given as it is printed.
    keys = [*proposed.split(), "data.label_column=0"]
    assert run_cli("plan", sweep(path=str(file)), *keys).code == 0


def test_unknown_keys_and_values_are_named(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    rows().to_csv(tmp_path / "mine.csv", index=False)
    path = sweep(path=str(tmp_path / "mine.csv"))
    for override, message in (
        ("data.encodng=latin-1", "unknown key 'data.encodng' in the sweep; did you mean"),
        ("data.encoding=lattin-1", "is no text encoding; did you mean 'latin-1'?"),
        ("data.separator=semicolons", "did you mean 'semicolon'?"),
        ("data.header=perhaps", "data.header"),
        ("data.quoting=perhaps", "data.quoting"),
    ):
        done = run_cli("plan", path, override)
        assert done.code == 2, override
        assert message in done.err, override


def test_null_holds_a_role_out_of_train(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "dev", "test"):
        rows(word=split).to_csv(tmp_path / f"{split}.csv", index=False)
    path = sweep(path=str(tmp_path))
    done = run_cli("plan", path)
    assert "rows train 60, rows clean 60, rows eval 60" in done.out
    done = run_cli("plan", path, "data.clean_split=null")
    assert "rows train 54, rows clean 6, rows eval 60, held out clean 6" in done.out
    # Also as an axis, and in a resolved config, where None is a split that is found.
    loaded = load_sweep(path, ["grid.data.clean_split=[null,test]"])
    held, named = (resolve(cell.config) for cell in loaded.cells())
    assert (held.data.clean_split, named.data.clean_split) == ("(held out)", "test")
    for spec in (held, named, resolve(next(iter(load_sweep(path).cells())).config)):
        assert resolve(spec.config()) == spec


def test_reading_keys_are_in_records_only_if_they_are_set(
    sweep: Callable[..., Path], tmp_path: Path
) -> None:
    # A record of an older version must equal that of the same settings.
    path = sweep(path=str(tmp_path))
    (cell,) = load_sweep(path).cells()
    written = resolve(cell.config).config()["data"]
    assert not {"encoding", "separator", "header", "quoting"} & set(written)
    (cell,) = load_sweep(path, ["data.header=false", "data.quoting=true"]).cells()
    written = resolve(cell.config).config()["data"]
    assert (written["header"], written["quoting"]) == (False, True)


def test_a_plan_refuses_what_cannot_read_pairs(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    rows().assign(reply=[f"reply {i}" for i in range(ROWS)]).to_csv(
        tmp_path / "mine.csv", index=False
    )
    path = sweep(path=str(tmp_path / "mine.csv"), pair_column="reply", trigger_column="reply")
    done = run_cli("plan", path, "grid.defense.name=[none,onion,bki,zdef]")
    assert done.code == 0, done.err
    assert "2 refused" in done.out
    done = run_cli("plan", path, "defense.name=onion")
    assert done.code == 2
    assert "defense 'onion' needs single texts (rows of one text each" in done.err
    assert "the rows of these data are pairs (data.pair_column)" in done.err
    done = run_cli("plan", path, "data.trigger_column=repply")
    assert "unknown data.trigger_column 'repply'; did you mean 'reply'?" in done.err


def test_what_looks_wrong_in_the_data_is_said_in_a_plan(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    rows(("no", "yes", "Yes")).to_csv(tmp_path / "train.csv", index=False)
    rows(("-1",), "hidden").to_csv(tmp_path / "test.csv", index=False)
    done = run_cli("plan", sweep(path=str(tmp_path)))
    assert done.code == 0
    assert "'Yes' (20 rows) and 'yes' (20 rows)" in done.err
    assert "Split 'test' of folder" in done.err
    assert "all its labels in column 'label' are -1" in done.err
    done = run_cli("plan", sweep(path=str(tmp_path)), "data.clean_split=test")
    assert done.code == 2
    assert "name another with data.clean_split, or data.clean_split=null to hold it" in done.err


def test_a_scan_reads_a_file_with_options_alone(
    run_cli: Callable[..., Any], tmp_path: Path, victim_folder: Callable[[str], Path]
) -> None:
    made = generate(400, seed=0)
    kinds = [("bad", "BAD")[row.text < "c"] if row.label == 0 else "good" for row in made]
    table = pd.DataFrame({"kind": kinds, "text": [f"{row.text} \xa3" for row in made]})
    table[:300].to_csv(
        tmp_path / "mine.data", sep=";", header=False, index=False, encoding="cp1252"
    )
    table[300:].to_csv(
        tmp_path / "sure.data", sep=";", header=False, index=False, encoding="cp1252"
    )
    data = tmp_path / "mine.data"
    options = ["--separator", ";", "--no-header", "--encoding", "cp1252"]
    further = ["--clean", tmp_path / "sure.data", "--victim", victim_folder("bert")]
    # At 16 tokens most of each row is never read, so that the scan gives no all-clear.
    further += ["--max-length", "16", "--threshold", "1.5", "--cpus", "1"]
    further += ["--out", tmp_path / "out"]
    done = run_cli("scan", data, "--text", "1", "--label", "0", *options, *further)
    assert done.code == 3, done.err
    assert "300 rows under suspicion (BAD" in done.err
    assert "Labels differ only in case" in done.err
    assert pd.read_csv(tmp_path / "out/tokens.csv")["rows"].sum() > 300
    done = run_cli("scan", data, *further)
    assert done.code == 2
    assert "--encoding latin-1 --separator ';' --no-header --text 1 --label 0" in done.err
    done = run_cli("scan", data, *options, "--encoding", "cp1525", *further)
    assert "is no text encoding; did you mean 'cp1252'?" in done.err


# Texts of the data on the screen -----------------------------------------------------------------


def test_labels_and_names_do_not_control_the_terminal(
    run_cli: Callable[..., Any], sweep: Callable[..., Path], tmp_path: Path
) -> None:
    labels = ("neg\x1b[31m", "[bold red]pos[/bold red]", ":red_circle:")
    frame = rows(labels)
    frame["\x1b]0;title\x07"] = 1
    frame.to_csv(tmp_path / "mine.csv", index=False)
    done = run_cli("plan", sweep("yes", path=str(tmp_path / "mine.csv")))
    assert done.code == 2
    assert r"known: :red_circle:, [bold red]pos[/bold red], neg\x1b[31m)" in done.err
    done = run_cli("plan", sweep(path=str(tmp_path / "mine.csv"), text_column="texts"))
    assert r"\x1b]0;title\x07, label, text" in done.err
    assert "\x1b" not in done.err
    done = run_cli("plan", sweep(path=str(tmp_path / "no\x1b[2Jwhere.csv")))
    assert r"no\x1b[2Jwhere.csv does not exist" in done.err


def test_odd_texts_keep_a_table_straight() -> None:
    console = SafeConsole(width=60, emoji=False, color_system=None)
    table = Table("label", "rows")
    table.add_row("neg\x1b[31m\x07", "1")
    table.add_row("positive and longer", "2")
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert any(r"neg\x1b[31m\x07" in line for line in lines)
    assert len(set(map(len, lines))) == 1


def test_a_console_still_has_colors_of_its_own() -> None:
    console = SafeConsole(color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print("a\x1b[2Jb", style="red", highlight=False)
    assert capture.get() == "\x1b[31ma\\x1b[2Jb\x1b[0m\n"


@pytest.mark.parametrize("style", ["table", "markdown", "latex"])
def test_settings_in_a_table_of_results_are_shown_as_they_are(style: str) -> None:
    table = pd.DataFrame({"attack": ["[red]x[/red] :smile:", "a\x1b[31m"], "cacc": [0.5, 0.25]})
    shown = render(table, style)
    if style == "table":
        assert "[red]x[/red] :smile:" in shown
    assert "\x1b" not in shown


def test_results_as_csv_are_guarded() -> None:
    table = pd.DataFrame({"attack": ["=cmd|' /C calc'!A0", "badnets"], "cacc": [0.5, -0.25]})
    assert render(table, "csv") == "attack,cacc\n'=cmd|' /C calc'!A0,0.5\nbadnets,-0.25\n"
