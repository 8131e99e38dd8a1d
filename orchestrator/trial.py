"""One trial, in the paper's order: poison, fine-tune, defend, evaluate. No Ray, no MLflow."""

from __future__ import annotations

import copy
import dataclasses
import platform
import socket
import subprocess
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
import yaml

import btu
from btu.data import load_corpus
from btu.defense import DefenseContext, DefenseOutcome
from btu.errors import UserError
from btu.evaluation import EvalSet, evaluate
from btu.metrics import average_precision, row_detection, token_detection
from btu.poisoning import poison, triggered_eval
from btu.seeding import derive_seed
from btu.training import NonFiniteLossError, choose_device, fit, resolve_precision
from btu.types import PoisonedSet, ProgressCallback, Rows, silent
from btu.victims import Victim
from orchestrator import plots
from orchestrator.config import TrialSpec
from orchestrator.store import CONFIG, FLAGGED, PLOT, TOKENS, ResultStore


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured.

    metrics: see `btu.metrics.METRICS`, and ``seconds/<stage>``. history: one entry per stage and
    epoch. tokens: a row per vocabulary id that occurs or was flagged: drift by round, score,
    whether flagged, whether part of the trigger. notes: rows by role, and what loading did to them.
    """

    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    tokens: pd.DataFrame
    notes: Mapping[str, int]
    tags: Mapping[str, str]

    def flagged_table(self) -> pd.DataFrame:
        """Return the flagged tokens, most suspicious first."""
        flagged = self.tokens[self.tokens.flagged]
        return flagged.sort_values(["score", "token_id"], ascending=[False, True])

    def write_files(self, folder: Path) -> None:
        """Write everything but the record into `folder`."""
        (folder / CONFIG).write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
        self.tokens.to_parquet(folder / TOKENS, index=False)
        self.flagged_table().to_json(folder / FLAGGED, orient="records", indent=1)
        plots.drift_plot(self.tokens, folder / PLOT)


def run_trial(spec: TrialSpec, progress: ProgressCallback = silent) -> TrialResult:
    """Run one cell in this process.

    Raises:
        UserError: the cell cannot run as asked.
        NonFiniteLossError: training diverged.
    """
    started = time.perf_counter()
    device = choose_device(spec.resources.gpu)
    torch.set_num_threads(max(1, int(spec.resources.cpu)))

    corpus = load_corpus(spec.data)
    victim = Victim(spec.victim, num_labels=len(corpus.label_names))
    attack, defense = spec.build_attack(), spec.build_defense()
    defense.check(len(victim.tokenizer))
    target = corpus.label_index(spec.poison.target_label)

    poisoned = poison(attack, spec.poison, corpus.train, target, spec.seed, progress)
    triggered, plain = triggered_eval(attack, corpus.eval, target, spec.seed, progress)
    trigger_ids = attack.trigger_token_ids(victim.tokenizer)
    train = victim.encode(poisoned.rows)
    eval_set = EvalSet(
        victim.encode(corpus.eval), victim.encode(triggered), victim.encode(plain), target
    )

    undefended = victim.new_model(derive_seed(spec.seed, "classifier"))
    context = DefenseContext(
        victim=victim,
        train_rows=Rows(poisoned.rows.texts, poisoned.rows.labels),
        train=train,
        clean=victim.encode(corpus.clean),
        model=undefended,
        settings=spec.train,
        tuning=spec.tuning,
        seed=spec.seed,
        device=device,
        progress=progress,
    )
    with context.timed("poisoned fine-tune"):
        context.history += fit(
            undefended,
            train,
            spec.train,
            seed=derive_seed(spec.seed, "fine-tune"),
            stage="poisoned fine-tune",
            device=device,
            progress=progress,
        )
    outcome = defense.defend(context)
    tuned = copy.deepcopy(undefended)
    context.clean_tune(tuned, "clean tuning (control)")

    metrics: dict[str, float] = {}
    with context.timed("evaluate"):
        models = [("", outcome.model), ("undefended_", undefended), ("tuned_", tuned)]
        for prefix, model in models:
            scores = evaluate(model, eval_set, precision=spec.train.precision, device=device)
            metrics |= scores.as_metrics(prefix)
    metrics |= detection_metrics(outcome, poisoned, trigger_ids, context)
    metrics |= {
        "poison_rate_reached": poisoned.poison_rate,
        "poisoned_rows": int(poisoned.mask.sum()),
        "relabeled_rows": poisoned.relabeled,
        "train_rows": len(poisoned.rows),
        "clean_rows": len(corpus.clean),
        "truncated_rows": int((train.host_lengths >= spec.victim.max_length).sum()),
    }
    metrics |= {f"seconds/{stage}": seconds for stage, seconds in context.seconds.items()}
    metrics["seconds"] = time.perf_counter() - started
    return TrialResult(
        spec.config(),
        metrics,
        tuple(dataclasses.asdict(epoch) for epoch in context.history),
        token_table(outcome, victim, trigger_ids if poisoned.mask.any() else frozenset()),
        corpus.counts(),
        environment_tags(device, resolve_precision(spec.train.precision, device)),
    )


def detection_metrics(
    outcome: DefenseOutcome,
    poisoned: PoisonedSet,
    trigger_ids: frozenset[int] | None,
    context: DefenseContext,
) -> dict[str, float]:
    """Score what the defense flagged; the only place where mask and defense meet."""
    if outcome.flagged is None:
        return {}
    # Without poisoned rows the trigger's words are ordinary words: there is nothing to find.
    truth = trigger_ids if trigger_ids is None or poisoned.mask.any() else frozenset()
    tokens = token_detection(outcome.flagged, truth)
    rows = row_detection(context.train.holds(outcome.flagged), poisoned.mask)
    found = {
        "flagged": len(outcome.flagged),
        "detection_precision": tokens.precision,
        "detection_recall": tokens.recall,
        "detection_f1": tokens.f1,
        "sample_precision": rows.precision,
        "sample_recall": rows.recall,
    }
    if outcome.token_scores is not None:
        found["detection_auprc"] = average_precision(outcome.token_scores, truth)
    return found


def token_table(
    outcome: DefenseOutcome, victim: Victim, trigger_ids: frozenset[int] | None
) -> pd.DataFrame:
    """Return what the defense knows of each candidate or flagged token, as a table."""
    flagged = list(outcome.flagged or ())
    if outcome.token_scores is None:
        ids = np.asarray(sorted(flagged), dtype=np.int64)
        scores = np.full(len(ids), np.nan)
    else:
        known = ~np.isnan(outcome.token_scores)
        known[flagged] = True
        ids = np.flatnonzero(known)
        scores = outcome.token_scores[ids]
    columns: dict[str, Any] = {
        "token_id": ids,
        "token": victim.tokenizer.convert_ids_to_tokens(ids.tolist()),
        "score": scores,
        "flagged": np.isin(ids, flagged),
        "trigger": np.isin(ids, list(trigger_ids or ())),
    }
    columns |= {name: values[ids] for name, values in outcome.token_table.items()}
    return pd.DataFrame(columns)


@cache
def code_version() -> str:
    """Return the package version and, in a checkout, the commit ("+" marks local changes)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:  # a checkout on a machine without git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return btu.__version__
    commit = git("rev-parse", "--short=12", "HEAD")
    dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{btu.__version__}+{commit}{dirty}" if commit else btu.__version__


