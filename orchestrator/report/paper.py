"""A sweep's results for a paper: LaTeX tables, figures, CSV and a paragraph on the methods.

::

    main.tex        everything as one document: pdflatex main.tex
    methods.tex     the paragraph, from the resolved config, versions and hardware
    tables/*.tex    floats to \\input; they need booktabs, graphicx and longtable
    figures/*.pdf
    cells.csv       a row per cell: every metric with all digits, cell key and run id
    means.csv       a row per row of the tables: means, intervals, what is bold, keys and run ids
    README.txt      how to read the files and make them again

The same results give the same files of text, byte for byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from btu.attacks.poisoning import ATTACKS, GIVEN, PoisonSpec
from btu.defenses.base import DEFENSES
from btu.errors import UserError
from btu.metrics import GROUPS, METRICS
from btu.printing import csv_text
from orchestrator.report import latex
from orchestrator.report.marks import GUARDS, joined, marks
from orchestrator.report.statistics import ties_with_best
from orchestrator.report.table import (
    CONFIG_COLUMNS,
    MARKS,
    METRIC_COLUMNS,
    PLAIN,
    RECIPE,
    coordinates,
    in_order,
    mean_over_seeds,
    metric_columns,
    reading,
)
from orchestrator.sweep.sections import CONTROL
from orchestrator.sweep.tree import flatten

if TYPE_CHECKING:
    from orchestrator.results.source import Source

# The columns in which competing rows may differ: the defense and its settings. The recipe is one of
# them: it is the version of all stages of a cell, the defense's included.
OF_THE_DEFENSE = (
    *(name for name, key in CONFIG_COLUMNS.items() if key.startswith("defense.")),
    CONTROL,
    RECIPE,
)
# A row with one of these marks does not compete for the best value: its numbers mislead.
OUT_OF_COMPETITION = ("attack failed", "cacc collapse")
# The groups of metrics in the first table; the second table has all others.
SCORES = ("undefended", "clean-tuned", "defended")


def _metrics_of(group: str) -> tuple[str, ...]:
    """Return the metrics of a group. Among scores, those for which lower is better come first."""
    found = [name for name, entry in METRICS.items() if entry.group == group]
    if group in SCORES:
        found.sort(key=lambda name: METRICS[name].higher_is_better is not False)
    return tuple(found)


EFFECT = {group: _metrics_of(group) for group in SCORES}
# Metrics that not every table has are shown if `metric_columns` has them.
DETECTION = {group: _metrics_of(group) for group in GROUPS if group not in SCORES}
# Metrics whose best value is bold. Seconds are not among them: they depend on the hardware too.
COMPETED = tuple(
    name
    for part in (*EFFECT.values(), *DETECTION.values())
    for name in part
    if METRICS[name].always
    and METRICS[name].fraction
    and METRICS[name].higher_is_better is not None
)
_CAPTIONS = {
    "flagged rows": "Flagged rows: against the poisoned training rows.",
    "target": "Target: cells in which the defense names the target class.",
    "screening": "Screening: clean rows rejected (FRR), triggered rows accepted (FAR), and "
    "triggered rows that are left without the trigger (removed).",
    "poisoned rows": "Poisoned rows: what the attack did to the training texts that it poisoned, "
    "compared with their originals: median rise in perplexity, share of words edited, similarity "
    "of sentence embeddings, share of labels flipped.",
}
# Defenses that end with the same clean tuning as the control. Others tune differently, or not.
TUNED_ALIKE = ("btu", "fine_mixing", "random_cut", "frequency_cut")
FOOTNOTE = "n/a"
_NAMES = {"poison_rate": r"rate (\%)", "seeds": "seeds", MARKS: "marks"}


def write_pack(source: Source, folder: Path) -> list[Path]:
    """Write the pack of a sweep, and return its files. It replaces files with these names.

    Raises:
        UserError: no cell is finished; the folder cannot be written.
    """
    from orchestrator.report.charts import charts
    from orchestrator.report.figures import write_figures
    from orchestrator.results.source import Snapshot, records_or_refuse

    source = Snapshot(source)
    records = records_or_refuse(source)
    cells = paper_cells(records)
    means = mean_table(cells)
    texts = {
        "cells.csv": csv_text(cells),
        "means.csv": csv_text(means),
        "tables/effect.tex": effect_table(means),
        "tables/detection.tex": detection_table(means),
        "tables/settings.tex": settings_table(records),
        "methods.tex": methods(source.name, records),
        "README.txt": _readme(source.name),
    }
    # Only titles and descriptions are needed, so the tokens are not read.
    captions = {
        chart.name: f"{chart.title}. {chart.about}" for chart in charts(records, lambda _: None)
    }
    try:
        for name in ("tables", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        figures = write_figures(source, folder / "figures", formats=("pdf",))
        texts["main.tex"] = _main(
            source.name,
            {figure.relative_to(folder): captions.get(figure.stem, "") for figure in figures},
        )
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--paper {folder} cannot be written ({error.strerror or error}); name another folder."
        ) from error
    return [*(folder / name for name in texts), *figures]


# Numbers ----------------------------------------------------------------------------------------


def paper_cells(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per cell: coordinates, every metric of any cell, marks, key and run_id."""
    where = coordinates(records)
    names = list(
        dict.fromkeys((*METRIC_COLUMNS, *sorted({m for r in records for m in r["metrics"]})))
    )
    nan = float("nan")
    found = pd.DataFrame(
        [{name: record["metrics"].get(name, nan) for name in names} for record in records],
        columns=names,
    )
    found[MARKS] = [joined(marks(record)) for record in records]
    found["key"] = [record["key"] for record in records]
    found["run_id"] = [record.get("run_id", "") for record in records]
    return in_order(pd.concat([where, found], axis=1), list(where.columns))


