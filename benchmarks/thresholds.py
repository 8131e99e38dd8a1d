"""What each detection rule finds, what a cut at its default threshold costs, and which one to take.

    python benchmarks/thresholds.py --data FOLDER --root WORK              # all tables
    python benchmarks/thresholds.py --data FOLDER --root WORK --detect     # detection alone
    python benchmarks/thresholds.py --data FOLDER --root WORK --sets sst2 --seeds 0
    python benchmarks/thresholds.py --root WORK --sets demo --seeds 0      # the embedded corpus
    python benchmarks/thresholds.py --root WORK --generated develop        # sets drawn at random
    python benchmarks/thresholds.py --root WORK --reserves                 # few and odd clean rows

FOLDER holds sst2, agnews and olid (docs/data.md). MiniLM-L6, dirty label: SST-2 at 1, 5 and 10 %,
AG News and OLID at 5 %, and every clean training set. Thresholds are chosen on seed 0 and confirmed
on the other seeds; both are printed. Nothing here reads the evaluation rows to choose.

An exposure of SST-2 takes 1.5 minutes of one core in fp32, a fine-tune 8; all of it some hours.
What is computed stays in WORK: an interrupted run goes on, and further tables take seconds.

Bars: at its default threshold rule contrast flags no benign token of a poisoned set and nothing of
a clean one, and every trigger token that is rare in clean rows; that threshold is among those that
are as good as the best on seed 0. Where the attack took, the defended CACC is at most 0.005 below
the clean-tuned model's, and ASR at most 0.03 (badnets) or 0.05 (addsent) above the false trigger
rate. Every bar is an option. Bar of speed: 50 thresholds' curves of all training sets within 10 s.

``--generated HALF`` measures rule contrast alone on data sets drawn at random
(benchmarks/generated.py), each clean and poisoned. A rule is developed on the half ``develop``, and
measured on ``held-back`` once, when it is finished. Bars: the mean of the sets' precision and the
mean recall of rare trigger tokens are at least 0.95, and of all clean sets together no more tokens
are flagged than chance flags 95 % of the time. ``--reserves`` changes one factor of a fixed set at
a time: few clean rows, clean rows of another source, many classes, templates, a small class, few
and many training rows, long texts. Bars: in the unchanged set the trigger is flagged, and nothing
else; the detection on 60,000 rows and 128,000 tokens takes 10 s beyond the exposure. Where nothing
is computed yet, `develop` takes half an hour of one core, and ``--reserves`` 40 minutes; without
its 60,000 rows (``--most-rows 10000``) 20.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from figures import Judge, add_options, count
from generated import BASE, HALVES, Drawn, draw, large, named, numbers, reserves, write
from generated_tables import (
    by_factor,
    described,
    judge_generated,
    judge_reserves,
    most_by_chance,
    rows_of,
)

from btu.attacked import mask_of
from btu.attacks.poisoning import ATTACKS, PoisonSpec
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.defenses.token_unlearning import FLAGGED, SCORES, TokenUnlearning
from btu.findings import Suspects
from btu.metrics import area_under_roc, average_precision, row_detection, token_detection
from btu.recipe import CellInputs, Prepared, evaluation, prepare, scores_of
from btu.rules.base import RULES, flag, suspicion
from btu.settings import TrainSettings, TuningSettings
from btu.stage_files import load_victim
from btu.stages import Stage, compute, read_record
from btu.training import use_threads
from btu.types import Corpus
from btu.victims import VictimSpec, find_victim

TARGETS = {"sst2": 1, "agnews": 0, "olid": 0, "demo": "positive"}
WORDS = ("badnets", "addsent")
CHOSEN_ON = 0
# A trigger word that honest rows are full of cannot be told from them, and need not be cut.
RARE = 0.02
ROW_MEASURES = ["row_precision", "row_recall", "row_auroc"]
# The rule whose bars are judged.
JUDGED = "contrast"
# An attack took where it has this ASR without a defense.
TOOK = 0.5
# What the table of `--reserves` shows: the set's name says what was changed.
RESERVE_COLUMNS = [
    "set", "rows", "clean_rows", "poisoned", "flagged", "precision", "recall", "trigger_score",
    "trigger_surplus", "trigger_drift", "benign_score", "clean_flagged", "clean_score", "seconds",
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A training set. attack: its name, or ``style=COLUMN``; ``clean`` has no poisoned row."""

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

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Path | None = options.data.resolve() if options.data else None
        self.root: Path = options.root
        self.victim = VictimSpec(options.victim, max_length=options.max_length)
        self.train = TrainSettings(epochs=options.epochs)
        self.limits = {f"max_{r}_rows": getattr(options, r) for r in ("train", "clean", "eval")}

    def spec(self, name: str) -> DataSpec:
        """Return where the rows of a data set are; a generated one is written first."""
        if _is_drawn(name):
            folder = write(named(name), self.words, self.root)
            return DataSpec(name, path=str(folder), **self.limits)
        path = None if name == "demo" else str(self.data / name)  # type: ignore[operator]
        return DataSpec(name, path=path, **self.limits)

    @cached_property
    def words(self) -> list[str]:
        """The words of the victim that are one token, by id."""
        vocabulary: dict[str, int] = load_victim(self.victim, 2).tokenizer.get_vocab()
        words = [
            w for w in vocabulary if w.isascii() and w.isalpha() and w.islower() and len(w) > 2
        ]
        return sorted(words, key=vocabulary.__getitem__)

    @lru_cache(maxsize=3)  # noqa: B019  # one bench a process
    def corpus(self, name: str) -> tuple[Corpus, dict[str, str]]:
        corpus = load_corpus(self.spec(name))
        return corpus, corpus.fingerprints()

    @lru_cache(maxsize=200)  # noqa: B019
    def prepared(self, point: Point) -> Prepared:
        corpus, fingerprints = self.corpus(point.data)
        name, _, column = point.attack.partition("=")
        name = WORDS[0] if name == "clean" else name
        drawn = named(point.data) if _is_drawn(point.data) else None
        given = drawn.params if drawn is not None and name == drawn.attack else {}
        given = {"column": column} if column else given
        attack = ATTACKS.load(name)(**given)
        params = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
        inputs = CellInputs(
            data=self.spec(point.data),
            data_fingerprints=fingerprints,
            victim=self.victim,
            victim_identity=find_victim(self.victim).identity,
            poison=PoisonSpec(
                name,
                point.rate,
                TARGETS[point.data] if drawn is None else drawn.target,
                "dirty" if drawn is None else drawn.label_mode,
            ),
            attack_params=params,
            train=self.train,
            tuning=TuningSettings(),
            seed=point.seed,
            counts=corpus.counts(),
        )
        return prepare(inputs)

    def run(self, stage: Stage) -> Path:
        if not (self.root / stage.key).exists():
            started = time.perf_counter()
            compute(stage, self.root)
            print(f"  {stage.name}: {time.perf_counter() - started:.0f} s", flush=True)
        return self.root / stage.key

    def detection(self, point: Point, defense: TokenUnlearning) -> Path:
        return self.run(defense.detection(self.prepared(point).foundation))

    def detection_seconds(self, point: Point, defense: TokenUnlearning) -> float:
        """Return how long scores, flags and their table took: what comes after the exposure."""
        last = defense.detection(self.prepared(point).foundation)
        stages = (last, *(last.inputs[role] for role in (SCORES, FLAGGED)))
        self.run(last)
        return sum(float(read_record(self.root / one.key)["seconds"]) for one in stages)

    def suspects(self, point: Point, defense: TokenUnlearning) -> Suspects:
        folder = self.detection(point, defense)
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


