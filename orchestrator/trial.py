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
from orchestrator.config import RECIPE_VERSION, TrialSpec
from orchestrator.store import CONFIG, FLAGGED, PLOT, TOKENS, ResultStore

# What another try on a fresh worker may mend. A CUDA error also leaves its process unusable.
INFRASTRUCTURE = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
FAILURE_KEYS = ("key", "recipe", "sweep", "varied", "config", "started")


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured.

    metrics: see `btu.metrics.METRICS`, and ``seconds/<stage>``. history: one entry per stage and
    epoch. tokens: a row per vocabulary id that occurs or was flagged: drift by round, score,
    whether flagged, whether part of the trigger. notes: rows by role, and what loading did to
    them. label_names: the original label values by class index. tags: what it was measured with.
    """

    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    tokens: pd.DataFrame
    notes: Mapping[str, int]
    label_names: tuple[str, ...]
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
    undefended = victim.new_model(derive_seed(spec.seed, "classifier"))
    defense.check(len(undefended.get_input_embeddings().weight))
    target = corpus.label_index(spec.poison.target_label)

    poisoned = poison(attack, spec.poison, corpus.train, target, spec.seed, progress)
    triggered, plain = triggered_eval(attack, corpus.eval, target, spec.seed, progress)
    trigger_ids = attack.trigger_token_ids(victim.tokenizer)
    train = victim.encode(poisoned.rows)
    eval_set = EvalSet(
        victim.encode(corpus.eval), victim.encode(triggered), victim.encode(plain), target
    )

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
        "truncated_rows": int((train.host_lengths >= spec.victim.max_length).sum()),
    }
    if trigger_ids is not None:
        # A trigger beyond max_length is not there for the victim: say so beside the numbers.
        cut = poisoned.mask & ~train.holds(list(trigger_ids))
        metrics["triggers_cut_train"] = int(cut.sum())
        metrics["triggers_cut_eval"] = int((~eval_set.triggered.holds(list(trigger_ids))).sum())
    metrics |= {f"seconds/{stage}": seconds for stage, seconds in context.seconds.items()}
    metrics["seconds"] = time.perf_counter() - started
    return TrialResult(
        spec.config(),
        metrics,
        tuple(dataclasses.asdict(epoch) for epoch in context.history),
        token_table(outcome, victim, trigger_ids if poisoned.mask.any() else frozenset()),
        corpus.counts(),
        corpus.label_names,
        {
            **environment_tags(device, resolve_precision(spec.train.precision, device)),
            "data": corpus.fingerprint()[:12],
            "victim": victim.source.identity[:60],
            "labels": " ".join(corpus.label_names),
        },
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
        **tokens.as_metrics("detection"),
        **rows.as_metrics("sample"),
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

    An error of the trial itself becomes a record with status ``failed``, since running it again
    would fail again. Errors of memory, devices and disks escape: a fresh worker may do better.
    """
    record: dict[str, Any] = {
        "key": key,
        "recipe": RECIPE_VERSION,
        "sweep": sweep_name,
        "varied": dict(varied),
        "config": spec.config(),
        "started": time.time(),
    }
    try:
        result = run_trial(spec, progress)
        record |= {
            "status": "finished",
            "ended": time.time(),
            "metrics": dict(result.metrics),
            "history": list(result.history),
            "notes": dict(result.notes),
            "label_names": list(result.label_names),
            "tags": dict(result.tags),
        }
        store.commit(record, result)
    except INFRASTRUCTURE:
        raise
    except Exception as error:
        expected = isinstance(error, UserError | NonFiniteLossError)
        failure = {key: record[key] for key in FAILURE_KEYS} | {
            "status": "failed",
            "ended": time.time(),
            "reason": str(error) if expected else f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
            "tags": failure_tags(spec),
        }
        store.commit_failure(failure)
        return failure
    return record


def failure_tags(spec: TrialSpec) -> dict[str, str]:
    """Return what is known of where a cell failed."""
    device = "cuda" if spec.resources.gpu > 0 else "cpu"
    return {"code": code_version(), "host": socket.gethostname(), "device": device}
