"""The training loop of all stages, and prediction."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from btu.errors import UserError
from btu.fast_dropout import fast_dropout
from btu.settings import TrainSettings
from btu.types import IntArray, Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim.lr_scheduler import LambdaLR

# Rows are shuffled, then sorted by length within chunks of this many batches: there is almost no
# padding, and batches still differ between epochs.
CHUNK_BATCHES = 32
PREDICT_BATCH = 128
# Reading the loss waits for the device; doing so at every step would keep a GPU from running ahead.
FINITE_CHECK_STEPS = 50
# Seconds between progress reports within an epoch.
REPORT_SECONDS = 10.0
# Threads that may be asked for: more only wait, and with too many torch ends the process.
THREADS_PER_CPU = 16


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss, or a weight after the last step, is NaN or infinite.

    The message names stage, step and settings.
    """


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows, ragged and resident on one device.

    ids: (tokens,) the token ids of all rows, concatenated.
    starts: (rows,) where the ids of each row start.
    lengths: (rows,) the number of ids of each row.
    labels: (rows,) class indices.
    host_lengths: `lengths` on the host, where batches are planned.
    pad_id: the id that batches are padded with.

    One flat tensor instead of padded rows: a batch of any width is one gather on the device, so
    that no epoch copies rows from the host.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    host_lengths: IntArray
    pad_id: int

    @classmethod
    def from_lists(
        cls, rows: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int
    ) -> Encoded:
        """Build from token id lists, on the CPU."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=lengths.sum())
        starts = np.cumsum(lengths) - lengths
        return cls(
            torch.from_numpy(flat),
            torch.from_numpy(starts),
            torch.from_numpy(lengths),
            torch.tensor(list(labels), dtype=torch.int64),
            lengths,
            pad_id,
        )

    def __len__(self) -> int:
        return len(self.host_lengths)

    def save(self, path: Path) -> None:
        """Write the rows as safetensors; ids take 32 bits there."""
        from safetensors.torch import save_file

        save_file(
            {
                "ids": self.ids.cpu().to(torch.int32),
                "lengths": self.lengths.cpu(),
                "labels": self.labels.cpu(),
                "pad_id": torch.tensor([self.pad_id]),
            },
            path,
        )

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Read what `save` wrote, to the CPU."""
        from safetensors.torch import load_file

        stored = load_file(path)
        lengths = stored["lengths"]
        return cls(
            stored["ids"].to(torch.int64),
            torch.cumsum(lengths, 0) - lengths,
            lengths,
            stored["labels"],
            lengths.numpy(),
            int(stored["pad_id"]),
        )

    def to(self, device: torch.device) -> Encoded:
        """Return the rows on `device`."""
        return Encoded(
            self.ids.to(device),
            self.starts.to(device),
            self.lengths.to(device),
            self.labels.to(device),
            self.host_lengths,
            self.pad_id,
        )

    def take(self, rows: IntArray) -> Encoded:
        """Return the rows at indices `rows`, in that order, on the CPU."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        lengths = self.lengths.cpu()[index]
        starts = torch.cumsum(lengths, 0) - lengths
        # Only the ids of these rows, concatenated: counting and finding tokens read all of `ids`.
        shift = torch.repeat_interleave(self.starts.cpu()[index] - starts, lengths)
        return Encoded(
            self.ids.cpu()[torch.arange(len(shift)) + shift],
            starts,
            lengths,
            self.labels.cpu()[index],
            lengths.numpy(),
            self.pad_id,
        )

    def joined(self, others: Encoded) -> Encoded:
        """Return these rows, then `others`, on the CPU."""
        both = (self, others)
        lengths = torch.cat([rows.lengths.cpu() for rows in both])
        return Encoded(
            # Only the ids of the rows themselves, in their order, as `take` returns them.
            torch.cat([rows.take(np.arange(len(rows))).ids for rows in both]),
            torch.cumsum(lengths, 0) - lengths,
            lengths,
            torch.cat([rows.labels.cpu() for rows in both]),
            lengths.numpy(),
            self.pad_id,
        )

    def relabeled(self, labels: IntArray) -> Encoded:
        """Return the rows with other labels. labels: (rows,) class indices."""
        new = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        return replace(self, labels=new.to(self.labels.device))

    def without(self, token_ids: Sequence[int]) -> Encoded:
        """Return the rows with every occurrence of `token_ids` removed."""
        keep = ~torch.isin(self.ids, torch.tensor(list(token_ids), dtype=torch.int64))
        row_of = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        lengths = torch.bincount(row_of[keep], minlength=len(self))
        starts = torch.cumsum(lengths, 0) - lengths
        return Encoded(self.ids[keep], starts, lengths, self.labels, lengths.numpy(), self.pad_id)

    def counts(self, vocabulary: int) -> IntArray:
        """Return how often each token id occurs: (vocabulary,)."""
        counted: IntArray = torch.bincount(self.ids, minlength=vocabulary).cpu().numpy()
        return counted

    def holds(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return a (rows,) mask of the rows that contain any of `token_ids`."""
        hit = torch.isin(self.ids.cpu(), torch.tensor(list(token_ids), dtype=torch.int64))
        row_of = torch.repeat_interleave(torch.arange(len(self)), self.lengths.cpu())
        return (torch.bincount(row_of[hit], minlength=len(self)) > 0).numpy()

    def batch(self, indices: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, mask, labels) of rows `indices`: (batch, width) twice, and (batch,)."""
        columns = torch.arange(width, device=self.ids.device)
        mask = columns < self.lengths[indices, None]
        if len(self.ids) == 0:  # all tokens of all rows were removed
            return torch.full_like(mask, self.pad_id, dtype=torch.int64), mask, self.labels[indices]
        positions = (self.starts[indices, None] + columns).clamp_(max=len(self.ids) - 1)
        ids = torch.where(mask, self.ids[positions], self.pad_id)
        return ids, mask, self.labels[indices]


def choose_device(gpus: float) -> torch.device:
    """Return CUDA if `gpus` is above 0, else the CPU.

    Raises:
        UserError: `gpus` is above 0 and no CUDA device is visible.
    """
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"resources.gpu is {gpus} but no CUDA device is visible; install a CUDA build of "
            "torch, free a device, or set resources.gpu=0."
        )
    return torch.device("cuda")


def use_threads(cpus: float) -> None:
    """Let torch compute with `cpus` threads, at least one.

    Sums depend on how they are divided among threads: the number affects results.

    Raises:
        UserError: more threads than this machine can start; torch would end the process.
    """
    count = os.cpu_count() or 1
    if cpus > THREADS_PER_CPU * count:
        raise UserError(
            f"{cpus:.15g} threads are too many for this machine with {count} CPUs: it computes "
            f"with {THREADS_PER_CPU * count} at most. Lower --cpus or resources.cpu."
        )
    torch.set_num_threads(max(1, int(cpus)))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``; ``auto`` is bf16 if the hardware is faster with it.

    Among CPUs, those with AMX are. With AVX-512 alone, which multiplies bf16 too, a fine-tune of
    MiniLM takes 1.3 times as long as in fp32 (measured).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def plan_batches(lengths: IntArray, batch_size: int, rng: np.random.Generator) -> list[IntArray]:
    """Return the epoch's batches: rows of similar length together, batches in random order."""
    order = rng.permutation(len(lengths))
    batches: list[IntArray] = []
    chunk = batch_size * CHUNK_BATCHES
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def _device_batches(
    data: Encoded, plan: list[IntArray], pad_to: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # The order of the whole epoch is copied once; slicing it on the device copies nothing.
    order = torch.from_numpy(np.concatenate(plan)).to(data.ids.device)
    start = 0
    for rows in plan:
        width = pad_to or max(1, int(data.host_lengths[rows].max()))
        yield data.batch(order[start : start + len(rows)], width)
        start += len(rows)


def _parts(plan: list[IntArray], parts: int) -> list[tuple[IntArray, float, bool]]:
    """Return the parts of each batch, at most `parts`: rows, share of its batch, whether last."""
    cut = []
    for rows in plan:
        pieces = [piece for piece in np.array_split(rows, parts) if len(piece)]
        cut += [
            (piece, len(piece) / len(rows), number == len(pieces))
            for number, piece in enumerate(pieces, 1)
        ]
    return cut


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the (batch, classes) logits, in fp32, of a Hugging Face classifier or one like it."""
    output = model(input_ids=ids, attention_mask=mask.long())
    logits: Tensor = output.logits.float()
    return logits


# (model, ids, mask, labels) -> the batch's loss, a scalar, and its (batch, classes) logits.
Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a batch, and its logits: the usual `Objective`."""
    logits = logits_of(model, ids, mask)
    return nn.functional.cross_entropy(logits, labels), logits


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch.

    stage: the name of the training.
    epoch: its number, from 1.
    loss: mean over its rows, in train mode.
    accuracy: mean over its rows, in train mode.
    seconds: its duration.
    rows: number of rows trained on.
    """

    stage: str
    epoch: int
    loss: float
    accuracy: float
    seconds: float
    rows: int


def fit(
    model: nn.Module,
    data: Encoded,
    settings: TrainSettings,
    *,
    seed: int,
    stage: str,
    device: torch.device,
    progress: ProgressCallback = silent,
    pad_to: int | None = None,
    accumulation: int = 1,
    objective: Objective = cross_entropy,
    after_step: Callable[[float], bool] | None = None,
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> list[Epoch]:
    """Train all parameters of `model` that require gradients, in place; leave it in eval mode.

    model: the model; its other parameters are left as they are.
    data: the rows.
    settings: epochs, batch size, optimizer and schedule.
    seed: draws batches and dropout; the global random state is restored afterwards.
    stage: names the training in progress, history and errors.
    device: where to compute.
    progress: called after each epoch, and every `REPORT_SECONDS` within one.
    pad_to: width of every batch; None pads each batch to its own longest row.
    accumulation: number of parts that each batch is cut into; their gradients are added up. The
        steps are the same in less memory, up to rounding and the draws of dropout.
    objective: what is minimized. If it is not a mean over rows (a loss that is bent by the value
        of its own batch), it is computed part by part where batches are cut.
    after_step: called after every step with the accuracy of its batch, in train mode; True ends
        the training.
    optimizer_of: makes an optimizer other than AdamW. It sets its own learning rate, which the
        schedule scales.

    Raises:
        NonFiniteLossError: the loss, or a weight after the last step, is NaN or infinite.
        UserError: there are no rows.
    """
    if len(data) == 0:
        raise UserError(f"stage '{stage}' has no rows to train on.")
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _adamw(parameters, settings) if optimizer_of is None else optimizer_of(parameters)
    steps_per_epoch = math.ceil(len(data) / settings.batch_size)
    training = _Training(
        model=model,
        data=data.to(device),
        settings=settings,
        stage=stage,
        device=device,
        bf16=resolve_precision(settings.precision, device) == "bf16",
        progress=progress,
        pad_to=pad_to,
        accumulation=accumulation,
        objective=objective,
        after_step=after_step,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=_schedule(optimizer, settings, steps_per_epoch * settings.epochs),
        rng=np.random.default_rng(seed),
        steps_per_epoch=steps_per_epoch,
    )
    history: list[Epoch] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), fast_dropout(model, device):
        torch.manual_seed(seed)
        for epoch in range(1, settings.epochs + 1):
            record, ended = _one_epoch(training, epoch)
            history.append(record)
            metrics = {
                "loss": record.loss,
                "accuracy": record.accuracy,
                "seconds": record.seconds,
            }
            progress(Progress(stage, epoch, settings.epochs, metrics))
            if ended:
                break
    model.eval()
    # The last loss was computed before the last step: only the weights show what that step did.
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise NonFiniteLossError(
            f"weights became NaN or infinite in stage '{stage}' at step "
            f"{steps_per_epoch * settings.epochs}, the last, with {settings}; lower the learning "
            "rate or use precision fp32."
        )
    return history


@dataclass(frozen=True)
class _Training:
    """What stays the same over all epochs of one `fit`: its arguments, resolved."""

    model: nn.Module
    data: Encoded
    settings: TrainSettings
    stage: str
    device: torch.device
    bf16: bool
    progress: ProgressCallback
    pad_to: int | None
    accumulation: int
    objective: Objective
    after_step: Callable[[float], bool] | None
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    rng: np.random.Generator
    steps_per_epoch: int

    def backward(
        self, ids: Tensor, mask: Tensor, labels: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of a part of a batch; return its loss and its correct predictions."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, logits = self.objective(self.model, ids, mask, labels)
        # A whole batch has share 1.0, which changes no bit.
        loss = loss * share
        torch.autograd.backward(loss)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def step(self) -> None:
        """Update the parameters from the gradients, and clear the gradients."""
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()


def _one_epoch(training: _Training, epoch: int) -> tuple[Epoch, bool]:
    """Train one epoch; return what it did, and whether `after_step` ended the training."""
    settings, device, data = training.settings, training.device, training.data
    started = reported = time.perf_counter()
    plan = plan_batches(data.host_lengths, settings.batch_size, training.rng)
    losses = torch.zeros(len(plan), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    parts = _parts(plan, training.accumulation)
    batches = _device_batches(data, [rows for rows, _, _ in parts], training.pad_to)
    rights: list[Tensor] = []
    step = seen = 0
    ended = False
    for (_, share, last), (ids, mask, labels) in zip(parts, batches, strict=True):
        loss, right = training.backward(ids, mask, labels, share)
        losses[step] += loss
        correct += right
        rights.append(right)
        if not last:
            continue
        training.step()
        rows = len(plan[step])
        step += 1
        seen += rows
        if training.after_step is not None:
            # The only wait for the device in a step, and only where a caller asked for it.
            ended = training.after_step(sum(map(int, rights)) / rows)
        rights = []
        if ended or step % FINITE_CHECK_STEPS == 0 or step == len(plan):
            _check_finite(losses[:step], epoch, training)
        if time.perf_counter() - reported >= REPORT_SECONDS:
            reported = time.perf_counter()
            part = step / training.steps_per_epoch
            training.progress(Progress(training.stage, epoch - 1, settings.epochs, part=part))
        if ended:
            break
    sizes = torch.tensor([len(rows) for rows in plan], device=device)
    record = Epoch(
        training.stage,
        epoch,
        float((losses * sizes).sum() / seen),
        float(correct / seen),
        time.perf_counter() - started,
        seen,
    )
    return record, ended


def _check_finite(losses: Tensor, epoch: int, training: _Training) -> None:
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = (epoch - 1) * training.steps_per_epoch + int(bad[0]) + 1
        raise NonFiniteLossError(
            f"loss became {float(losses[int(bad[0])])} in stage '{training.stage}' at step {step} "
            f"(epoch {epoch}) with {training.settings}; lower the learning rate or use precision "
            "fp32."
        )


def _adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )


def _schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> LambdaLR:
    warmup = round(settings.warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def predict(
    model: nn.Module,
    data: Encoded,
    *,
    precision: str,
    device: torch.device,
    batch_size: int = PREDICT_BATCH,
) -> IntArray:
    """Return the predicted class of every row: (rows,), in the order of `data`."""

    def classes(ids: Tensor, mask: Tensor) -> Tensor:
        return logits_of(model, ids, mask).argmax(1)

    predicted: IntArray = in_batches(
        model, data, classes, precision=precision, device=device, batch_size=batch_size
    )
    return predicted


def in_batches(
    model: nn.Module,
    data: Encoded,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    precision: str,
    device: torch.device,
    batch_size: int = PREDICT_BATCH,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Return what `function` returns for each row, in the order of `data`: (rows, ...).

    model: the model that `function` uses; moved to `device` and put into eval mode.
    data: the rows.
    function: (ids, mask) of a batch -> a tensor, not of bfloat16, with a row for each of its rows;
        called without gradients, in `precision`.
    precision: ``auto``, ``bf16`` or ``fp32``.
    device: where to compute.
    batch_size: rows per batch.
    progress: called with the share that is done, every `REPORT_SECONDS`.

    Raises:
        ValueError: there are no rows.
    """
    if len(data) == 0:
        raise ValueError("there are no rows to compute on.")
    model.to(device).eval()
    data = data.to(device)
    order = np.argsort(data.host_lengths, kind="stable")
    plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    bf16 = resolve_precision(precision, device) == "bf16"
    found = []
    reported = time.perf_counter()
    for number, (ids, mask, _) in enumerate(_device_batches(data, plan, None), 1):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append(function(ids, mask))
        if progress is not None and time.perf_counter() - reported >= REPORT_SECONDS:
            reported = time.perf_counter()
            progress(number / len(plan))
    values = torch.cat(found).cpu().numpy()
    result = np.empty_like(values)
    result[order] = values
    return result