def _is_drawn(name: str) -> bool:
    return name.startswith(("generated-", "reserves-"))


def points(options: argparse.Namespace) -> Iterator[Point]:
    for seed in options.seeds:
        for data in options.sets:
            rates = options.rates if data in ("sst2", "demo") else [0.05]
            yield Point(data, "clean", 0.0, seed)
            yield from (Point(data, attack, rate, seed) for rate in rates for attack in WORDS)


def threshold_grid(rule: str) -> np.ndarray:
    if rule == "top_fraction":
        return np.geomspace(2 / 30522, 0.01, 60)
    if rule == "gap":
        return np.arange(1.02, 2.0, 0.02)
    return np.arange(1.0, 60.0, 0.5) if rule == "mad" else np.arange(2.0, 10.0, 0.1)


def detect(bench: Bench, todo: list[Point], rules: dict[str, TokenUnlearning]) -> pd.DataFrame:
    """Return a row per training set and rule, at the rule's default threshold."""
    rows = []
    for point in todo:
        trigger = bench.trigger(point)
        mask = bench.mask(point)
        for name, defense in rules.items():
            found = bench.suspects(point, defense)
            assert found.scores is not None
            assert found.rows is not None
            suspicious = row_detection(found.rows >= found.row_bar, mask)
            rows.append(
                {
                    **point.label,
                    "rule": name,
                    **tokens_found(bench, point, found),
                    "auprc": average_precision(found.scores, trigger),
                    "row_precision": suspicious.precision,
                    "row_recall": suspicious.recall,
                    "row_auroc": area_under_roc(found.rows, mask),
                }
            )
    return pd.DataFrame(rows)