def mean_table(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row per group of seeds, with more columns than `mean_over_seeds`.

    The further columns: ``<metric>_n``, at how many seeds it is defined; ``<metric>_bold`` for the
    metrics in `COMPETED`: ``best``, ``tie`` or empty; keys and run_ids, separated by spaces.
    """
    where = _settings_columns(cells)
    metrics = metric_columns(cells)
    table = mean_over_seeds(cells[[*where, "seed", *metrics, MARKS]])
    groups = [group for _, group in cells.groupby(where, sort=False, dropna=False)]
    further: dict[str, list[Any]] = {
        f"{name}_n": [int(group[name].notna().sum()) for group in groups] for name in metrics
    }
    further |= {f"{name}_bold": _bold(table, groups, name) for name in COMPETED}
    for name, column in (("keys", "key"), ("run_ids", "run_id")):
        further[name] = [" ".join(filter(None, group[column])) for group in groups]
    return pd.concat([table, pd.DataFrame(further)], axis=1)


def _settings_columns(cells: pd.DataFrame) -> list[str]:
    """Return the columns with settings: those before the seed."""
    return list(cells.columns[: list(cells.columns).index("seed")])


def _blocks(table: pd.DataFrame) -> list[int]:
    """Return a number per row; rows with equal numbers compete: only their defenses differ."""
    where = list(table.columns[: list(table.columns).index("seeds")])
    block = [c for c in where if c not in OF_THE_DEFENSE and not c.startswith("defense.")]
    return [int(n) for n in table.groupby(block, sort=False, dropna=False).ngroup()]


def _bold(table: pd.DataFrame, groups: Sequence[pd.DataFrame], name: str) -> list[str]:
    """Return for each row whether its mean is the ``best`` of its block, a ``tie`` or neither."""
    higher = METRICS[name].higher_is_better
    assert higher is not None
    found = [""] * len(table)
    blocks: dict[int, list[int]] = {}
    for row, (block, cells) in enumerate(
        zip(_blocks(table), table.to_dict("records"), strict=True)
    ):
        if _competes(cells) and not pd.isna(cells[name]):
            blocks.setdefault(block, []).append(row)
    for rows in blocks.values():
        if len(rows) > 1:
            best, tied = ties_with_best(
                {r: dict(zip(groups[r]["seed"], groups[r][name], strict=True)) for r in rows},
                higher,
            )
            for row in tied:
                found[row] = "best" if row == best else "tie"
    return found


def _competes(row: Mapping[Any, Any]) -> bool:
    marked = any(f"{name} " in row[MARKS] for name in OUT_OF_COMPETITION)
    return row["defense"] != "none" and row["poison_rate"] != 0 and not marked


# Tables -----------------------------------------------------------------------------------------


def effect_table(means: pd.DataFrame) -> str:
    """Return the table of the scores of the three models, in LaTeX."""
    what = "Attack success rate (ASR), false trigger rate (FTR) and clean accuracy (CACC) of the "
    what += "poisoned model, of the same model after clean tuning alone, and of the defended one."
    return _results("effect", what, _shown(EFFECT, means), means)


def detection_table(means: pd.DataFrame) -> str:
    """Return the table of the defense's detection and a cell's cost, in LaTeX."""
    what = "Flagged tokens against the tokens of the trigger, and wall time of a cell in seconds, "
    what += "with the stages that it shares with others"
    what += " (defense: its own stages)." if "seconds_defense" in means else "."
    groups = _shown(DETECTION, means)
    what = " ".join((what, *(text for title, text in _CAPTIONS.items() if title in groups)))
    return _results("detection", what, groups, means)


def _shown(groups: Mapping[str, Sequence[str]], means: pd.DataFrame) -> dict[str, Sequence[str]]:
    """Return the groups with the metrics that `mean_table` has, without empty groups."""
    found = {title: [name for name in part if name in means] for title, part in groups.items()}
    return {title: part for title, part in found.items() if part}


def _results(name: str, what: str, groups: Mapping[str, Sequence[str]], means: pd.DataFrame) -> str:
    metrics = [metric for part in groups.values() for metric in part]
    seeds = sorted(set(means["seeds"]))
    # The rate or the defense identifies a control.
    where = [c for c in means.columns[: list(means.columns).index("seeds")] if c != CONTROL]
    shown = [c for c in where if c in ("attack", "poison_rate") or _differs(means[c])]
    shown += ["seeds"] * (len(seeds) > 1)
    marked = bool((means[MARKS] != "").any())
    rows, last = [], None
    for block, row in zip(_blocks(means), means.to_dict("records"), strict=True):
        at = [_coordinate(c, row[c]) for c in shown]
        numbers = [_number(metric, row) for metric in metrics]
        found = [_letters(row[MARKS])] if marked else []
        comment = f"cells {row['keys']}; runs {row['run_ids'] or 'none in MLflow'}"
        rows.append(latex.Row([*at, *numbers, *found], comment, last not in (None, block)))
        last = block
    lead = len(shown)
    spans, rules, column = [" & " * (lead - 1)], [], lead + 1
    for title, part in groups.items():
        spans.append(rf"\multicolumn{{{len(part)}}}{{c}}{{{title}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + len(part) - 1}}}")
        column += len(part)
    names = [_NAMES.get(c, latex.escaped(c.removeprefix("defense."))) for c in shown]
    names += [METRICS[metric].head for metric in metrics] + ["marks"] * marked
    head = [
        " & ".join(spans) + " &" * marked + r" \\",
        "".join(rules),
        " & ".join(names) + r" \\",
    ]
    numeric = [c for c in shown if pd.api.types.is_numeric_dtype(means[c])]
    columns = "".join("r" if c in numeric else "l" for c in shown) + "r" * len(metrics)
    fixed = [c for c in where if c not in shown and means[c].notna().any()]
    caption = " ".join(
        filter(None, (what, _units(metrics), _fixed(means, fixed), _over(seeds),
                      _bolding(means, metrics, seeds)))
    )  # fmt: skip
    notes = _notes(means, metrics) if not marked else [*_notes(means, metrics), _legend(means)]
    return latex.table(f"tab:{name}", columns + "l" * marked, head, rows, caption, notes)


def _differs(column: pd.Series[Any]) -> bool:
    return len({str(v) for v in column}) > 1


def _coordinate(name: str, given: Any) -> str:
    if given is None or given != given or given == "":
        return "--"
    if name == "poison_rate":
        return f"{given * 100:g}"
    return latex.value(given)


def _number(metric: str, row: Mapping[Any, Any]) -> str:
    if pd.isna(row[metric]):
        return FOOTNOTE
    text, half = reading(metric, row[metric]), row[f"{metric}_ci"]
    if row.get(f"{metric}_bold"):
        text = rf"\textbf{{{text}}}"
    return text if pd.isna(half) else rf"{text} $\pm$ {reading(metric, half, half=True)}"


def _letters(marked: str) -> str:
    """Return a row's marks as letters with their share of seeds: ``a 2/3``."""
    letters = dict(zip(GUARDS, "abcdefgh", strict=False))
    found = []
    for one in filter(None, marked.split("; ")):
        name, _, share = one.rpartition(" ")
        found.append(f"{letters[name]} {share}")
    return ", ".join(found)


def _legend(means: pd.DataFrame) -> str:
    said = "; ".join(means[MARKS])
    lines = [
        f"{letter}: {latex.escaped(name)} ({latex.escaped(rule)}): {latex.escaped(follows)}"
        for letter, (name, (rule, follows)) in zip("abcdefgh", GUARDS.items(), strict=False)
        if f"{name} " in said
    ]
    return f"Marks, with the share of seeds that have them: {'; '.join(lines)}."


def _notes(means: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    undefined = [name for name in metrics if means[name].isna().any()]
    if not undefined:
        return []
    names = latex.listed(list(dict.fromkeys(METRICS[name].head for name in undefined)))
    return [
        f"{FOOTNOTE}: {names} undefined: the attack has no fixed trigger tokens, there is nothing "
        "to find, nothing was flagged or poisoned, or no defense of the kind that has it."
    ]


def _units(metrics: Iterable[str]) -> str:
    rates = any(name not in PLAIN for name in metrics)
    return r"Rates and accuracies in \%." if rates else ""


def _fixed(means: pd.DataFrame, names: Sequence[str]) -> str:
    said = [f"{latex.escaped(c)} {_coordinate(c, means[c].dropna().iloc[0])}" for c in names]
    return f"Throughout: {', '.join(said)}." if said else ""


def _over(seeds: Sequence[int]) -> str:
    if list(seeds) == [1]:
        return "One seed: no interval."
    counts = latex.listed([str(n) for n in seeds])
    one = " A single seed has no interval." if 1 in seeds else ""
    return rf"Mean $\pm$ half of the 95\,\% Student's $t$ interval over {counts} seeds.{one}"


def _bolding(means: pd.DataFrame, metrics: Sequence[str], seeds: Sequence[int]) -> str:
    if not any((means[f"{name}_bold"] != "").any() for name in metrics if name in COMPETED):
        return ""
    tie = (
        "what equals it" if list(seeds) == [1] else
        r"what a paired $t$ test over seeds does not distinguish from it ($p \geq 0.05$)"
    )  # fmt: skip
    return (
        f"Bold: the best among rows that differ in the defense alone, and {tie}. Rows without a "
        "defense or poison, or with a failed attack or collapsed CACC, do not compete."
    )


def settings_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of every setting of the resolved configs with all its values, in LaTeX."""
    rows = []
    for key, values in _values(records).items():
        shown = latex.listed([latex.value(v) for v in values])
        rows.append(latex.Row([rf"\texttt{{{latex.escaped(key)}}}", shown], ""))
    caption = "Every setting, with all values that it takes."
    # The second column has a fixed width, so that long values break.
    head = [r"setting & values \\"]
    return latex.table("tab:settings", r"lp{0.6\linewidth}", head, rows, caption)


def _values(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return all values of each setting, sorted, without paths and resources."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for key, given in flatten(record["config"]).items():
            if key != "data.path" and not key.startswith("resources."):
                found.setdefault(key, {})[repr(given)] = given
    return {key: _sorted(list(values.values())) for key, values in found.items()}


def _sorted(values: list[Any]) -> list[Any]:
    numbers = all(isinstance(v, int | float) for v in values)
    return sorted(values) if numbers else values


# Methods ----------------------------------------------------------------------------------------


def methods(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a paragraph on how the results were made, in LaTeX, from configs and tags only.

    Facts that the records lack are left out, except for versions and hardware: the paragraph states
    that these were not recorded.
    """
    values = _values(records)
    sentences = [
        f"All numbers are of the sweep \\texttt{{{latex.escaped(name)}}}: {len(records)} cells, "
        f"seeds {_all(values, 'seed')}.",
        *_data(records, values),
        *_attacks(records, values),
        *_training(values),
        *_defenses(records, values),
        "ASR is the share of triggered evaluation rows of other classes that are predicted as the "
        "target, FTR the same of these rows without the trigger, CACC the accuracy on the clean "
        "evaluation rows; no row of them was trained or tuned on.",
        *_provenance(records),
    ]
    return "\n".join(sentences) + "\n"


def _all(
    values: Mapping[str, Sequence[Any]], key: str, show: Callable[[Any], str] = latex.value
) -> str:
    return latex.listed([show(v) for v in values.get(key, ())])


def _tag(records: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """Return all values of a tag. A cell has several if its stages differ in it."""
    found: dict[str, None] = {}
    for record in records:
        for one in filter(None, str((record.get("tags") or {}).get(name, "")).split(", ")):
            found[one] = None
    return sorted(found)


def _tagged(records: Iterable[Mapping[str, Any]], name: str) -> str:
    return latex.listed([rf"\texttt{{{latex.escaped(one)}}}" for one in _tag(records, name)])


def _data(records: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Any]]) -> list[str]:
    said = []
    for data in values.get("data.name", ()):
        own = [r for r in records if r["config"].get("data", {}).get("name") == data]
        sizes = {}
        for role in ("train", "clean", "eval"):
            counts = sorted(
                {
                    int(n)
                    for r in own
                    if (n := (r.get("notes") or {}).get(f"rows_{role}")) is not None
                }
            )
            sizes[role] = latex.listed([str(n) for n in counts])
        rows = (
            f" with {sizes['train']} training rows, {sizes['clean']} clean rows that are reserved "
            f"for the defender and {sizes['eval']} evaluation rows"
            if all(sizes.values())
            else ""
        )
        revision = _tagged(own, "data")
        said.append(
            f"Data: {latex.escaped(data)}{rows}{f' (revision {revision})' if revision else ''}."
        )
    if values.get("victim.name"):
        length = _all(values, "victim.max_length")
        cut = f", inputs of at most {length} tokens" if length else ""
        weights = latex.listed(
            [rf"\texttt{{{latex.escaped(w[:12])}}}" for w in _tag(records, "victim")]
        )
        of = f" (weights {weights})" if weights else ""
        said.append(f"Victim: {_all(values, 'victim.name')}{cut}{of}.")
    return said


def _attacks(
    records: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Any]]
) -> list[str]:
    shared = {f"attack.{field.name}" for field in dataclasses.fields(PoisonSpec)} | {"attack.name"}
    parts = [
        _part(records, "attack", name, shared, ATTACKS[name].summary if name in ATTACKS else "")
        for name in values.get("attack.name", ())
    ]
    said = [f"Attacks: {'; '.join(parts)}."] if parts else []
    rates = list(values.get("attack.poison_rate", ()))
    shares = [f"{rate * 100:g}" for rate in rates if rate != GIVEN]
    poisoned = [rf"{latex.listed(shares)}\,\% of the training rows"] if shares else []
    poisoned += ["the rows of a published set"] if GIVEN in rates else []
    if poisoned:
        mode, target = _all(values, "attack.label_mode"), _all(values, "attack.target_label")
        how = f"; labels: {mode}" if mode else ""
        how += f"; target class: {target}" if target else ""
        said.append(f"Poisoned: {' or '.join(poisoned)}{how}.")
    return said


