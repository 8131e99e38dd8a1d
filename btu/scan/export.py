"""Export the model of a scanned data set: fine-tuned, flagged tokens cut, with a model card."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btu.defenses.kit.contradiction import KEEP, LEAST_CLEAN, RELABEL
from btu.errors import UserError
from btu.findings import Suspects
from btu.paths import check_folder, not_written
from btu.scan.plan import ScanPlan
from btu.scan.report import ScanReport, renamed, score_text, words_text
from btu.scan.stages import accuracy
from btu.stage_files import refuse_pickles, save_labels
from btu.stages import MODEL, Stage, as_config, compute, read_record
from btu.types import ProgressCallback, silent
from btu.victims import OFFLINE_HUB_ID, VICTIMS, Victim, find_victim

# Marks a folder as an export and lists the files of the export.
MANIFEST = "btu_export.json"
CARD = "README.md"
LISTED = 50
# Standard errors that chance exceeds in one case of twenty.
ONE_SIDED = 1.645

CITATION = """@inproceedings{jiang2025backdoor,
  title     = {Backdoor Token Unlearning: Exposing and Defending Backdoors in Pretrained
               Language Models},
  author    = {Jiang, Peihai and Lyu, Xixiang and Li, Yige and Ma, Jing},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {39},
  number    = {23},
  pages     = {24285--24293},
  year      = {2025},
  doi       = {10.1609/aaai.v39i23.34605}
}"""


@dataclass(frozen=True)
class CutCost:
    """What cutting a flagged token costs, in fractions of the trusted rows.

    token: its name.
    cost: the accuracy lost directly after the cut of this token alone; NaN if no trusted row
        contains it.
    cost_tuned: the accuracy on its rows that tuning does not repair; NaN where `cost` is low.
    vetoed: whether the token was not cut, since `cost_tuned` is above ``max_cut_cost``.
    """

    token: str
    cost: float
    cost_tuned: float
    vetoed: bool

    def as_record(self) -> dict[str, float | bool | None]:
        """Return what a record of the token adds; JSON has no NaN."""
        costs = {"cost": self.cost, "cost_tuned": self.cost_tuned}
        known = {name: None if math.isnan(value) else value for name, value in costs.items()}
        return {"vetoed": self.vetoed, **known}


@dataclass(frozen=True)
class Measured:
    """The effect of the cut.

    trusted: number of trusted rows.
    before: number of trusted rows whose label is predicted before the cut.
    after: the same after the cut.
    flips: share of the suspect rows with a flagged token whose label is predicted before the cut
        and not after it; NaN without such rows.
    majority: number of trusted rows of their most frequent class.
    costs: of each flagged token, by its id; empty if every flagged token is cut unmeasured.
    relabeled: number of suspect rows that the model was tuned on under another label.
    target: the index of their class; None if there are none.
    contradiction: how many standard errors the labels of the most suspicious class contradict the
        trusted rows beyond chance; NaN if that was not looked at.
    """

    trusted: int
    before: int
    after: int
    flips: float
    majority: int
    costs: Mapping[int, CutCost] = field(default_factory=dict)
    relabeled: int = 0
    target: int | None = None
    contradiction: float = math.nan

    def relabeling(self, class_name: str) -> str:
        """Return the sentences about the relabelled rows.

        class_name: of `target`, as it may be shown: label names are the user's data.
        """
        return (
            f"The labels of class {class_name} contradict the trusted rows more "
            "often than chance or the other classes do: perhaps a paraphrase attack, perhaps "
            f"careless labels. The model was tuned on {self.relabeled} of these rows under the "
            "label that models of the trusted rows predict."
        )

    def second_stage(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Return what manifest and JSON say of the second stage; JSON has no NaN."""
        known = not math.isnan(self.contradiction)
        return {
            "relabeled": self.relabeled,
            "relabeled_class": None if self.target is None else label_names[self.target],
            "contradiction": self.contradiction if known else None,
        }

    @property
    def vetoed(self) -> list[CutCost]:
        """The flagged tokens that were not cut."""
        return [cost for cost in self.costs.values() if cost.vetoed]

    def add_costs(self, records: Sequence[dict[str, Any]]) -> None:
        """Add to records of tokens what their cut costs, if it was measured."""
        for record in records:
            if record["token_id"] in self.costs:
                record |= self.costs[record["token_id"]].as_record()

    @property
    def at_chance(self) -> bool:
        """Whether the model is not better than always answering the most frequent class.

        Better is more than 1.645 standard errors of that answer's accuracy, which chance exceeds in
        one case of twenty.
        """
        share = self.majority / self.trusted
        margin = ONE_SIDED * math.sqrt(share * (1 - share) * self.trusted)
        return min(self.before, self.after) <= self.majority + margin

    def warning(self) -> str:
        """Return the sentence for a model at chance; empty for another."""
        if not self.at_chance:
            return ""
        return (
            f"The model is no better than always answering the most frequent class: "
            f"{_percent(self.before, self.trusted)} of the trusted rows before the cut and "
            f"{_percent(self.after, self.trusted)} after it, against "
            f"{_percent(self.majority, self.trusted)}. It has learned nothing useful from the "
            "rows, or the cut has removed it: do not use it, and what the cut changed says nothing."
        )

    def as_metrics(self) -> dict[str, float]:
        """Return accuracies and the metrics ``cut_cost`` and ``cut_flips``."""
        return {
            "accuracy_before_cut": self.before / self.trusted,
            "accuracy_after_cut": self.after / self.trusted,
            "cut_cost": (self.before - self.after) / self.trusted,
            "cut_flips": self.flips,
            "accuracy_of_majority": self.majority / self.trusted,
        }


