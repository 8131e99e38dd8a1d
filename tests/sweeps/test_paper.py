"""The paper of a sweep: numbers, what is bold, where it is from; and it compiles."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from formula_sweep import shelve_sweep
from parsed_page import Read

from btu.errors import UserError
from orchestrator.cli.shared import open_source
from orchestrator.report import latex
from orchestrator.report.html import page
from orchestrator.report.paper import (
    detection_table,
    effect_table,
    mean_table,
    methods,
    paper_cells,
    settings_table,
    write_pack,
)
from orchestrator.report.table import mean_over_seeds, readable, results_table
from orchestrator.results.source import StoreSource

if TYPE_CHECKING:
    from conftest import Ran

NAN = float("nan")
LATIN = "".join(map(chr, range(0xA0, 0x180)))


def record(key: str, threshold: float = 4.5, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return a finished cell; more: attack, rate, defense, tags and metrics."""
    defense = more.pop("defense", "btu")
    return {
        "key": key,
        "run_id": f"run-{key}",
        "config": {
            "attack": {"name": more.pop("attack", "badnets"), "poison_rate": more.pop("rate", 0.1)},
            "defense": {"name": defense, **({"threshold": threshold} if defense == "btu" else {})},
            "seed": seed,
        },
        "varied": {},
        "tags": more.pop("tags", {}),
        "notes": {},
        "metrics": {
            "undefended_asr": 1.0, "undefended_ftr": 0.1, "undefended_cacc": 0.9,
            "tuned_asr": 1.0, "tuned_cacc": 0.9, "asr": 0.1, "ftr": 0.1, "cacc": 0.9,
            "detection_precision": 1.0, "detection_recall": 0.5, "flagged": 3.0, "seconds": 12.0,
            **more,
        },
    }  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a table's rows."""
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    lines = [line for line in body.splitlines() if " & " in line]
    return [[cell.strip() for cell in line.split("\\\\ %")[0].split(" & ")] for line in lines]


def over_seeds(key: str, values: Iterable[float], name: str = "asr", **more: Any) -> list[Any]:
    return [
        record(f"{key}{seed}", seed=seed, **{name: value}, **more)
        for seed, value in enumerate(values)
    ]


def bold(records: list[Any], name: str = "asr") -> list[str]:
    return list(mean_table(paper_cells(records))[f"{name}_bold"])


# Escaping ---------------------------------------------------------------------------------------


def test_any_text_is_escaped() -> None:
    assert latex.escaped(r"50% of a_b & {c} #1 $5 ~ ^ \ ") == (
        r"50\% of a\_b \& \{c\} \#1 \$5 \textasciitilde{} \textasciicircum{} \textbackslash{} "
    )
    assert latex.escaped("a\n<b>|--''") == "a \\textless{}b\\textgreater{}\\textbar{}-{}-'{}'"
    assert latex.escaped("café 中") == "café [U+4E2D]"
    assert latex.escaped("\N{DAGGER} marks ±") == r"\dag{} marks $\pm$"
    # Latin too, but not in the fonts that every document has.
    assert latex.escaped("łąč «ð»") == "ł[U+0105]č [U+00AB][U+00F0][U+00BB]"


def test_settings_are_readable() -> None:
    assert latex.value(2e-05) == r"$2 \cdot 10^{-5}$"
    assert latex.value(1e-07) == "$10^{-7}$"
    assert latex.value(0.0001) == "0.0001"
    assert latex.value(True) == "yes"
    assert latex.value(None) == "none"
    assert latex.value(["c_f", 1]) == r"c\_f, 1"
    assert latex.value({"slot": 3}) == "slot 3"
    assert latex.listed(["a", "b", "c"]) == "a, b and c"


# Bold -------------------------------------------------------------------------------------------


def test_the_best_of_a_block_is_bold_and_what_no_test_tells_from_it() -> None:
    # Against the first: plus 0.01, 0.03, -0.02 is a tie; plus 0.3 with hardly any spread is not.
    records = [
        *over_seeds("a", (0.10, 0.12, 0.11), threshold=2.0),
        *over_seeds("b", (0.11, 0.15, 0.09), threshold=3.0),
        *over_seeds("c", (0.40, 0.42, 0.412), threshold=4.0),
    ]
    assert bold(records) == ["best", "tie", ""]
    for one in records:
        one["metrics"] |= {"cacc": one["metrics"]["asr"], "tuned_cacc": NAN}  # nothing collapsed
    assert bold(records, "cacc") == ["", "", "best"]