def _training(values: Mapping[str, Sequence[Any]]) -> list[str]:
    said = []
    if "train.epochs" in values:
        details = [
            ("peak learning rate", "learning_rate"), ("batches of", "batch_size"),
            ("precision", "precision"), ("schedule", "schedule"),
            ("warm-up fraction", "warmup_fraction"), ("weight decay", "weight_decay"),
            ("gradient norm at most", "max_grad_norm"),
        ]  # fmt: skip
        more = [
            f"{lead} {_all(values, f'train.{key}')}"
            for lead, key in details
            if f"train.{key}" in values
        ]
        how = f" ({', '.join(more)})" if more else ""
        said.append(
            f"The victim is fine-tuned on the poisoned set for {_all(values, 'train.epochs')} "
            f"epochs with AdamW{how}."
        )
    if "tuning.epochs" in values:
        defenses = [d for d in values.get("defense.name", ()) if d not in ("none", "clean_tuning")]
        alike = [name for name in defenses if name in TUNED_ALIKE]
        if not alike:
            who = "The clean-tuned control gets clean tuning"
        elif alike == defenses:
            who = "The defended model and the clean-tuned control get the same clean tuning"
        else:
            named = latex.listed([latex.escaped(name) for name in alike])
            who = f"The models of {named} and the clean-tuned control get the same clean tuning"
        said.append(
            f"{who} on the reserved rows: {_all(values, 'tuning.epochs')} epochs at "
            f"{_all(values, 'tuning.learning_rate')}."
        )
    return said