def check_export(plan: ScanPlan, folder: str | Path) -> None:
    """Raise a `UserError` unless a model can be exported into `folder`; nothing is computed."""
    target = Path(folder).expanduser()
    if len(plan.corpus.clean) == 0:
        raise UserError(
            f"an export of data '{plan.spec.name}' needs trusted rows, which the model is tuned "
            "and measured on after the cut; name some with --clean FILE, or leave out --export."
        )
    if plan.defense.contradicted == RELABEL and len(plan.corpus.clean) < LEAST_CLEAN:
        raise UserError(
            "relabelling trains one model on each half of the trusted rows, and there are "
            f"{len(plan.corpus.clean)}; name at least {LEAST_CLEAN} with --clean FILE, or set "
            f"--contradicted {KEEP}."
        )
    source = Path(find_victim(plan.victim).location)
    if source.is_dir() and target.resolve() == source.resolve():
        raise UserError(
            f"--export {target} is the folder of the victim, which stays as it is; name another."
        )
    # The export is staged beside the folder.
    check_folder(f"--export {target}", target.parent)
    if target.is_dir():
        check_folder(f"--export {target}", target)
        others = any(target.iterdir()) and not (target / MANIFEST).is_file()
        what = "has files, but no earlier export" if others else ""
    else:
        what = "is a file" if target.exists() else ""
    if what:
        raise UserError(
            f"--export {target} {what}; nothing there is overwritten: name a new or empty folder."
        )