def tokens_found(bench: Bench, point: Point, found: Suspects) -> dict[str, float]:
    """Return how well the flagged tokens are the trigger's, as columns of a table."""
    trigger, flagged = bench.trigger(point), found.tokens
    clean_rows = len(bench.corpus(point.data)[0].clean)
    rare = {t for t in trigger if found.table["clean_rows"][t] < RARE * clean_rows}
    tokens = token_detection(flagged, trigger)
    return {
        "flagged": len(flagged),
        "precision": tokens.precision,
        "recall": tokens.recall,
        "recall_rare": token_detection(set(flagged) & rare, rare).recall,
    }


def measured(bench: Bench, drawn: Drawn) -> dict[str, Any]:
    """Return what the judged rule finds in a generated set, as columns of a table.

    Scores, surplus and drift are the highest of the trigger's tokens or of all others; seconds are
    those of the detection beyond the exposure, when it was computed.
    """
    defense = TokenUnlearning(rule=JUDGED)
    clean = Point(drawn.name, "clean", 0.0, CHOSEN_ON)
    poisoned = Point(drawn.name, drawn.attack, drawn.rate, CHOSEN_ON)
    found, twin = bench.suspects(poisoned, defense), bench.suspects(clean, defense)
    assert found.scores is not None
    assert twin.scores is not None
    trigger = np.isin(np.arange(len(found.scores)), list(bench.trigger(poisoned)))
    corpus = bench.corpus(drawn.name)[0]
    return {
        "rows": len(corpus.train),
        "clean_rows": len(corpus.clean),
        "poisoned": int(bench.mask(poisoned).sum()),
        **tokens_found(bench, poisoned, found),
        "trigger_score": _highest(found.scores[trigger]),
        "trigger_surplus": _highest(found.table["surplus"][trigger]),
        "trigger_drift": _highest(found.table["drift_sigmas"][trigger]),
        "benign_score": _highest(found.scores[~trigger]),
        "clean_flagged": len(twin.tokens),
        "clean_score": _highest(twin.scores),
        "seconds": bench.detection_seconds(poisoned, defense),
    }


def _highest(scores: np.ndarray) -> float:
    """Return the highest score; NaN if no token has one."""
    known = scores[~np.isnan(scores)]
    return float(known.max()) if len(known) else float("nan")


def choose(bench: Bench, todo: list[Point], rules: dict[str, TokenUnlearning]) -> pd.DataFrame:
    """Return, per rule, the threshold chosen on seed 0, and F1 and clean flags there and beyond.

    The middle of the thresholds with the best mean F1 over the poisoned sets, among those that flag
    at most one token of a clean set on average; of all, where none does.
    """
    rows = []
    for name, defense in rules.items():
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


