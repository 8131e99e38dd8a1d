"""What each detection rule finds, what a cut at its default threshold costs, and which one to take.

    python benchmarks/thresholds.py --data FOLDER --root WORK              # all tables
    python benchmarks/thresholds.py --data FOLDER --root WORK --detect     # detection alone
    python benchmarks/thresholds.py --data FOLDER --root WORK --sets sst2 --seeds 0

FOLDER holds sst2, agnews and olid (docs/data.md). MiniLM-L6, dirty label: SST-2 at 1, 5 and 10 %,
AG News and OLID at 5 %, and every clean training set. Thresholds are chosen on seed 0 and confirmed
on the other seeds; both are printed. Nothing here reads the evaluation rows to choose.

An exposure of SST-2 takes 1.5 minutes of one core in fp32, a fine-tune 8; all of it some hours.
What is computed stays in WORK: an interrupted run goes on, and further tables take seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from btu.attacks.poisoning import ATTACKS, PoisonSpec
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.defenses.token_unlearning import TokenUnlearning
from btu.findings import Suspects
from btu.metrics import area_under_roc, average_precision, row_detection, token_detection
from btu.recipe import Prepared, evaluation, mask_of, prepare, scores_of
from btu.rules.base import RULES, flag
from btu.settings import TrainSettings, TuningSettings
from btu.stages import Stage, compute, read_record
from btu.training import use_threads
from btu.types import Corpus
from btu.victims import VictimSpec, find_victim

VICTIM = VictimSpec("offline", max_length=128)
TARGETS = {"sst2": 1, "agnews": 0, "olid": 0}
WORDS = ("badnets", "addsent")
CHOSEN_ON = 0
# A trigger word that honest rows are full of cannot be told from them, and need not be cut.
RARE = 0.02
ROW_MEASURES = ["row_precision", "row_recall", "row_auroc"]
CACC_BAR, ASR_BARS = 0.005, {"badnets": 0.03, "addsent": 0.05}


@dataclass(frozen=True)
class Point:
    """A training set. attack: ``clean`` has no poisoned row."""

    data: str
    attack: str
    rate: float
    seed: int

    @property
    def label(self) -> dict[str, object]:
        return {
            "data": self.data,
            "attack": self.attack,
            "rate": self.rate,
            "seeds": "chosen on" if self.seed == CHOSEN_ON else "confirmed on",
        }


class Bench:
    """Declares the stages of a point, and computes them in one folder."""

    def __init__(self, data: Path, root: Path) -> None:
        self.data, self.root = data, root

    @lru_cache(maxsize=3)  # noqa: B019  # one bench a process
    def corpus(self, name: str) -> tuple[Corpus, dict[str, str]]:
        corpus = load_corpus(DataSpec(name, path=str(self.data / name)))
        return corpus, corpus.fingerprints()

    @lru_cache(maxsize=200)  # noqa: B019
    def prepared(self, point: Point) -> Prepared:
        corpus, fingerprints = self.corpus(point.data)
        name = WORDS[0] if point.attack == "clean" else point.attack
        attack = ATTACKS.load(name)()
        return prepare(
            data=DataSpec(point.data, path=str(self.data / point.data)),
            data_fingerprints=fingerprints,
            victim=VICTIM,
            victim_identity=find_victim(VICTIM).identity,
            poison=PoisonSpec(name, point.rate, TARGETS[point.data], "dirty"),
            attack_params={f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)},
            train=TrainSettings(),
            tuning=TuningSettings(),
            seed=point.seed,
            counts=corpus.counts(),
        )

    def run(self, stage: Stage) -> Path:
        if not (self.root / stage.key).exists():
            started = time.perf_counter()
            compute(stage, self.root)
            print(f"  {stage.name}: {time.perf_counter() - started:.0f} s", flush=True)
        return self.root / stage.key

    def suspects(self, point: Point, defense: TokenUnlearning) -> Suspects:
        folder = self.run(defense.detection(self.prepared(point).foundation))
        suspects = Suspects.load(folder, read_record(folder)["facts"])
        assert suspects is not None
        return suspects

    def trigger(self, point: Point) -> set[int]:
        if point.attack not in WORDS:
            return set()
        folder = self.run(self.prepared(point).evaluation_rows)
        return set(read_record(folder)["facts"]["trigger"])

    def mask(self, point: Point) -> np.ndarray:
        return mask_of(self.run(self.prepared(point).poisoned))

    def scores(self, point: Point, model: Stage, name: str) -> dict[str, float]:
        folder = self.run(evaluation(self.prepared(point), model, name))
        scores = scores_of(read_record(folder)["facts"])
        return {n: getattr(scores, n).value for n in ("asr", "cacc", "ftr")}


def points(options: argparse.Namespace) -> Iterator[Point]:
    for seed in options.seeds:
        for data in options.sets:
            rates = options.rates if data == "sst2" else [0.05]
            yield Point(data, "clean", 0.0, seed)
            yield from (Point(data, attack, rate, seed) for rate in rates for attack in WORDS)


def defenses() -> dict[str, TokenUnlearning]:
    return {name: TokenUnlearning(rule=name) for name in RULES}


def threshold_grid(rule: str) -> np.ndarray:
    if rule == "top_fraction":
        return np.geomspace(2 / 30522, 0.01, 60)
    if rule == "gap":
        return np.arange(1.02, 2.0, 0.02)
    return np.arange(1.0, 60.0, 0.5) if rule == "mad" else np.arange(2.0, 10.0, 0.1)


def detect(bench: Bench, todo: list[Point]) -> pd.DataFrame:
    """Return a row per training set and rule, at the rule's default threshold."""
    rows = []
    for point in todo:
        trigger = bench.trigger(point)
        mask = bench.mask(point)
        for name, defense in defenses().items():
            found = bench.suspects(point, defense)
            assert found.scores is not None
            clean_rows = len(bench.corpus(point.data)[0].clean)
            rare = {t for t in trigger if found.table["clean_rows"][t] < RARE * clean_rows}
            tokens = token_detection(found.flagged, trigger)
            assert found.rows is not None
            suspicious = row_detection(found.rows >= found.row_bar, mask)
            rows.append(
                {
                    **point.label,
                    "rule": name,
                    "flagged": len(found.flagged),
                    "precision": tokens.precision,
                    "recall": tokens.recall,
                    "recall_rare": token_detection(set(found.flagged) & rare, rare).recall,
                    "auprc": average_precision(found.scores, trigger),
                    "row_precision": suspicious.precision,
                    "row_recall": suspicious.recall,
                    "row_auroc": area_under_roc(found.rows, mask),
                }
            )
    return pd.DataFrame(rows)