def export(
    report: ScanReport,
    folder: str | Path,
    *,
    command: str | None = None,
    gpus: float = 0,
    progress: ProgressCallback = silent,
) -> Measured:
    """Fine-tune on the scanned rows, cut the flagged tokens, tune on the trusted rows, save.

    report: of the scan.
    folder: gets the model, its tokenizer, a model card and a manifest; an earlier export there is
        replaced.
    command: the command that was run, for the card.
    gpus: above 0 computes on CUDA.
    progress: called with the progress of long work.

    Raises:
        UserError: there are no trusted rows, or the folder has files that are not an export's.
    """
    plan, root, target = report.plan, report.root, Path(folder).expanduser()
    check_export(plan, target)
    base = plan.base
    scored = Stage(
        "accuracy before the cut",
        accuracy,
        {"precision": base.train.precision},
        {"clean": base.clean, "model": base.model},
        base.where,
        units=base.clean_rows,
    )
    shown = renamed(progress)
    counted = read_record(compute(scored, root, gpus=gpus, progress=shown))["facts"]
    stage = compute(plan.defense.stages(base), root, gpus=gpus, progress=shown)
    record = read_record(stage)
    cut = record["facts"]["measured"]
    n, before = counted["n"], counted["hits"]
    majority = max(Counter(plan.corpus.clean.labels).values())
    after, costs = before - round(cut["cut_cost"] * n), _costs(report, stage, record["facts"])
    measured = Measured(
        n,
        before,
        after,
        cut["cut_flips"],
        majority,
        costs,
        cut.get("rows_relabeled", 0),
        record["facts"].get("target_guess"),
        cut.get("contradiction", math.nan),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".btu-export-", dir=target.parent) as made:
            staged = Path(made)
            _save_model(plan, stage / MODEL, staged)
            (staged / CARD).write_text(card(report, measured, record, command), encoding="utf-8")
            files = sorted(p.name for p in staged.iterdir())
            manifest = {
                **report.summary(),
                # JSON has no NaN.
                "measured": {
                    name: None if math.isnan(value) else value
                    for name, value in measured.as_metrics().items()
                },
                "at_chance": measured.at_chance,
                **measured.second_stage(plan.corpus.label_names),
                "environment": _environment(record),
                "files": files,
            }
            manifest["tokens"] = [t for t in manifest["tokens"] if t["flagged"]]
            measured.add_costs(manifest["tokens"])
            (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _publish(staged, target)
    except OSError as error:
        raise not_written(f"--export {target}", error, "name another folder") from error
    return measured


def _costs(report: ScanReport, stage: Path, facts: Mapping[str, Any]) -> dict[int, CutCost]:
    """Return what the cut of each flagged token costs; nothing if that was not measured."""
    found = Suspects.load(stage, facts)
    assert found is not None
    if "vetoed" not in found.table:
        return {}
    names = report.tokens.set_index("token_id")["token"]
    return {
        token: CutCost(
            str(names[token]),
            float(found.table["cost"][token]),
            float(found.table["cost_tuned"][token]),
            bool(found.table["vetoed"][token]),
        )
        for token in found.tokens
    }


def _save_model(plan: ScanPlan, source: Path, folder: Path) -> None:
    from transformers import AutoConfig

    refuse_pickles(source)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            # The same bytes: the exported model is the one that was measured.
            shutil.copyfile(path, folder / path.name)
    names = plan.corpus.label_names
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.save_pretrained(folder)
    save_labels(config, folder)
    # Not the scan's tokenizer, whose max_length would change.
    tokenizer = Victim(plan.victim, len(names)).tokenizer
    tokenizer.model_max_length = plan.victim.max_length
    tokenizer.save_pretrained(folder)


def _publish(staged: Path, target: Path) -> None:
    """Move an export into place; files that do not belong to an earlier export stay."""
    target.mkdir(exist_ok=True)
    old = target / MANIFEST
    names = json.loads(old.read_text(encoding="utf-8"))["files"] if old.is_file() else []
    new = sorted(p.name for p in staged.iterdir())
    for name in names:
        # A manifest may have been edited: only names of plain files in the folder are removed.
        if Path(name).name == name and name not in new:
            (target / name).unlink(missing_ok=True)
    # The manifest last: an interrupted first export is not marked as an export.
    for name in sorted(new, key=lambda name: name == MANIFEST):
        os.replace(staged / name, target / name)


# The model card ----------------------------------------------------------------------------------


def card(
    report: ScanReport, measured: Measured, record: dict[str, Any], command: str | None
) -> str:
    """Return the model card, which does not depend on the time.

    report: of the scan.
    measured: the effect of the cut.
    record: of the stage that cut and tuned.
    command: the command that was run.
    """
    plan, corpus = report.plan, report.plan.corpus
    flagged = report.tokens[report.tokens["flagged"]]
    names = corpus.label_names
    kept = len(measured.vetoed)
    cut = len(flagged) - kept
    what = f"{cut} suspicious token{'s' * (cut != 1)} cut" if cut else "nothing cut"
    what += f", {kept} flagged and not cut" if kept else ""
    fingerprints = corpus.fingerprints()
    sections = [
        _front_matter(plan),
        f"# {_plain(plan.spec.name)}, scanned for backdoor triggers: {what}",
        f"A text classifier with the classes {', '.join(map(_code, names))}, fine-tuned on data "
        "that was scanned with Backdoor Token Unlearning (BTU): a short training of the word "
        "embeddings exposes tokens that decide the label as a trigger would; the embeddings of the "
        "tokens that are cut are replaced in the fine-tuned model, which is then tuned on trusted "
        f"rows{' and on relabelled ones' if measured.relabeled else ''}.",
        "## What was done",
        _table(
            ("", ""),
            [
                ("data", _code(plan.spec.name)),
                ("fingerprint of the scanned rows", _code(fingerprints["train"])),
                ("fingerprint of the trusted rows", _code(fingerprints["clean"])),
                ("scanned rows", _by_class(names, plan.class_rows().tolist())),
                ("trusted rows", f"{len(corpus.clean)}, from {_code(_source(plan))}"),
                *((_words(name), str(n)) for name, n in sorted(corpus.notes.items())),
                ("tokens that the victim does not know", _share(report.reading.unknown_share)),
                ("tokens beyond the longest input", _share(report.reading.cut_share)),
                ("victim", _code(plan.victim.name)),
                ("victim's identity", _code(plan.identity)),
                ("longest input", f"{plan.victim.max_length} tokens"),
                ("rule", _code(str(plan.defense.rule))),
                ("threshold", f"{plan.threshold:g}"),
                ("seed", str(plan.base.seed)),
            ],
        ),
        _flagged(report, measured),
        *_relabeled(names, measured),
        "## Measured",
        *([f"**{measured.warning()}**"] if measured.at_chance else []),
        _table(
            ("on", "what", "value"),
            [
                (
                    f"{measured.trusted} trusted rows",
                    "accuracy before the cut",
                    _share(measured.before / measured.trusted),
                ),
                ("", "accuracy after the cut", _share(measured.after / measured.trusted)),
                (
                    "",
                    "accuracy of the most frequent class",
                    _share(measured.majority / measured.trusted),
                ),
                ("", "`cut_cost`, their difference", f"{measured.as_metrics()['cut_cost']:.4f}"),
                (
                    "scanned rows with a flagged token",
                    "`cut_flips`: label predicted before the cut, and not after it",
                    "-" if math.isnan(measured.flips) else f"{measured.flips:.4f}",
                ),
            ],
        ),
        "The clean tuning after the cut uses these trusted rows: the accuracy on them after the "
        "tuning would mean little. Whether a backdoor is gone was not measured, since the trigger "
        "is not known; a cut that flips most of the rows with a flagged token is a strong sign of "
        "a backdoor.",
        "## Limits",
        _limits(report, measured),
        "## Use",
        "```python\nfrom transformers import pipeline\n\n"
        'classify = pipeline("text-classification", model=FOLDER)\n'
        'classify("a text", truncation=True)\n```',
        "## How to reproduce it",
        f"```\n{command}\n```"
        if command
        else "From Python: `btu.scan.report.scan`, then `btu.scan.export`.",
        "```json\n" + json.dumps(_settings(plan, measured), indent=1) + "\n```",
        _table(
            ("computed with", ""),
            [(name, _code(value)) for name, value in _environment(record).items()],
        ),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(plan: ScanPlan) -> str:
    """Return the YAML head; strings and lists in JSON are YAML."""
    entries: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "backdoor-defense", "backdoor-token-unlearning"],
    }
    name = plan.victim.name
    if name == "offline":
        entries["base_model"] = OFFLINE_HUB_ID
    elif not Path(name).expanduser().is_dir():
        entries["base_model"] = VICTIMS.load(name) if name in VICTIMS else name
    if plan.spec.path is None and "/" in plan.spec.name:
        entries["datasets"] = [plan.spec.name]
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _on_rows(measured: Measured) -> str:
    return f" on the trusted rows{' and the relabelled ones' if measured.relabeled else ''}"


