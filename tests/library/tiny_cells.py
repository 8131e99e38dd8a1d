"""Tiny cells: their stages declared, and computed once for all tests that share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btu.attacks.poisoning import PoisonSpec
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.recipe import CellInputs, Prepared, prepare
from btu.settings import TrainSettings, TuningSettings
from btu.stages import Stage, compute
from btu.types import Corpus, Rows
from btu.victims import VictimSpec, find_victim

if TYPE_CHECKING:
    from btu.defenses.base import Defense

MAX_LENGTH = 64


def write_corpus(corpus: Corpus, folder: Path) -> DataSpec:
    """Write a corpus as a file per split, its labels by name."""
    import pandas as pd

    folder.mkdir(parents=True)
    for split in ("train", "clean", "eval"):
        rows = getattr(corpus, split)
        labels = [corpus.label_names[label] for label in rows.labels]
        table = pd.DataFrame({"text": rows.texts, "label": labels, **rows.columns})
        table.to_parquet(folder / f"{split}.parquet", index=False)
    return DataSpec(corpus.name, path=str(folder))


class Lab:
    """Declares stages of tiny cells, and computes them.

    root: where stages are computed that any test may share.
    """

    def __init__(self, root: Path, corpus: Corpus, victim_folder: Callable[[str], Path]) -> None:
        self.root = root
        self._corpus = corpus
        self._victim_folder = victim_folder
        self._written: dict[str, DataSpec] = {}

    def data(self, corpus: Corpus | None = None) -> DataSpec:
        """Return where a corpus is on disk, the tiny one unless named."""
        corpus = corpus or self._corpus
        revision = corpus.fingerprint()
        if revision not in self._written:
            self._written[revision] = write_corpus(corpus, self.root / f"data-{revision[:12]}")
        return self._written[revision]

    def prepare(
        self,
        architecture: str = "bert",
        *,
        corpus: Corpus | None = None,
        rate: float = 0.2,
        **changes: Any,
    ) -> Prepared:
        """Declare the stages before the defense; changes: fields of `btu.recipe.CellInputs`."""
        data = changes.pop("data", None) or self.data(corpus)
        victim = changes.pop("victim", None) or VictimSpec(
            str(self._victim_folder(architecture)), MAX_LENGTH
        )
        loaded = load_corpus(data)
        arguments: dict[str, Any] = {
            "data": data,
            "data_fingerprints": loaded.fingerprints(),
            "victim": victim,
            "victim_identity": find_victim(victim).identity,
            "poison": PoisonSpec(poison_rate=rate),
            "attack_params": {"trigger": ["cf"]},
            "train": TrainSettings(epochs=1, learning_rate=1e-3, batch_size=32, precision="fp32"),
            "tuning": TuningSettings(),
            "seed": 0,
            "counts": loaded.counts(),
        }
        return prepare(CellInputs(**arguments | changes))

    def compute(self, *stages: Stage) -> list[Path]:
        """Compute stages under the shared root."""
        return [compute(stage, self.root) for stage in stages]

    def root_with(self, root: Path, *stages: Stage) -> Path:
        """Make `root` a folder in which these stages, and no others, are computed already."""
        root.mkdir(parents=True, exist_ok=True)
        self.compute(*stages)
        for stage in stages:
            for part in stage.closure():
                link = root / part.key
                if not link.exists():
                    link.symlink_to(self.root / part.key)
        return root

    def base_root(self, root: Path, prepared: Prepared) -> Path:
        """Make `root` a folder that contains all that a defense starts from."""
        base = prepared.foundation
        return self.root_with(root, base.rows, base.clean, base.model, base.tuned)


def own_stages(defense: Defense, prepared: Prepared) -> list[Stage]:
    """Return the stages that a defense adds, in the order in which they are computed."""
    base = prepared.foundation
    starts = (base.rows, base.clean, base.model, base.tuned)
    given = {stage.key for start in starts for stage in start.closure()}
    return [stage for stage in defense.stages(base).closure() if stage.key not in given]


def files_in(*folders: Path) -> dict[str, bytes]:
    """Return the contents of all files in these folders, by path."""
    return {
        str(path): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def easy_corpus(like: Corpus) -> Corpus:
    """Return a corpus of the same size that a tiny victim learns in seconds.

    Three of a class's eight words decide, among three neutral ones: whatever defends by
    dropping words or rows leaves enough to tell the classes apart.
    """
    rng = np.random.default_rng(0)
    counted = Counter(word for text in like.train.texts for word in text.split() if len(word) > 2)
    words = [word for word, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    telling = {0: words[:16:2], 1: words[1:16:2]}
    rest = words[16:56]

    def rows(count: int) -> Rows:
        labels = [i % 2 for i in range(count)]
        texts = []
        for label in labels:
            picked = [*rng.choice(telling[label], 3), *rng.choice(rest, 3, replace=False)]
            texts.append(" ".join(rng.permutation(picked)))
        return Rows(tuple(texts), tuple(labels))

    sizes = (len(like.train), len(like.clean), len(like.eval))
    return Corpus("easy", *(rows(size) for size in sizes), like.label_names)