def _defenses(
    records: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Any]]
) -> list[str]:
    parts = [
        _part(
            records, "defense", name, {"defense.name"},
            DEFENSES[name].summary if name in DEFENSES else "",
        )
        for name in values.get("defense.name", ())
    ]  # fmt: skip
    return [f"Defenses: {'; '.join(parts)}."] if parts else []


def _part(
    records: Sequence[Mapping[str, Any]], section: str, name: str, but: Iterable[str], summary: str
) -> str:
    """Return an attack or a defense with its summary and its own settings.

    records: all cells.
    section: attack or defense.
    name: the name of the attack or defense.
    but: settings that are left out.
    summary: what it is; may be empty.
    """
    own = [r for r in records if r["config"][section]["name"] == name]
    settings = {
        key: shown
        for key, shown in _values(own).items()
        if key.startswith(f"{section}.") and key not in but and shown != [None]
    }
    said = [latex.escaped(summary)] if summary else []
    said += [
        f"{latex.escaped(key.removeprefix(f'{section}.'))} "
        f"{latex.listed([latex.value(v) for v in given])}"
        for key, given in settings.items()
    ]
    return latex.escaped(name) + (f" ({', '.join(said)})" if said else "")


def _provenance(records: Sequence[Mapping[str, Any]]) -> list[str]:
    versions = [
        f"{lead} {found}"
        for lead, tag in (
            ("btu", "code"), ("Python", "python"), ("PyTorch", "torch"),
            ("Transformers", "transformers"),
        )
        if (found := _tagged(records, tag))
    ]  # fmt: skip
    devices, threads = _tag(records, "device"), _tag(records, "threads")
    said = []
    said.append(
        f"Software: {', '.join(versions)}." if versions else "Software versions were not recorded."
    )
    if devices:
        named = latex.listed([latex.escaped("CPU" if d == "cpu" else d) for d in devices])
        many = "" if threads == ["1"] else "s"
        of = f", {latex.listed(threads)} thread{many} a stage" if threads else ""
        precision = _tagged(records, "precision")
        said.append(f"Hardware: {named}{of}{f', computed in {precision}' if precision else ''}.")
    else:
        said.append("Hardware was not recorded.")
    return said


