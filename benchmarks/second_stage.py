"""What BTU's second stage finds, and what it does to paraphrase attacks and to clean data.

    python benchmarks/second_stage.py --data FOLDER --root WORK            # defended models
    python benchmarks/second_stage.py --data FOLDER --root WORK --gate     # the rows alone
    python benchmarks/second_stage.py --data FOLDER --root WORK --gate \
        --points sst2:badnets:0.1 agnews:clean:0 olid:clean:0

FOLDER holds sst2, agnews and olid (docs/data.md). A point is DATA:ATTACK:RATE; ATTACK is `clean`,
the name of an attack, or `style=COLUMN` for another column of paraphrases. MiniLM-L6, dirty label.
The default points are style and syntactic at 10 % and the clean set of SST-2, seeds 0 and 1: the
stage was developed on them.

Bars, of the mean over the seeds: style has an ASR of at most 0.25 at a CACC at most 0.010 below the
clean-tuned model's; syntactic 0.40 and 0.015; clean data cost at most 0.003. The gate opens at
style and syntactic and names the target, and stays shut on clean data and with triggers made of
words, which the first stage finds.

``--gate`` trains the two models of the clean rows and the exposure, but no poisoned model. One
point of SST-2 takes 8 minutes of one core with ``--gate``, and 20 without. What is computed stays
in WORK: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from figures import Judge, add_options, count
from thresholds import TARGETS, WORDS, Bench, Point, show

from btu.attacks.poisoning import ATTACKS
from btu.defenses.kit.contradiction import CONTRADICTED, relabel_config, relabeled_rows
from btu.defenses.token_unlearning import TokenUnlearning
from btu.metrics import row_detection
from btu.stages import StageRun
from btu.training import use_threads

# The highest ASR, and the highest loss of CACC against the clean-tuned model, by attack.
MOST = {"style": (0.25, 0.010), "syntactic": (0.40, 0.015), "clean": (1.0, 0.003)}
POINTS = ["sst2:style:0.1", "sst2:syntactic:0.1", "sst2:clean:0"]


def parsed(text: str) -> tuple[str, str, float]:
    """Return data set, attack and rate of a point on the command line."""
    parts = text.split(":")
    known = ("clean", *ATTACKS)
    if (
        len(parts) != 3
        or parts[0] not in TARGETS
        or parts[1].partition("=")[0] not in known
        or not re.fullmatch(r"0|0?\.\d*[1-9]\d*", parts[2])
        or (parts[1] == "clean") != (parts[2] == "0")
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be DATA:ATTACK:RATE with one of {', '.join(TARGETS)}, one of "
            f"{', '.join(known)}, and a rate below 1; clean, and nothing else, has the rate 0"
        )
    return parts[0], parts[1], float(parts[2])


def found(bench: Bench, point: Point) -> dict[str, object]:
    """Return what the second stage finds in a training set, without a poisoned model."""
    defense = TokenUnlearning()
    base = bench.prepared(point).foundation
    flagged = bench.suspects(point, defense).tokens
    second = defense.second_stage(base)
    run = StageRun(
        {"seed": point.seed, **relabel_config(base, second)},
        base.where,
        {
            "rows": bench.run(base.rows),
            "clean": bench.run(base.clean),
            CONTRADICTED: bench.run(second[CONTRADICTED]),
        },
        bench.root,
        torch.device("cpu"),
    )
    relabeled = relabeled_rows(run, flagged)
    assert relabeled is not None
    mask = bench.mask(point)
    taken = np.zeros(len(mask), dtype=bool)
    taken[relabeled.rows] = True
    score = row_detection(taken, mask)
    return {
        "data": point.data,
        "attack": point.attack,
        "rate": point.rate,
        "seed": point.seed,
        "flagged": len(flagged),
        "contradiction": relabeled.margin,
        "relabeled": len(relabeled.rows),
        "target": relabeled.label,
        "precision": score.precision,
        "recall": score.recall,
    }


def defended(bench: Bench, point: Point) -> dict[str, float]:
    """Return the scores of the models without a defense, with clean tuning, and defended."""
    base = bench.prepared(point).foundation
    stage = TokenUnlearning().stages(base)
    bench.run(stage)
    undefended, tuned, after = (
        bench.scores(point, model, name)
        for model, name in (
            (base.model, "undefended"),
            (base.tuned, "tuned"),
            (stage, "defended"),
        )
    )
    return {
        "undefended_asr": undefended["asr"],
        "tuned_asr": tuned["asr"],
        "tuned_cacc": tuned["cacc"],
        "asr": after["asr"],
        "cacc": after["cacc"],
        "cacc_loss": tuned["cacc"] - after["cacc"],
    }


def judge_gate(judge: Judge, table: pd.DataFrame) -> None:
    """Judge at which points the gate opens, and whether it names the target."""
    for (data, attack), rows in table.groupby(["data", "attack"], sort=False):
        margins = ", ".join(f"{margin:.1f}" for margin in rows["contradiction"])
        counts = ", ".join(map(str, rows["relabeled"]))
        said = f"contradiction {margins}; relabelled {counts}"
        if attack == "clean" or attack in WORDS:
            shut = bool((rows["relabeled"] == 0).all())
            judge.structure(f"{data}, {attack}: nothing is relabelled", said, shut)
        else:
            target = bool((rows["relabeled"] > 0).all())
            if isinstance(TARGETS[str(data)], int):
                target = target and bool((rows["target"] == TARGETS[str(data)]).all())
            judge.structure(f"{data}, {attack}: the target class is found", said, target)


def judge_models(judge: Judge, table: pd.DataFrame) -> None:
    """Judge ASR and CACC of the defended models, means over the seeds."""
    for (data, attack), rows in table.groupby(["data", "attack"], sort=False):
        asr, loss = MOST.get(str(attack).partition("=")[0], (1.0, MOST["clean"][1]))
        mean = rows[["asr", "cacc_loss"]].mean()
        judge.structure(
            f"{data}, {attack}: CACC at most {loss:.3f} below clean tuning",
            f"{mean['cacc_loss']:.4f}",
            bool(mean["cacc_loss"] <= loss),
        )
        if asr < 1:
            judge.structure(
                f"{data}, {attack}: ASR at most {asr:.2f}",
                f"{mean['asr']:.3f}",
                bool(mean["asr"] <= asr),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2, agnews, olid")
    parser.add_argument("--root", type=Path, required=True, help="keeps what is computed")
    parser.add_argument("--points", nargs="+", type=parsed, default=[parsed(p) for p in POINTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--gate", action="store_true", help="no defended models")
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--victim", default="offline")
    parser.add_argument("--max-length", type=count, default=128)
    parser.add_argument("--epochs", type=count, default=3)
    for option in ("--train", "--clean", "--eval"):
        help_text = f"at most so many rows of {option[2:]}"
        parser.add_argument(option, type=count, metavar="ROWS", help=help_text)
    add_options(parser)
    options = parser.parse_args()
    if options.data is None and any(data != "demo" for data, _, _ in options.points):
        parser.error("--data is needed for all points but those of demo")
    use_threads(options.threads)
    judge, bench = Judge.of("second_stage", options), Bench(options)
    table = pd.DataFrame()
    for data, attack, rate in options.points:
        for seed in options.seeds:
            point = Point(data, attack, rate, seed)
            row = found(bench, point)
            if not options.gate:
                row |= defended(bench, point)
            table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    show("The second stage", table)
    judge.figures["points"] = table.astype(object).where(table.notna(), None).to_dict("records")
    judge_gate(judge, table)
    if not options.gate:
        judge_models(judge, table)
    judge.end()


if __name__ == "__main__":
    main()