def test_rates_and_attacks_do_not_compete() -> None:
    records = [
        record("a", 2.0, asr=0.3), record("b", 3.0, asr=0.2),
        record("c", 2.0, asr=0.1, rate=0.05), record("d", 2.0, asr=0.1, attack="addsent"),
    ]  # fmt: skip
    # In the order of the table: addsent, badnets at 0.05, at 0.1 with both thresholds.
    assert bold(records) == ["", "", "", "best"]


def test_defenses_compete_whatever_versions_of_their_stages() -> None:
    # btu was computed again; the recipe differs by defense as well.
    records = [
        record("a", asr=0.3, tags={"recipe": "1a"}), record("b", asr=0.2, tags={"recipe": "2b"}),
        record("c", asr=0.1, defense="onion", tags={"recipe": "3c"}),
    ]  # fmt: skip
    means = mean_table(paper_cells(records))
    assert list(means["revision.recipe"]) == ["1a", "2b", "3c"]
    assert list(means["asr_bold"]) == ["", "", "best"]
    # One block: no gap between its rows.
    assert "addlinespace" not in effect_table(means)


def test_without_a_test_only_equals_tie() -> None:
    records = [record("a", 2.0, asr=0.1), record("b", 3.0, asr=0.1), record("c", 4.0, asr=0.1001)]
    assert bold(records) == ["best", "tie", ""]


def test_what_misleads_or_is_no_defense_does_not_compete() -> None:
    low = record("a", 2.0, asr=0.01, cacc=0.5)  # 0.4 below the clean-tuned 0.9
    assert bold([low, record("b", 3.0, asr=0.2), record("c", 4.0, asr=0.3)]) == ["", "best", ""]
    weak = [record("a", 2.0, undefended_asr=0.2), record("b", 3.0, undefended_asr=0.2)]
    assert bold(weak) == ["", ""]
    clean = [record("a", 2.0, rate=0.0), record("b", 3.0, rate=0.0)]
    assert bold(clean) == ["", ""]
    nothing = record("c", defense="none", asr=0.05)
    assert bold([record("a", 2.0, asr=0.1), record("b", 3.0, asr=0.2), nothing]) == ["best", "", ""]


def test_undefined_values_neither_win_nor_lose() -> None:
    records = [
        record("a", 2.0, detection_precision=NAN), record("b", 3.0, detection_precision=0.5),
        record("c", 4.0, detection_precision=0.7),
    ]  # fmt: skip
    assert bold(records, "detection_precision") == ["", "", "best"]


# Tables -----------------------------------------------------------------------------------------


def test_rows_say_where_their_numbers_are_from() -> None:
    text = effect_table(mean_table(paper_cells(over_seeds("k", (0.1, 0.2)))))
    assert "\\\\ % cells k0 k1; runs run-k0 run-k1\n" in text


def test_one_seed_has_no_interval_and_says_so() -> None:
    text = effect_table(mean_table(paper_cells([record("a", asr=0.12345)])))
    assert "One seed: no interval." in text
    (row,) = rows_of(text)
    assert "12.3" in row
    assert "pm" not in "".join(row)


def test_several_seeds_have_their_interval() -> None:
    # 0.1, 0.2, 0.6: mean 0.3 with 0.6572410, derived in test_report.py.
    text = effect_table(mean_table(paper_cells(over_seeds("a", (0.1, 0.2, 0.6)))))
    assert "interval over 3 seeds." in text
    assert r"30.0 $\pm$ 65.7" in rows_of(text)[0]


def test_undefined_is_told_in_a_footnote() -> None:
    records = [record("a", detection_precision=NAN)]
    text = detection_table(mean_table(paper_cells(records)))
    assert "n/a" in rows_of(text)[0]
    assert "n/a: precision undefined: the attack has no fixed trigger tokens" in text
    assert "n/a" not in effect_table(mean_table(paper_cells(records)))