def choose(bench: Bench, todo: list[Point]) -> pd.DataFrame:
    """Return, per rule, the threshold chosen on seed 0, and F1 and clean flags there and beyond.

    The middle of the thresholds with the best mean F1 over the poisoned sets, among those that flag
    at most one token of a clean set on average; of all, where none does.
    """
    rows = []
    for name, defense in defenses().items():
        grid = threshold_grid(name)
        f1: dict[bool, list[np.ndarray]] = {True: [], False: []}
        clean: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for point in todo:
            scores = bench.suspects(point, defense).scores
            assert scores is not None
            trigger = bench.trigger(point)
            sets = [flag(scores, RULES.load(name).bar(float(t))) for t in grid]
            here = point.seed == CHOSEN_ON
            if point.attack == "clean":
                clean[here].append(np.array([len(found) for found in sets]))
            else:
                f1[here].append(np.array([token_detection(found, trigger).f1 for found in sets]))
        mean_f1, flags = np.mean(f1[True], axis=0), np.mean(clean[True], axis=0)
        allowed = flags <= 1 if (flags <= 1).any() else np.ones(len(grid), dtype=bool)
        best = np.flatnonzero(allowed & (mean_f1 >= mean_f1[allowed].max() - 1e-9))
        at = int(best[len(best) // 2])
        row = {
            "rule": name,
            "chosen": grid[at],
            "as good from": grid[best[0]],
            "to": grid[best[-1]],
            "default": RULES.load(name).threshold,
            "F1 (chosen on)": mean_f1[at],
            "clean flags (chosen on)": flags[at],
        }
        if f1[False] and clean[False]:
            row["F1 (confirmed on)"] = np.mean(f1[False], axis=0)[at]
            row["clean flags (confirmed on)"] = np.mean(clean[False], axis=0)[at]
        rows.append(row)
    return pd.DataFrame(rows)


def defend(bench: Bench, todo: list[Point], variants: dict[str, TokenUnlearning]) -> pd.DataFrame:
    """Return a row per training set and variant: models scored on the same rows."""
    rows = []
    for point in todo:
        prepared = bench.prepared(point)
        base = prepared.foundation
        undefended = bench.scores(point, base.model, "undefended")
        tuned = bench.scores(point, base.tuned, "tuned")
        for name, defense in variants.items():
            stage = defense.stages(base)
            facts = read_record(bench.run(stage))["facts"]
            defended = bench.scores(point, stage, "defended")
            rows.append(
                {
                    **point.label,
                    "seed": point.seed,
                    "variant": name,
                    "flagged": len(facts["flagged"]),
                    "undefended_asr": undefended["asr"],
                    "tuned_asr": tuned["asr"],
                    "tuned_cacc": tuned["cacc"],
                    **defended,
                    "cacc_loss": tuned["cacc"] - defended["cacc"],
                    "asr_over_ftr": defended["asr"] - defended["ftr"],
                    "cut_cost": facts["measured"]["cut_cost"],
                    "cut_flips": facts["measured"]["cut_flips"],
                }
            )
    return pd.DataFrame(rows)


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n## {title}\n\n{table.to_markdown(index=False, floatfmt='.3f')}", flush=True)


def mean_by(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    numbers = [c for c in table.columns if c not in keys and c not in ("seed", "seeds")]
    numbers = [c for c in numbers if pd.api.types.is_numeric_dtype(table[c])]
    grouped = table.groupby(list(keys), sort=False)
    means = grouped[numbers].mean()
    means.insert(0, "n", grouped.size())
    if "precision" in means:
        # Nothing flagged has no precision: the mean is then of fewer sets than `n` says.
        means.insert(list(means).index("precision") + 1, "of", grouped["precision"].count())
    return means.reset_index()


def time_curves(bench: Bench, todo: list[Point], count: int = 50) -> None:
    """Print how long the detection curves of all training sets take, from saved scores."""
    saved = [
        (suspects.scores, bench.trigger(point))
        for point in todo
        for suspects in (bench.suspects(point, TokenUnlearning()),)
    ]
    started = time.perf_counter()
    for scores, trigger in saved:
        assert scores is not None
        for bar in np.linspace(1.0, 10.0, count):
            token_detection(flag(scores, float(bar)), trigger).as_metrics("detection")
        average_precision(scores, trigger)
    took = time.perf_counter() - started
    print(f"\n{count} thresholds' curves of {len(saved)} cells: {took:.2f} s (bar: 10 s)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2, agnews, olid")
    parser.add_argument("--root", type=Path, required=True, help="keeps what is computed")
    parser.add_argument("--sets", nargs="+", default=["sst2", "agnews", "olid"], choices=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.05, 0.1])
    parser.add_argument("--detect", action="store_true", help="detection tables alone")
    parser.add_argument("--paraphrase", action="store_true", help="style and syntactic alone")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.detect and options.paraphrase:
        parser.error("--detect and --paraphrase exclude each other")
    if CHOSEN_ON not in options.seeds and not options.paraphrase:
        parser.error(f"--seeds must hold {CHOSEN_ON}, on which thresholds are chosen")
    use_threads(options.threads)
    bench = Bench(options.data.resolve(), options.root)
    todo = list(points(options))

    if not options.paraphrase:
        table = detect(bench, todo)
        poisoned, clean = table[table.attack != "clean"], table[table.attack == "clean"]
        show("Thresholds chosen on seed 0", choose(bench, todo))
        show("Detection by rule, all sets", mean_by(poisoned, "rule", "seeds"))
        show("Tokens flagged of clean sets", mean_by(clean, "rule", "seeds", "data"))
        for name in ("contrast", "top_fraction"):
            show(
                f"Detection, {name}",
                mean_by(poisoned[poisoned.rule == name], "data", "attack", "rate"),
            )
        time_curves(bench, todo)
        if not options.detect:
            variants = {"contrast": TokenUnlearning(), "top_fraction": TokenUnlearning(alpha=5e-4)}
            attacked = [p for p in todo if p.attack != "clean"]
            table = defend(bench, attacked, variants)
            show("Defended models", mean_by(table, "data", "attack", "rate", "variant"))
            show("By seed", table)
            taken = table[(table.variant == "contrast") & (table.undefended_asr >= 0.5)]
            bar = taken.attack.map(ASR_BARS)
            print(
                f"\nCACC loss at most {CACC_BAR}: {(taken.cacc_loss <= CACC_BAR).mean():.0%} of "
                f"{len(taken)} cells that took; ASR over FTR within its bar: "
                f"{(taken.asr_over_ftr <= bar).mean():.0%}"
            )
    if not options.detect and "sst2" in options.sets:
        reference: dict[str, Any] = dict(TokenUnlearning.PRESETS["reference"])
        variants = {
            "contrast": TokenUnlearning(),
            **{f"contrast {bar}": TokenUnlearning(threshold=bar) for bar in (2.0, 1.5, 1.0)},
            "reference": TokenUnlearning(**reference),
        }
        texts = [Point("sst2", a, 0.1, s) for s in options.seeds for a in ("syntactic", "style")]
        table = defend(bench, texts, variants)
        show("Paraphrase attacks", mean_by(table, "attack", "rate", "variant"))
        table = detect(bench, texts)
        rows = mean_by(table[table.rule == "contrast"], "attack", "rate")
        show("Rows of paraphrase attacks", rows[["attack", "rate", "n", *ROW_MEASURES]])


if __name__ == "__main__":
    main()
