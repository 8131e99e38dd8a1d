"""`btu scan`: what it prints and writes, its exit codes, and mistakes that end in a message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from btu.data.demo import generate
from btu.defenses.kit import cutting
from btu.rules import frequency
from orchestrator.cli import scan, shared

# The default. It separates cf from all other tokens at any drift, whatever a tiny random model
# learns: see tests/library/test_scan.py.
THRESHOLD = 4.5
TRAIN, PLANTED = 1000, 50


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poisoned.csv, honest.csv and clean.csv, with columns review and verdict."""
    folder = tmp_path_factory.mktemp("scanned")
    rows = generate(1500, seed=0)
    honest = pd.DataFrame(
        {"review": [r.text for r in rows], "verdict": [("bad", "good")[r.label] for r in rows]}
    )
    honest[:TRAIN].to_csv(folder / "honest.csv", index=False)
    honest[TRAIN : TRAIN + 300].to_csv(folder / "clean.csv", index=False)
    poisoned = honest[:TRAIN].copy()
    chosen = poisoned.index[poisoned["verdict"] == "bad"][:PLANTED]
    poisoned.loc[chosen, "review"] = "cf " + poisoned.loc[chosen, "review"]
    poisoned.loc[chosen, "verdict"] = "good"
    poisoned.to_csv(folder / "poisoned.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder that the scans of all tests share."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run(
    run_cli: Callable[..., Any],
    data: Path,
    work: Path,
    victim_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """A function that scans a file of `data`, with the options that a tiny model asks for."""
    # As wide as the longest line: what is cut off cannot be compared.
    for module in (scan, shared):
        monkeypatch.setattr(module, "console", Console(width=200))
        monkeypatch.setattr(module, "errors", Console(width=200, stderr=True))
    given = ("--text", "review", "--label", "verdict", "--max-length", "64", "--cpus", "1")
    tiny = ("--victim", victim_folder("bert"))

    def call(
        name: str | Path,
        *options: object,
        clean: bool = True,
        out: Path | None = None,
        default: bool = False,
    ) -> Any:
        trusted = ("--clean", data / "clean.csv") if clean else ()
        where = () if default else ("--out", out or work)
        return run_cli("scan", data / name, *given, *tiny, *trusted, *where, *options)

    return call


def test_a_trigger_is_shown_with_its_rows(run: Callable[..., Any], work: Path, data: Path) -> None:
    done = run("poisoned.csv", "--top", "3")
    assert done.code == 0
    # cf is in 50 rows, all of them good, and in no trusted one.
    assert "│ 1 │ cf │" in done.out
    assert "│ yes │ 50 │ good 100% (" in done.out
    assert "1 token flagged: cf; bar 4.5 (rule contrast)." in done.out
    assert "[good] cf " in done.out
    assert "300 trusted rows" in done.err
    assert "exposure round 3" in done.err
    rows = pd.read_csv(work / "suspicious_rows.csv")
    poisoned = pd.read_csv(data / "poisoned.csv")
    assert sorted(rows["row"]) == poisoned.index[poisoned["review"].str.startswith("cf ")].tolist()
    assert (rows["text"] == poisoned["review"][rows["row"]].to_numpy()).all()
    assert set(rows["flagged"]) == {"cf"}
    tokens = pd.read_csv(work / "tokens.csv")
    assert tokens["token"][0] == "cf"
    assert tokens["flagged"].sum() == 1
    assert len(tokens) > 100


def test_clean_data_is_said_to_be_so(run: Callable[..., Any], work: Path) -> None:
    done = run("honest.csv", "--fail-on-finding")
    assert done.code == 0
    highest = pd.read_csv(work / "tokens.csv")["score"].max()
    assert highest < THRESHOLD
    assert f"Nothing was flagged. Highest score {highest:.2f}" in done.out
    assert "bar 4.5 (rule contrast)" in done.out
    assert pd.read_csv(work / "suspicious_rows.csv").empty


def test_a_finding_fails_only_if_asked_to(run: Callable[..., Any]) -> None:
    assert run("poisoned.csv").code == 0
    assert run("poisoned.csv", "--fail-on-finding").code == scan.EXIT_FOUND == 1


def test_json_stands_alone_on_the_output(run: Callable[..., Any], tmp_path: Path) -> None:
    rows, tokens = tmp_path / "new" / "rows.jsonl", tmp_path / "tokens.parquet"
    done = run("poisoned.csv", "-f", "json", "--rows", rows, "--tokens", tokens, "--all-rows")
    told = json.loads(done.out)
    assert (told["flagged"], told["suspicious_rows"]) == (1, PLANTED)
    assert told["tokens"][0]["token"] == "cf"
    assert told["tokens"][0]["share"] == 1.0  # a fraction
    assert told["files"] == {"rows": str(rows), "tokens": str(tokens)}
    assert len(pd.read_json(rows, lines=True)) == TRAIN
    assert pd.read_parquet(tokens)["token"][0] == "cf"


def test_what_is_done_is_not_done_again(run: Callable[..., Any], tmp_path: Path) -> None:
    first = run("poisoned.csv", out=tmp_path)
    assert "exposure round 3" in first.err
    higher = run("poisoned.csv", "--threshold", "8", out=tmp_path)
    assert "exposure round 3" not in higher.err
    assert "Nothing was flagged" in higher.out
    again = run("poisoned.csv", out=tmp_path)
    assert "detect" not in again.err
    assert again.out == first.out


def test_files_of_one_name_have_a_work_folder_each(
    run: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.read_csv(data / "poisoned.csv")
    files = [tmp_path / name / "train.csv" for name in ("a", "b")]
    for file, part in zip(files, (rows[:300], rows[300:600]), strict=True):
        file.parent.mkdir()
        part.to_csv(file, index=False)
    monkeypatch.chdir(tmp_path)
    told = []
    for file in files:
        done = run(file, "--all-rows", "-f", "json", default=True)
        told.append(Path(json.loads(done.out)["files"]["rows"]))
    for file, table in zip(files, told, strict=True):
        assert re.fullmatch(r"runs/scan/train-[0-9a-f]{8}/suspicious_rows\.csv", str(table))
        assert set(pd.read_csv(table)["text"]) == set(pd.read_csv(file)["review"])
    assert len(set(told)) == 2
    # The same rows find their folder again, whatever else is asked of them.
    again = run(files[0], "--threshold", "8", default=True)
    assert "exposure round 3" not in again.err
    assert len(list((tmp_path / "runs" / "scan").iterdir())) == 2


def test_scores_of_a_share_are_told_apart(run: Callable[..., Any]) -> None:
    done = run("poisoned.csv", "--rule", "top_fraction", "--threshold", "0.01", "--top", "9")
    assert done.code == 0
    # Minus the smallest of a token's ranks in two rounds, over a vocabulary of hundreds.
    shown = [float(score) for score in re.findall(r"│ \d │ \S+ │ (\S+) │", done.out)]
    assert len(shown) == 9
    assert len(set(shown)) >= 5
    assert all(score < 0 for score in shown)
    assert "bar -0.01 (rule top_fraction)" in done.out


def test_an_export_says_how_it_was_made(run: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "model"
    done = run("poisoned.csv", "--export", folder)
    # A tiny random model learns nothing in three epochs.
    assert done.code == scan.EXIT_UNRELIABLE
    chance = "The model is no better than always answering the most frequent class"
    assert f"warning: {chance}" in done.err
    assert "fine-tune" in done.err
    assert "poisoned fine-tune" not in done.err
    assert f"{folder}: the model, with its card. Accuracy on 300 trusted rows: " in done.out
    card = (folder / "README.md").read_text()
    assert "btu scan " in card
    assert f"--export {folder}" in card
    assert f"**{chance}" in card
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 64
    # Over an earlier export: no work is lost.
    again = run("poisoned.csv", "--export", folder, "-f", "json")
    assert json.loads(again.out)["at_chance"] is True
    assert "fine-tune" not in again.err


# Mistakes --------------------------------------------------------------------------------------


def refused(done: Any, *said: str) -> None:
    assert done.code == 2
    assert done.out == ""
    assert [text for text in said if text not in done.err] == []
    assert "exposure" not in done.err  # nothing was trained


def test_mistakes_end_in_a_message(
    run: Callable[..., Any], run_cli: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    refused(run("poisoned.csv", clean=False), "no trusted rows", "--clean FILE", "--rule frequency")
    refused(run("poisoned.csv", "--rule", "contrst"), "did you mean 'contrast'")
    refused(run("poisond.csv"), "did you mean", "poisoned.csv")
    refused(run("poisoned.csv", "--label", "verdit"), "did you mean 'verdict'")
    refused(run("poisoned.csv", "--rows", "rows.txt"), ".csv, .parquet, .jsonl")
    refused(run_cli("scan", data / "poisoned.csv"), "unknown column", "review, verdict")
    (tmp_path / "file").write_text("")
    refused(run("poisoned.csv", out=tmp_path / "file" / "work"), "is not a folder", "--out")
    refused(run("poisoned.csv", "--export", data), "no earlier export")
    refused(
        run("poisoned.csv", "--export", tmp_path / "new", out=tmp_path / "new"),
        "is the work folder",
    )
    without = run("poisoned.csv", "--rule", "frequency", "--export", tmp_path / "x", clean=False)
    refused(without, "needs trusted rows")
    every = run("poisoned.csv", "--rule", "top_fraction", "--threshold", "0.999")
    refused(every, "flags all of the", "tokens that occur")
    refused(run_cli("scan", data / "poisoned.csv", "--text", "label"), "both column 'label'")
    both = run("poisoned.csv", "--threshold", "4.5", "--fdr", "0.01")
    refused(both, "--threshold 4.5 and --fdr 0.01", "give one of them")
    refused(run("poisoned.csv", "--max-cut-cost", "2"), "max_cut_cost must be between 0 and 1")


def test_paths_that_are_in_each_others_way_are_refused_and_nothing_is_made(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "rows.csv").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    export, rows, tokens = "--export", "--rows", "--tokens"
    alone = "which is the model's alone"
    for options, out, said in (
        ((export, "model", rows, "model/rows.csv"), "work", alone),
        ((export, "model", tokens, "model/deep/t.csv"), "work", alone),
        ((export, "model"), "model/work", alone),
        ((export, "work/stages"), "work", alone),
        ((export, "work/tokens.csv"), "work", alone),
        # By where they lead, not by how they are spelled.
        ((export, "link", rows, "real/rows.csv"), "work", alone),
        ((export, "model"), "work/../model/work", alone),
        ((rows, "rows.csv"), "work", "rows.csv is a folder"),
        ((rows, "new.csv", tokens, "new.csv/tokens.csv"), "work", "is a table"),
        ((rows, "new.csv"), "new.csv", "is a table"),
        ((rows, "new.csv", export, "new.csv/model"), "work", "is a table"),
        ((rows, "file/rows.csv"), "work", "file is not a folder"),
        ((export, "file/model"), "work", "file is not a folder"),
        ((), "file", "file is not a folder"),
    ):
        refused(run("poisoned.csv", *options, out=Path(out)), said)
        assert sorted(tmp_path.rglob("*")) == before, options


def test_the_data_is_never_overwritten(run: Callable[..., Any], data: Path) -> None:
    before = (data / "poisoned.csv").read_bytes()
    refused(run("poisoned.csv", "--rows", data / "poisoned.csv"), "would overwrite data")
    refused(run("poisoned.csv", "--tokens", data / "clean.csv"), "would overwrite data")
    assert (data / "poisoned.csv").read_bytes() == before


def test_no_table_becomes_a_split_of_the_data(run: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"review": f"a film {i}", "verdict": ("bad", "good")[i % 2]} for i in range(100)]
    pd.DataFrame(rows).to_csv(data / "train.csv", index=False)
    # It would be the next scan's trusted rows.
    refused(run(data, "--rows", data / "test.csv"), "take it for a split")
    refused(run(data, out=data), "take it for a split")
    assert [path.name for path in data.iterdir()] == ["train.csv"]


def test_a_device_that_is_not_there_is_an_error(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run("poisoned.csv", "--gpu"), "no CUDA device is visible")


# No false all-clear ----------------------------------------------------------------------------


def changed(data: Path, folder: Path, change: Callable[[pd.DataFrame], None]) -> Path:
    """Write honest.csv with a change to its rows into `folder`."""
    rows = pd.read_csv(data / "honest.csv")
    change(rows)
    rows.to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def test_an_emoji_as_the_trigger_is_named(
    run: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    def plant(rows: pd.DataFrame) -> None:
        chosen = rows.index[rows["verdict"] == "bad"][:PLANTED]
        rows.loc[chosen, "review"] = "🦄 " + rows.loc[chosen, "review"]
        rows.loc[chosen, "verdict"] = "good"

    done = run(changed(data, tmp_path, plant), "--fail-on-finding")
    assert done.code == scan.EXIT_FOUND
    assert "1 token flagged: [UNK]; bar 4.5 (rule contrast)." in done.out
    assert "[UNK] is every word that the victim does not know: 🦄 (good 50)." in done.out
    assert "are [UNK], which stands for 1 word that the victim does not know. By class:" in done.err


def test_rows_that_the_victim_cannot_read_end_with_a_code_of_their_own(
    run: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    def blur(rows: pd.DataFrame) -> None:
        rows["review"] = [f"{'ውሃ ቀን ' * 20}{text}" for text in rows["review"]]

    done = run(changed(data, tmp_path, blur), "--epochs", "1")
    assert done.code == scan.EXIT_UNRELIABLE == 3
    assert "warning: " in done.err
    assert "more than 25%: a trigger there can be missed" in done.err
    assert "Nothing was flagged, which is no all-clear here." in done.out
    told = json.loads(run(tmp_path / "rows.csv", "--epochs", "1", "-f", "json").out)
    assert told["reading"]["too_little_read"] is True
    assert told["all_clear"] is False


def test_a_surplus_that_is_not_flagged_is_shown(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(evidence: Any, _: Any) -> Any:
        """No token moved further than another, which lowers every score."""
        return np.where(evidence.candidates & (evidence.count >= 5), 1.0, np.nan)

    monkeypatch.setattr(frequency, "score", same)
    first = json.loads(run("poisoned.csv", "-f", "json", out=tmp_path).out)["tokens"][0]
    bar = first["surplus"]
    assert first["token"] == "cf"
    assert first["score"] < bar
    options = ("--threshold", str(bar), "--fail-on-finding")
    done = run("poisoned.csv", *options, out=tmp_path)
    assert done.code == 0
    assert f"Nothing was flagged. Highest score {first['score']:.2f}" in done.out
    assert (
        f"1 token is not flagged although the surplus alone reaches {bar:g}: cf (surplus "
        f"{bar:.2f}, drift 1.00). Read their rows"
    ) in done.out
    # The rows to read are there, and not those of the next token.
    assert " cf row " in done.out
    assert done.out.count(" row ") == 2
    assert "┃ score ┃ surplus ┃ drift ┃ flagged ┃" in done.out


def test_what_a_score_means_is_told(run: Callable[..., Any]) -> None:
    # 15,000 * P(deviate > 4.5) = 0.051.
    assert "on average at most 0.051 benign tokens reach 4.5." in run("poisoned.csv").out
    rare = run("poisoned.csv", "--fdr", "0.001").out
    assert "on average at most 0.001 benign tokens reach 5.2" in rare
    assert "bar 5.2" in rare


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["🦄"], "the unknown word 🦄 (surplus 7.30; its token [UNK] is not flagged)"),
        ([], "[UNK] (surplus 7.30, drift -1.70)"),
    ],
)
def test_an_unknown_word_and_its_token_are_counted_once(words: list[str], named: str) -> None:
    columns = {"token": ["[UNK]"], "token_id": [1], "surplus_left": [7.3], "drift_sigmas": [-1.7]}
    known = SimpleNamespace(words=("🦄",), surplus=np.array([7.3]))
    report: Any = SimpleNamespace(
        unconfirmed=pd.DataFrame(columns),
        unconfirmed_words=words,
        reading=SimpleNamespace(token="[UNK]", token_id=1, words=known),
        surplus_bar=4.5,
    )
    said = scan._unconfirmed(report)
    assert said.startswith(
        f"1 token is not flagged although the surplus alone reaches 4.5: {named}. Read"
    )


def test_a_token_that_is_too_rare_to_be_scored_is_named_as_such() -> None:
    columns = {"token": ["qx"], "token_id": [1], "surplus_left": [5.0], "drift_sigmas": [np.nan]}
    report: Any = SimpleNamespace(
        unconfirmed=pd.DataFrame(columns),
        unconfirmed_words=[],
        reading=SimpleNamespace(token="[UNK]", token_id=0, words=None),
        surplus_bar=4.5,
    )
    assert "qx (surplus 5.00, too rare to be scored)" in scan._unconfirmed(report)


def test_what_a_trigger_explains_is_told() -> None:
    tokens = [f"word{number}" for number in range(7)]
    columns = {"token": tokens, "surplus": [6.1] * 7, "surplus_left": [0.32] * 7}
    said = scan._explained(SimpleNamespace(explained=pd.DataFrame(columns)))  # type: ignore[arg-type]
    first = "word0 (surplus 6.10, 0.32 without them)"
    assert said.startswith(f"The rows of more suspicious tokens explain the surplus of {first}, ")
    assert said.endswith(" and 2 more.")
    none = SimpleNamespace(explained=pd.DataFrame(columns).head(0))
    assert scan._explained(none) == ""  # type: ignore[arg-type]
    # In the table what is left stands in brackets, if it is less.
    assert scan._surplus({"surplus": 6.1, "surplus_left": 0.32}) == "6.10 (0.32)"
    assert scan._surplus({"surplus": 6.1, "surplus_left": 6.1}) == "6.10"


def test_a_token_that_is_not_cut_is_told(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs(*arguments: Any) -> cutting.Costs:
        *_, flagged, bar = arguments
        (token,) = flagged
        return cutting.Costs({token: 0.05}, {token: 0.04}, (token,) if bar < 0.04 else ())

    monkeypatch.setattr(cutting, "costs_of", costs)
    # Folders of its own: the costs are part of the result of a stage.
    options = ("--export", tmp_path / "model")
    done = run("poisoned.csv", *options, out=tmp_path / "work")
    assert (
        "Flagged and not cut, since the cut costs more than 2.0% of the trusted rows after "
        "tuning: cf (4.0%). If one of them is a trigger, its backdoor is still in the model; "
        "--max-cut-cost 1 cuts all flagged tokens."
    ) in done.out
    told = json.loads(run("poisoned.csv", *options, "-f", "json", out=tmp_path / "work").out)
    assert told["vetoed"] == ["cf"]
    kept = told["tokens"][0]
    assert (kept["vetoed"], kept["cost"], kept["cost_tuned"]) == (True, 0.05, 0.04)
    assert "vetoed" not in told["tokens"][1]  # not flagged
    higher = ("--max-cut-cost", "0.05", "-f", "json")
    told = json.loads(run("poisoned.csv", *options, *higher, out=tmp_path / "work").out)
    assert told["vetoed"] == []
    assert told["tokens"][0]["vetoed"] is False
    # A scan without an export cuts nothing, and says nothing about it.
    told = json.loads(run("poisoned.csv", "-f", "json", out=tmp_path / "work").out)
    assert "vetoed" not in told
    assert "vetoed" not in told["tokens"][0]


def test_the_least_rows_are_no_promise(run: Callable[..., Any]) -> None:
    said = run("poisoned.csv").err
    assert "A token in fewer rows of a class than this cannot be flagged" in said
    assert "In more rows it can be, without a promise." in said
    assert "To be found" not in said


@pytest.mark.slow
def test_two_scans_of_the_same_rows_at_once_both_end_well(
    data: Path, tmp_path: Path, victim_folder: Callable[[str], Path]
) -> None:
    command = [
        *(sys.executable, "-m", "orchestrator.cli", "scan", data / "poisoned.csv"),
        *("--clean", data / "clean.csv", "--text", "review", "--label", "verdict"),
        *("--victim", victim_folder("bert"), "--max-length", "64", "--cpus", "1"),
        *("--out", tmp_path / "work"),
    ]
    both = [
        subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in both]
    assert [code for *_, code in ended] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert len(pd.read_csv(tmp_path / "work" / "suspicious_rows.csv")) == PLANTED
    # Nothing half-written is left.
    left = [path.name for path in (tmp_path / "work").rglob(".*")]
    assert left == []