def test_other_kinds_of_defenses_have_their_own_columns() -> None:
    nothing = {"detection_precision": NAN, "detection_recall": NAN, "flagged": NAN}
    screens = {"frr": 0.05, "far": 0.25, "seconds_defense": 3.0}
    records = [
        record("a"),
        record("b", defense="cube", sample_precision=0.75, sample_recall=0.5, **nothing),
        record("c", defense="strip", **screens, **nothing),
    ]
    means = mean_table(paper_cells(records))
    assert list(means["frr_n"]) == [0, 0, 1]
    text = detection_table(means)
    # Badnets, rate and defense lead; precision, recall and number of tokens, precision and recall
    # of rows, FRR, FAR, seconds of the defense and of the cell follow.
    assert [row[3:] for row in rows_of(text)] == [
        ["100.0", "50.0", "3", "n/a", "n/a", "n/a", "n/a", "n/a", "12.0"],
        ["n/a", "n/a", "n/a", "75.0", "50.0", "n/a", "n/a", "n/a", "12.0"],
        ["n/a", "n/a", "n/a", "n/a", "n/a", "5.0", "25.0", "3.0", "12.0"],
    ]
    assert r"\multicolumn{2}{c}{screening}" in text
    assert "rejected (FRR)" in text
    assert "target class" not in text
    # btu alone has none of them.
    assert "screening" not in detection_table(mean_table(paper_cells(records[:1])))


def test_marks_come_along_with_their_meaning() -> None:
    records = over_seeds("a", (0.1, 0.2), undefended_asr=0.2)
    records[1]["metrics"]["undefended_asr"] = 0.9
    text = effect_table(mean_table(paper_cells(records)))
    assert rows_of(text)[0][-1] == "a 1/2"
    assert "a: attack failed (undefended ASR under 0.5" in text


def test_what_does_not_vary_stands_in_the_caption() -> None:
    records = [record("a", 2.0), record("b", 2.0, rate=0.05)]
    for one in records:
        one["config"]["defense"]["alpha"] = 0.0005
    text = effect_table(mean_table(paper_cells(records)))
    assert "Throughout: defense btu, alpha 0.0005." in text
    assert "alpha &" not in text
    assert [row[:2] for row in rows_of(text)] == [["badnets", "5"], ["badnets", "10"]]


def test_long_tables_break_over_pages() -> None:
    records = [record(f"k{n}", float(n)) for n in range(latex.PAGE_ROWS + 1)]
    assert r"\begin{longtable}" in effect_table(mean_table(paper_cells(records)))
    assert r"\begin{tabular}" in effect_table(mean_table(paper_cells(records[1:])))


# The same numbers everywhere --------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StoreSource:
    """A finished sweep of two attacks at one rate, two thresholds and none, and three seeds."""
    runs = tmp_path_factory.mktemp("runs")
    return StoreSource(
        shelve_sweep(runs, rates=(0.1,), thresholds=(2.0, 4.5), seeds=(0, 1, 2), tokens=80)
    )