def environment_tags(device: torch.device, precision: str) -> dict[str, str]:
    """Return what the numbers were measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "code": code_version(),
        "host": socket.gethostname(),
        "device": name,
        "precision": precision,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def run_and_store(
    spec: TrialSpec,
    key: str,
    sweep_name: str,
    varied: Mapping[str, Any],
    store: ResultStore,
    progress: ProgressCallback = silent,
) -> dict[str, Any]:
    """Run a cell and write its record, finished or failed, to disk. Returns the record.

    What went wrong inside the trial becomes a record with status ``failed``, since running it
    again would fail again. Only what keeps the record from being written escapes.
    """
    record: dict[str, Any] = {
        "key": key,
        "sweep": sweep_name,
        "varied": dict(varied),
        "config": spec.config(),
        "started": time.time(),
    }
    try:
        result = run_trial(spec, progress)
    except Exception as error:
        expected = isinstance(error, UserError | NonFiniteLossError)
        record |= {
            "status": "failed",
            "ended": time.time(),
            "reason": str(error) if expected else f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
            "tags": {"code": code_version(), "host": socket.gethostname()},
        }
        store.commit_failure(record)
        return record
    record |= {
        "status": "finished",
        "ended": time.time(),
        "metrics": dict(result.metrics),
        "history": list(result.history),
        "notes": dict(result.notes),
        "tags": dict(result.tags),
    }
    store.commit(record, result)
    return record