def _flagged(report: ScanReport, measured: Measured) -> str:
    flagged = report.tokens[report.tokens["flagged"]]
    bar = f"{report.bar:g}"
    if flagged.empty:
        highest = report.highest
        best = (
            "no token could be scored"
            if math.isnan(highest)
            else f"the highest is {score_text(highest)}"
        )
        return (
            "## Flagged tokens\n\nNone, and nothing was cut: no score reached the bar of "
            f"{bar}; {best}. The model was still tuned{_on_rows(measured)}."
        )
    rows = [
        (
            _code(token["token"]),
            score_text(token["score"]),
            str(token["rows"]),
            f"{_code(token['class'])} {_share(token['share'])} ({_share(token['class_share'])})",
            str(token["clean_rows"]),
            _is_cut(measured.costs.get(token["token_id"])),
        )
        for token in flagged.head(LISTED).to_dict("records")
    ]
    more = len(flagged) - LISTED
    reading = report.reading
    unknown = ""
    if reading.token_id in flagged["token_id"].tolist():
        named = words_text(reading, report.plan.corpus.label_names, LISTED)
        unknown = (
            f"\n\n{_code(str(reading.token))} stands for every word that the victim does not know: "
            f"a cut affects all of them, benign ones too. Behind it, with the rows by class: "
            f"{_code(named)}."
        )
    text = "## Flagged tokens\n\n" + _table(
        (
            "token",
            f"score (bar {bar})",
            "rows",
            "class: share of its rows (of all)",
            "trusted rows",
            "cut",
        ),
        rows,
    )
    text += f"\n\n... and {more} more, in `{MANIFEST}`." if more > 0 else ""
    if measured.vetoed:
        text += (
            "\n\nA token is not cut if its cut costs, after tuning, more than "
            f"{_share(float(report.plan.defense.max_cut_cost or 0))} of the trusted rows. Such a "
            "word usually carries the meaning of a class. If it is a trigger, its backdoor is in "
            "the model: with `--max-cut-cost 1` every flagged token is cut."
        )
    return text + unknown