@pytest.fixture(scope="module")
def pack(source: StoreSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "pack"
    write_pack(source, folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_csv_holds_every_metric_of_every_cell_to_the_last_digit(
    source: StoreSource, pack: Path
) -> None:
    rows = {row["key"]: row for row in read(pack / "cells.csv")}
    records = source.records()
    assert len(rows) == len(records)
    for one in records:
        row = rows[one["key"]]
        assert row["run_id"] == one["run_id"]
        for name, value in one["metrics"].items():
            # A float's shortest text reads back as the same float; undefined is empty.
            assert (row[name] == "") if value != value else (float(row[name]) == value), name


def test_latex_markdown_and_csv_agree_to_the_last_digit(source: StoreSource, pack: Path) -> None:
    means = mean_over_seeds(results_table(source.records()))
    saved = read(pack / "means.csv")
    shown = readable(means)
    rows = rows_of((pack / "tables" / "effect.tex").read_text())
    assert len(rows) == len(saved) == len(means)
    in_latex = [
        "undefended_asr",
        "undefended_cacc",
        "tuned_asr",
        "tuned_cacc",
        "asr",
        "ftr",
        "cacc",
    ]
    for number, cells in enumerate(rows):
        for name in in_latex:
            assert float(saved[number][name]) == means[name][number]
            assert float(saved[number][f"{name}_ci"]) == means[f"{name}_ci"][number]
        plain = [re.sub(r"\\textbf\{(.*?)\}", r"\1", c).replace("$\\pm$", "±") for c in cells]
        last = plain[-8:-1] if cells[-1] == "" or "/" in cells[-1] else plain[-7:]
        assert last == [shown[f"{name} %"][number] for name in in_latex]


def test_bold_in_latex_is_what_the_csv_says(pack: Path) -> None:
    saved = read(pack / "means.csv")
    text = (pack / "tables" / "effect.tex").read_text()
    body = [line for line in text.splitlines() if "% cells" in line]
    names = ("asr_bold", "ftr_bold", "cacc_bold")
    for number, line in enumerate(body):
        assert line.count("textbf") == sum(saved[number][name] != "" for name in names)
        assert saved[number]["keys"] in line


def test_the_same_results_give_the_same_files(
    source: StoreSource, pack: Path, tmp_path: Path
) -> None:
    files = write_pack(source, tmp_path / "again")
    assert {f.relative_to(tmp_path / "again") for f in files} == {
        f.relative_to(pack) for f in pack.rglob("*") if f.is_file()
    }
    for file in files:
        assert file.read_bytes() == (pack / file.relative_to(tmp_path / "again")).read_bytes()


def test_everything_in_a_pack_can_be_printed(pack: Path) -> None:
    texts = {path: path.read_text() for path in pack.rglob("*.tex")}
    assert r"\dag{} follows the mean" in texts[pack / "main.tex"]
    for path, text in texts.items():
        assert "[U+" not in text, path


def test_main_reads_what_is_there(pack: Path) -> None:
    text = (pack / "main.tex").read_text()
    for name in re.findall(r"\\input\{(.*?)\}", text):
        assert (pack / f"{name}.tex").is_file()
    drawn = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text)
    assert {pack / name for name in drawn} == set((pack / "figures").iterdir())
    assert drawn


# Methods ----------------------------------------------------------------------------------------


def test_methods_come_from_config_and_tags(source: StoreSource) -> None:
    text = methods("a_b", source.records())
    for part in (
        r"sweep \texttt{a\_b}: 18 cells, seeds 0, 1 and 2",
        "Data: sst2",
        "Victim: offline, inputs of at most 128 tokens",
        "badnets (inserted trigger words",
        r"Poisoned: 10\,\%",
        "for 3 epochs",
        "threshold 2 and 4.5",
        r"PyTorch \texttt{2.13.0+cpu}",
        "Hardware: CPU, 1 thread a stage, computed in",
    ):
        assert part in text, part


def test_methods_say_what_was_not_recorded() -> None:
    text = methods("x", [record("a")])
    assert "Software versions were not recorded." in text
    assert "Hardware was not recorded." in text
    assert "fine-tuned" not in text


def test_methods_say_who_gets_the_clean_tuning() -> None:
    def said(*defenses: str) -> str:
        records = [record(name, defense=name) for name in defenses]
        for one in records:
            one["config"]["tuning"] = {"epochs": 1, "learning_rate": 0.5}
        return methods("x", records)

    same = "get the same clean tuning on the reserved rows: 1 epochs at 0.5."
    assert f"The defended model and the clean-tuned control {same}" in said("btu", "none")
    # ONION trains nothing; ABL and RNP tune by settings of their own.
    mixed = said("btu", "random_cut", "onion", "rnp")
    assert rf"The models of btu and random\_cut and the clean-tuned control {same}" in mixed
    assert "The clean-tuned control gets clean tuning on the reserved rows: 1" in said("onion")


def test_methods_name_all_versions_of_cells_that_mix_them() -> None:
    records = [record("a", tags={"code": "1+b, 1+a"}), record("b", 3.0, tags={"code": "1+c"})]
    assert r"btu \texttt{1+a}, \texttt{1+b} and \texttt{1+c}" in methods("x", records)


def test_every_setting_is_listed() -> None:
    text = settings_table([record("a", 2.0), record("b", 4.5)])
    assert r"\texttt{defense.threshold} & 2 and 4.5 \\" in text
    assert r"\texttt{attack.poison\_rate} & 0.1 \\" in text


# Command ----------------------------------------------------------------------------------------


def test_the_command_writes_the_pack(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawn in the other tests.
    monkeypatch.setattr("orchestrator.report.figures.write_figures", lambda *_, **__: [])
    shelve_sweep(tmp_path / "runs", thresholds=(4.5,), seeds=(0,), tokens=80)
    folder = tmp_path / "paper"
    done = run_cli("report", "likely", "-o", tmp_path / "runs", "--paper", folder)
    assert done.code == 0, done.err
    assert "README.txt describes them" in done.err
    assert "badnets" in done.out  # the table all the same
    assert (folder / "main.tex").is_file()
    taken = tmp_path / "taken"
    taken.write_text("")
    done = run_cli("report", "likely", "-o", tmp_path / "runs", "--paper", taken / "x")
    assert (done.code, "cannot be written" in done.err) == (2, True)


@pytest.mark.parametrize("options", [("--html", "p.html"), ("--paper", "p")])
def test_a_report_reads_a_sweep_once_for_all_that_it_writes(
    options: tuple[str, str],
    run_cli: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    whole = StoreSource.records

    def counted(self: StoreSource) -> list[dict[str, Any]]:
        reads.append(self.name)
        return whole(self)

    monkeypatch.setattr(StoreSource, "records", counted)
    shelve_sweep(tmp_path / "runs", thresholds=(4.5,), seeds=(0,), tokens=80)
    option, name = options
    done = run_cli("report", "likely", "-o", tmp_path / "runs", option, tmp_path / name)
    assert done.code == 0, done.err
    assert reads == ["likely"]


def test_without_a_finished_cell_there_is_no_pack(source: StoreSource, tmp_path: Path) -> None:
    class Empty(StoreSource):
        def records(self) -> list[dict[str, Any]]:
            return []

    with pytest.raises(UserError, match="no finished cell yet"):
        write_pack(Empty(source._results), tmp_path / "none")


@pytest.mark.slow
def test_numbers_are_those_of_mlflow_to_the_last_digit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from orchestrator.tracking import experiment as experiment_module
    from orchestrator.tracking import server, sync

    server.unanswered.clear()
    server.identities.clear()
    results = shelve_sweep(tmp_path / "runs", rates=(0.1,), thresholds=(4.5,), tokens=80)
    uri = server.default_uri(results.output)
    experiment = experiment_module.experiment(uri, results.name)
    assert sync.sync(uri, experiment, results, lambda key: False).missing == 0
    client = MlflowClient(tracking_uri=uri)
    here, there = open_source("likely", results.output), open_source("likely", "nowhere", uri)
    cells = paper_cells(there.records())
    assert cells.to_csv() == paper_cells(here.records()).to_csv()
    for row in cells.to_dict("records"):
        logged = client.get_run(row["run_id"]).data.metrics
        for name in ("asr", "cacc", "ftr", "flagged", "undefended_asr", "tuned_cacc"):
            # MLflow lacks what a cell without a defense does not have.
            assert row[name] == logged[name] if name in logged else row[name] != row[name]
    # The page, from what MLflow has.
    shown = Read(page(there))
    for row in cells.to_dict("records"):
        for name in ("asr", "cacc", "ftr", "undefended_asr"):
            assert float(shown.value(row["key"], name)) == row[name]
    table = results_table(there.records())
    assert sorted(table["asr"]) == sorted(cells["asr"])
    means = mean_table(cells)
    assert effect_table(means) == effect_table(mean_table(paper_cells(here.records())))
    # The mean of two seeds in the LaTeX, from what MLflow has.
    defended = means[means["defense"] == "btu"].index[0]
    one, other = (
        client.get_run(run).data.metrics["asr"] for run in means["run_ids"][defended].split()
    )
    row = [line for line in effect_table(means).splitlines() if "% cells" in line][defended]
    assert f"{(one + other) / 2 * 100:.1f}" in row


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_pack_compiles(pack: Path, tmp_path: Path) -> None:
    shutil.copytree(pack, tmp_path / "pack")
    # Whatever a value holds, it is text.
    odd = record("a_%", 2.0, attack="x_y & 50% #1 {~^\\} <中>" + LATIN)
    cells = [odd, *(record(f"k{n}", float(n)) for n in range(latex.PAGE_ROWS + 1))]
    tables = tmp_path / "pack" / "tables"
    (tables / "effect.tex").write_text(effect_table(mean_table(paper_cells(cells))))
    (tables / "settings.tex").write_text(settings_table(cells))
    for _ in range(2):
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
            cwd=tmp_path / "pack", capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "pack" / "main.pdf").stat().st_size > 10_000