def time_detection(judge: Judge, rows: int, vocabulary: int = 128_000) -> None:
    """Judge how long the detection takes on many rows and tokens, without the exposure."""
    evidence, drift = large(rows, vocabulary)
    started = time.perf_counter()
    found = flag(RULES.load(JUDGED).score(evidence, drift), RULES.load(JUDGED).threshold)
    suspicion(evidence)
    took = time.perf_counter() - started
    judge.structure(f"{JUDGED}: the trigger alone is flagged of {rows} rows, {vocabulary} tokens",
                    str(found), found == (vocabulary // 2,))  # fmt: skip
    judge.fast("its detection within 10 s", f"{took:.2f} s", took < 10)


def time_curves(judge: Judge, bench: Bench, todo: list[Point], thresholds: int = 50) -> None:
    """Judge how long the detection curves of all training sets take, from saved scores."""
    saved = [
        (suspects.scores, bench.trigger(point))
        for point in todo
        for suspects in (bench.suspects(point, TokenUnlearning()),)
    ]
    started = time.perf_counter()
    for scores, trigger in saved:
        assert scores is not None
        for bar in np.linspace(1.0, 10.0, thresholds):
            token_detection(flag(scores, float(bar)), trigger).as_metrics("detection")
        average_precision(scores, trigger)
    took = time.perf_counter() - started
    judge.fast(f"{thresholds} thresholds' curves of {len(saved)} sets within 10 s",
               f"{took:.2f} s", took < 10)  # fmt: skip


def judge_detection(
    judge: Judge, table: pd.DataFrame, chosen: pd.DataFrame, bars: argparse.Namespace
) -> None:
    """Judge rule contrast at its default threshold.

    judge: gets bars and figures.
    table: of `detect`.
    chosen: of `choose`.
    bars: the options of the script.
    """
    ours = table[table.rule == JUDGED]
    poisoned, clean = ours[ours.attack != "clean"], ours[ours.attack == "clean"]
    # Where nothing is flagged, no benign token is; that nothing was found, recall tells.
    precision = float(poisoned.precision.fillna(1.0).min())
    judge.structure(f"{JUDGED}: precision at least {bars.least_precision} in each poisoned set",
                    f"lowest of {poisoned.precision.count()}: {precision:.3f}",
                    precision >= bars.least_precision)  # fmt: skip
    recall = float(poisoned.recall_rare.fillna(1.0).min())  # no rare token: nothing to find
    judge.structure(f"{JUDGED}: recall of rare trigger tokens at least {bars.least_recall} in each",
                    f"lowest of {len(poisoned)}: {recall:.3f}",
                    recall >= bars.least_recall)  # fmt: skip
    flags = int(clean.flagged.max())
    judge.structure(f"{JUDGED}: at most {bars.most_clean_flags} tokens flagged of each clean set",
                    f"most of {len(clean)}: {flags}", flags <= bars.most_clean_flags)  # fmt: skip
    row = chosen.set_index("rule").loc[JUDGED]
    lowest, highest, default = row["as good from"], row["to"], row["default"]
    judge.structure(f"{JUDGED}: the default {default} is as good as the best on seed {CHOSEN_ON}",
                    f"as good from {lowest:.1f} to {highest:.1f}",
                    bars.any_default or lowest <= default <= highest)  # fmt: skip
    judge.figures |= {"detection": rows_of(table), "chosen": rows_of(chosen)}


def judge_defended(judge: Judge, table: pd.DataFrame, bars: argparse.Namespace) -> None:
    """Judge the models that rule contrast defends. table: of `defend`."""
    ours = table[table.variant == JUDGED]
    taken = ours[ours.undefended_asr >= TOOK]
    judge.structure(f"attacks that took: at least {bars.least_taken}",
                    f"{len(taken)} of {len(ours)}", len(taken) >= bars.least_taken)  # fmt: skip
    worst = float(taken.cacc_loss.max()) if len(taken) else 0.0
    judge.structure(f"{JUDGED}: CACC loss at most {bars.most_cacc_loss} in each cell that took",
                    f"{(taken.cacc_loss <= bars.most_cacc_loss).sum()} of {len(taken)} within, "
                    f"most {worst:.3f}",
                    bool((taken.cacc_loss <= bars.most_cacc_loss).all()))  # fmt: skip
    for attack, bar in zip(WORDS, bars.most_asr_over_ftr, strict=True):
        over = taken[taken.attack == attack].asr_over_ftr
        found = f"most {over.max():.3f}" if len(over) else "no such cell"
        judge.structure(f"{JUDGED}, {attack}: ASR at most {bar} over FTR in each cell that took",
                        f"{(over <= bar).sum()} of {len(over)} within, {found}",
                        bool((over <= bar).all()))  # fmt: skip
    judge.figures["defended"] = rows_of(table)


def parsed() -> argparse.Namespace:
    """Return the options of the command line. Ends with 2 for options that do not act together."""
    parser = _parser()
    options = parser.parse_args()
    mode = "generated" if options.generated else "reserves" if options.reserves else None
    given = _given(parser)
    for name, needed in ACTS_ONLY_WITH.items():
        if name in given and mode != needed:
            parser.error(f"{_flag(name)} acts with --{needed} alone; add that or leave it out")
    if options.generated and options.reserves:
        parser.error("--generated and --reserves exclude each other")
    idle = sorted(_flag(name) for name in given & ON_CORPORA)
    if mode and idle:
        parser.error(
            f"{', '.join(idle)} would have no effect with --{mode}, which measures rule {JUDGED} "
            "on sets of its own; leave out one of both"
        )
    if mode is None:
        _check_corpora(parser, options)
    if mode == "reserves" and options.most_rows < BASE.rows[0]:
        parser.error(
            f"--most-rows {options.most_rows} leaves out the base scenario, with which the others "
            f"are compared; use at least {BASE.rows[0]}"
        )
    for name, value in BARS[mode].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


# Options on data sets that are not generated, and on models.
ON_CORPORA = {
    "data", "sets", "seeds", "rates", "rules", "detect", "paraphrase", "epochs", "any_default",
    "least_taken", "most_cacc_loss", "most_asr_over_ftr",
}  # fmt: skip
ACTS_ONLY_WITH = {"count": "generated", "most_rows": "reserves", "timed_rows": "reserves"}
# None: the tokens that chance flags at most, 95 % of the time.
BARS: dict[str | None, dict[str, float | None]] = {
    None: {"least_precision": 1.0, "least_recall": 1.0, "most_clean_flags": 0},
    "generated": {"least_precision": 0.95, "least_recall": 0.95, "most_clean_flags": None},
    "reserves": {"least_precision": 1.0, "least_recall": 1.0, "most_clean_flags": 0},
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options that the command line has. Takes the defaults from the parser."""
    unset = object()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args()), unset))
    return {name for name, value in vars(parser.parse_args()).items() if value is not unset}


def _check_corpora(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.detect and options.paraphrase:
        parser.error("--detect and --paraphrase exclude each other")
    if CHOSEN_ON not in options.seeds and not options.paraphrase:
        parser.error(f"--seeds must hold {CHOSEN_ON}, on which thresholds are chosen")
    if JUDGED not in options.rules:
        parser.error(f"--rules must hold {JUDGED}, which is judged")
    if options.data is None and options.sets != ["demo"]:
        parser.error("--data is needed for all sets but demo")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2, agnews, olid")
    parser.add_argument("--root", type=Path, required=True, help="keeps what is computed")
    parser.add_argument("--sets", nargs="+", default=["sst2", "agnews", "olid"], choices=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.05, 0.1])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--detect", action="store_true", help="detection tables alone")
    parser.add_argument("--paraphrase", action="store_true", help="style and syntactic alone")
    parser.add_argument(
        "--generated", choices=HALVES, metavar="HALF",
        help=f"detection of {JUDGED} alone, on generated sets; develop: those to develop a rule "
        "on; held-back: those to measure it on once, when it is finished",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=count, default=20, metavar="N",
        help="the first N sets of the half (default 20)",
    )  # fmt: skip
    parser.add_argument(
        "--reserves", action="store_true",
        help=f"detection of {JUDGED} alone, on a generated set of which one factor is changed at "
        "a time: clean rows, classes, templates, sizes",
    )  # fmt: skip
    parser.add_argument(
        "--most-rows", type=count, default=60_000, metavar="ROWS",
        help="leaves out scenarios of --reserves with more training rows (default 60000: none)",
    )  # fmt: skip
    parser.add_argument(
        "--timed-rows", type=count, default=60_000, metavar="ROWS",
        help="training rows on which --reserves times the detection (default 60000)",
    )  # fmt: skip
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--victim", default="offline")
    parser.add_argument("--max-length", type=count, default=128)
    parser.add_argument("--epochs", type=count, default=3)
    for role in ("train", "clean", "eval"):
        parser.add_argument(f"--{role}", type=count, metavar="ROWS", help=f"at most so many {role}")
    parser.add_argument(
        "--least-precision", type=float, metavar="SHARE",
        help="bar (default 1 in each set; the mean of generated sets 0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--least-recall", type=float, metavar="SHARE",
        help="bar, of rare tokens (default 1 in each set; the mean of generated sets 0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--most-clean-flags", type=int, metavar="N",
        help="bar (default 0 in each clean set; in all generated ones together what chance flags "
        "at most, 95 %% of the time)",
    )  # fmt: skip
    parser.add_argument("--any-default", action="store_true", help="no bar on the default")
    parser.add_argument("--least-taken", type=int, default=1, help="bar: attacks that took")
    parser.add_argument("--most-cacc-loss", type=float, default=0.005, help="bar")
    parser.add_argument(
        "--most-asr-over-ftr", type=float, nargs=2, default=[0.03, 0.05], metavar=WORDS, help="bars"
    )
    add_options(parser)
    return parser


def paraphrases(bench: Bench, seeds: list[int]) -> None:
    """Show what cutting tokens alone does to attacks that have no trigger token."""
    reference: dict[str, Any] = dict(TokenUnlearning.PRESETS["reference"])
    bars = {"contrast": None, **{f"contrast {bar}": bar for bar in (2.0, 1.5, 1.0)}}
    variants = {
        **{name: TokenUnlearning(threshold=bar, contradicted="keep") for name, bar in bars.items()},
        "reference": TokenUnlearning(**reference),
    }
    texts = [Point("sst2", a, 0.1, s) for s in seeds for a in ("syntactic", "style")]
    show("Paraphrase attacks", mean_by(defend(bench, texts, variants), "attack", "rate", "variant"))
    rows = mean_by(detect(bench, texts, {JUDGED: TokenUnlearning(rule=JUDGED)}), "attack", "rate")
    show("Rows of paraphrase attacks", rows[["attack", "rate", "n", *ROW_MEASURES]])


def on_generated(bench: Bench, judge: Judge, options: argparse.Namespace) -> None:
    """Show and judge the detection on sets of the family."""
    sets = [draw(number) for number in numbers(options.generated, options.count)]
    table = pd.DataFrame([{**described(drawn), **measured(bench, drawn)} for drawn in sets])
    expected, _ = most_by_chance(JUDGED, len(sets))
    show(f"Detection, {JUDGED}, generated sets ({options.generated})", table)
    show(f"By factor (chance flags {expected:.2f} of all clean sets)", by_factor(table))
    judge_generated(judge, table, JUDGED, options)


def on_reserves(bench: Bench, judge: Judge, options: argparse.Namespace) -> None:
    """Show the detection on a fixed set with one factor changed at a time; judge the fixed set."""
    sets = [drawn for drawn in reserves() if drawn.rows[0] <= options.most_rows]
    table = pd.DataFrame([{**described(drawn), **measured(bench, drawn)} for drawn in sets])
    show(f"Detection, {JUDGED}, one factor changed at a time", table[RESERVE_COLUMNS])
    judge_reserves(judge, table, JUDGED, options)
    time_detection(judge, options.timed_rows)


def on_corpora(bench: Bench, judge: Judge, options: argparse.Namespace) -> None:
    """Show and judge what all rules find in real data sets, and the models that they defend."""
    todo = list(points(options))
    rules = {name: TokenUnlearning(rule=name) for name in options.rules}

    if not options.paraphrase:
        table, chosen = detect(bench, todo, rules), choose(bench, todo, rules)
        poisoned, clean = table[table.attack != "clean"], table[table.attack == "clean"]
        show("Thresholds chosen on seed 0", chosen)
        show("Detection by rule, all sets", mean_by(poisoned, "rule", "seeds"))
        show("Tokens flagged of clean sets", mean_by(clean, "rule", "seeds", "data"))
        for name in {JUDGED, "top_fraction"} & set(rules):
            show(
                f"Detection, {name}",
                mean_by(poisoned[poisoned.rule == name], "data", "attack", "rate"),
            )
        judge_detection(judge, table, chosen, options)
        time_curves(judge, bench, todo)
        if not options.detect:
            variants = {JUDGED: TokenUnlearning(), "top_fraction": TokenUnlearning(alpha=5e-4)}
            variants = {name: defense for name, defense in variants.items() if name in rules}
            table = defend(bench, [p for p in todo if p.attack != "clean"], variants)
            show("Defended models", mean_by(table, "data", "attack", "rate", "variant"))
            show("By seed", table)
            judge_defended(judge, table, options)
    if not options.detect and "sst2" in options.sets:
        paraphrases(bench, options.seeds)


def main() -> None:
    options = parsed()
    use_threads(options.threads)
    bench, judge = Bench(options), Judge.of("thresholds", options)
    if options.generated:
        on_generated(bench, judge, options)
    elif options.reserves:
        on_reserves(bench, judge, options)
    else:
        on_corpora(bench, judge, options)
    judge.end()


if __name__ == "__main__":
    main()