def _relabeled(names: Sequence[str], measured: Measured) -> list[str]:
    if measured.target is None:
        return []
    return ["## Relabelled rows", measured.relabeling(_code(names[measured.target]))]


def _is_cut(cost: CutCost | None) -> str:
    if cost is None or not cost.vetoed:
        return "yes"
    return f"no: costs {_share(cost.cost_tuned)} of the trusted rows"


def _limits(report: ScanReport, measured: Measured) -> str:
    plan = report.plan
    least = ", ".join(
        f"{_code(name)}: {'none' if count is None else count}" for name, count in plan.least.items()
    )
    too_few = (
        "It cannot flag a token in fewer rows of a class than this on its own, even if no trusted "
        f"row contains it ({least}). Whether it flags a token in more rows depends on how far its "
        "embedding moved: the number is no promise."
    )
    lines = [
        *([report.reading.warning()] if report.reading.too_little else []),
        "A scan finds triggers made of fixed tokens (words, a sentence) that decide the label of "
        "the scanned rows. It names no trigger without fixed tokens (a style, a syntax, a "
        "paraphrase), and no trigger beyond the longest input.",
        *([too_few] if least else []),
        "It does not search for a backdoor that the pretrained model already had.",
        "If nothing was flagged, that does not prove that the data have no trigger.",
        "The model largely ignores cut tokens, in benign texts too.",
        *(["It does not ignore flagged tokens that were not cut."] if measured.vetoed else []),
        "Rows with a flagged token were not removed; the model was trained on them.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _settings(plan: ScanPlan, measured: Measured) -> dict[str, Any]:
    train = plan.base.train
    last = ("clean tuning", plan.base.tuning.applied_to(train))
    if measured.relabeled:
        last = ("tuning on trusted and relabelled rows", train)
    return {
        "unlearning": as_config(plan.defense),
        "fine-tune": as_config(train),
        last[0]: as_config(last[1]),
    }


def _environment(record: dict[str, Any]) -> dict[str, str]:
    found = record["environment"]
    names = ("code", "python", "torch", "transformers", "device", "threads")
    return {**{n: found[n] for n in names}, "precision": ", ".join(record["precisions"])}


def _source(plan: ScanPlan) -> str:
    return Path(plan.data.trusted).name if plan.spec.path is not None else plan.data.trusted


def _by_class(names: tuple[str, ...], sizes: list[int]) -> str:
    counted = ", ".join(f"{_code(n)} {size}" for n, size in zip(names, sizes, strict=True))
    return f"{sum(sizes)} ({counted})"


def _words(note: str) -> str:
    known = {
        "dropped_train_empty": "scanned rows dropped: no text",
        "dropped_clean_empty": "trusted rows dropped: no text",
        "dropped_train_overlap": "rows not scanned: their text is a trusted one",
    }
    return known.get(note, note.replace("_", " "))


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Return text of unknown origin as Markdown without markup, on one line."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return html.escape(line).translate({ord(c): f"&#{ord(c)};" for c in "\\`*_[]|#!"})


def _code(text: str) -> str:
    return f"<code>{_plain(text)}</code>"
