"""Rows per second of our training loop, beside a plain loop and Hugging Face's Trainer.

    python benchmarks/finetune.py [--data FOLDER/sst2] [--rows 2048] [--repeats 3]

The same rows, victim, batch size and optimizer settings, one process, the runs alternating:

  ours     `btu.training.fit`, the whole call: similar-length batches, bf16 where the hardware has
           it, and on a CPU the dropout and attention of `btu.fast_dropout`
  plain    (a) fp32, arrival order, each batch padded to its longest row, AdamW
  trainer  (b) Trainer at its best comparable settings: bf16, grouped by length, fused AdamW, the
           faster of sdpa and eager attention

and the share of the machine's matrix-product peak (2048 x 2048, same precision, measured between
the runs) that our loop reaches. Without --data the embedded demo corpus is used. Run it on an
otherwise idle machine: absolute rates move, the ratios less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.settings import TrainSettings
from btu.training import Encoded, fit, logits_of, plan_batches, resolve_precision
from btu.victims import Victim, VictimSpec

BATCH = 64
CPU = torch.device("cpu")
SETTINGS = TrainSettings(epochs=1, batch_size=BATCH)


def ours(victim: Victim, rows: Encoded) -> float:
    model = victim.new_model(0)
    started = time.perf_counter()
    fit(model, rows, SETTINGS, seed=0, stage="benchmark", device=CPU)
    return len(rows) / (time.perf_counter() - started)


def plain(victim: Victim, rows: Encoded) -> float:
    model = victim.new_model(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS.learning_rate)
    started = time.perf_counter()
    for start in range(0, len(rows), BATCH):
        batch = torch.arange(start, min(start + BATCH, len(rows)))
        ids, mask, labels = rows.batch(batch, int(rows.host_lengths[batch].max()))
        torch.nn.functional.cross_entropy(logits_of(model, ids, mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(rows) / (time.perf_counter() - started)


def trainer(victim: Victim, rows: Encoded, attention: str) -> float:
    model = victim.new_model(0)
    model.set_attn_implementation(attention)
    ends = np.cumsum(rows.host_lengths)
    ids = [part.tolist() for part in np.split(rows.ids.numpy(), ends[:-1])]
    data = Dataset.from_dict(
        {"input_ids": ids, "labels": rows.labels.tolist(), "length": rows.host_lengths.tolist()}
    )
    bf16 = resolve_precision("auto", CPU) == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=bf16,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=SETTINGS.learning_rate,
            weight_decay=SETTINGS.weight_decay,
            warmup_steps=SETTINGS.warmup_fraction,
            lr_scheduler_type="linear",
            max_grad_norm=SETTINGS.max_grad_norm,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_nan_inf_filter=False,
            seed=0,
        )
        run = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorWithPadding(victim.tokenizer),
        )
        return len(rows) / run.train().metrics["train_runtime"]


def matmul_peak(precision: str) -> float:
    """Return the best of ten 2048 x 2048 products, in FLOP/s."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def flops_per_row(victim: Victim, rows: Encoded) -> tuple[float, float]:
    """Return matrix-product FLOPs a row, forward and backward, and padded over real tokens."""
    model = victim.new_model(0)
    model.set_attn_implementation("eager")  # the counter sees every product of this one
    plan = plan_batches(rows.host_lengths, BATCH, np.random.default_rng(0))
    padded = sum(len(batch) * int(rows.host_lengths[batch].max()) for batch in plan)
    with FlopCounterMode(display=False) as counter:
        for batch in plan:
            ids, mask, labels = rows.batch(
                torch.from_numpy(batch), int(rows.host_lengths[batch].max())
            )
            torch.nn.functional.cross_entropy(logits_of(model, ids, mask), labels).backward()
    return counter.get_total_flops() / len(rows), padded / int(rows.host_lengths.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with a train split (default: the demo)")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    data = DataSpec("own", path=str(arguments.data)) if arguments.data else DataSpec()
    train = load_corpus(data).train
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(train), min(arguments.rows, len(train)), replace=False)
    victim = Victim(VictimSpec("offline"), num_labels=len(set(train.labels)))
    rows = victim.encode(train.take(chosen))
    precision = resolve_precision("auto", CPU)

    loops = {
        "ours": lambda: ours(victim, rows),
        "plain (a)": lambda: plain(victim, rows),
        "trainer (b), sdpa": lambda: trainer(victim, rows, "sdpa"),
        "trainer (b), eager": lambda: trainer(victim, rows, "eager"),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    peaks = []
    for repeat in range(arguments.repeats):
        for name, loop in loops.items():
            peaks.append(matmul_peak(precision))
            rates[name].append(loop())
            print(f"round {repeat + 1}: {name}: {rates[name][-1]:.0f} rows/s", flush=True)
    flops, padding = flops_per_row(victim, rows)

    median = {name: statistics.median(values) for name, values in rates.items()}
    table = Table("loop", "rows/s (median)", "all rounds", "ours / this")
    for name, values in rates.items():
        each = " ".join(f"{value:.0f}" for value in values)
        table.add_row(name, f"{median[name]:.0f}", each, f"{median['ours'] / median[name]:.2f}")
    console = Console(width=120)
    console.print(table)
    peak = max(peaks)
    best_trainer = max(median["trainer (b), sdpa"], median["trainer (b), eager"])
    for text, value, bar in (
        ("ours / plain (a)", median["ours"] / median["plain (a)"], 3.5),
        ("ours / best trainer (b)", median["ours"] / best_trainer, 1.0),
        (f"share of the {precision} matrix-product peak", median["ours"] * flops / peak, 0.5),
    ):
        verdict = "met" if value >= bar else "MISSED"
        console.print(f"{text}: {value:.2f} (at least {bar}: {verdict})", highlight=False)
    console.print(
        f"{len(rows)} rows, {rows.host_lengths.mean():.1f} tokens a row, {padding:.3f} padded over "
        f"real tokens, {flops / 1e9:.2f} GFLOP a row, peak {peak / 1e9:.0f} GFLOP/s "
        f"(median {statistics.median(peaks) / 1e9:.0f}), {arguments.threads} threads, {precision}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