# The document ------------------------------------------------------------------------------------


def _main(name: str, figures: Mapping[Path, str]) -> str:
    """Return the main document.

    name: the sweep's name.
    figures: path from the document -> caption; empty for the continuation of a figure.
    """
    drawn = "\n".join(
        "\\begin{figure}[htbp]\n\\centering\n"
        "\\includegraphics[width=\\linewidth,height=0.85\\textheight,keepaspectratio]"
        f"{{{figure.as_posix()}}}\n"
        f"\\caption{{{latex.escaped(about or 'Continued.')}}}\\label{{fig:{figure.stem}}}\n"
        "\\end{figure}"
        for figure, about in figures.items()
    )
    return f"""\\documentclass{{article}}
\\usepackage[utf8]{{inputenc}}
\\usepackage[margin=2cm]{{geometry}}
\\usepackage{{booktabs,graphicx,longtable}}
\\begin{{document}}
\\section*{{Sweep {latex.escaped(name)}}}
\\input{{methods}}
\\input{{tables/effect}}
\\input{{tables/detection}}
{drawn}
\\clearpage
\\input{{tables/settings}}
\\end{{document}}
"""


def _readme(name: str) -> str:
    return f"""Results of sweep {name}, for a paper. Made by: btu report {name} --paper DIR

main.tex            all of it: pdflatex main.tex, twice
methods.tex         how the numbers were obtained, from the resolved config
tables/effect.tex   ASR, FTR and CACC; tables/detection.tex: what was flagged, and time
tables/settings.tex every setting with its values
figures/            as PDF
cells.csv           a row per cell: every metric in full, fractions, with cell key and run_id
means.csv           a row per table row: mean, 95 % half width (_ci), seeds (_n), what is bold

Tables round once, to one decimal of a percent, from the values in means.csv. In the .tex files a
comment after each row names its cells and MLflow runs; means.csv has them as keys and run_ids.
In your own document: \\usepackage{{booktabs,graphicx,longtable}}, then \\input{{tables/effect}}.
"""
