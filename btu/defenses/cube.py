"""CUBE: cluster what the poisoned model makes of each row, keep each class's largest cluster.

Cui, Yuan, He, Chen, Liu, Sun: A Unified Evaluation of Textual Backdoor Learning: Frameworks and
Benchmarks (NeurIPS 2022 datasets and benchmarks, arXiv 2206.08514). Reference code:
thunlp/OpenBackdoor, ``openbackdoor/defenders/cube_defender.py`` at 0c5a560.

A model that was trained on the poisoned rows puts those with the trigger apart from the others of
their class. So: the last hidden state of every training row, reduced in dimension, clustered by
density (HDBSCAN); of the rows of each class only the largest cluster stays, and a model is trained
on those as the undefended one is on all.

==================  ======================  ===============  ======================================
step                reference               here             why
==================  ======================  ===============  ======================================
encoder             RoBERTa base, trained   the poisoned     it is there already, is what is to be
                    10 epochs at 2e-5       model            defended, and costs nothing
representation      pooled last hidden      the same         what the output layer reads
                    state
reduction           PCA to 20, UMAP (100    PCA to 20        umap-learn brings numba and LLVM along
                    neighbors) to 2
what is clustered   all rows together       the same
HDBSCAN             ``hdbscan``, 100        scikit-learn's,  the same algorithm, a dependency less;
                    samples, clusters of 5  the same         its ``min_samples`` counts the row
                                            numbers          itself, ``hdbscan``'s does not: 100
                                                             there are 101 here, 100 here 99 there
noise               dropped: a cluster      ``nearest``: as  UMAP pulls rows together and leaves
                    like others             the nearest row  little noise; in the bare PCA it is up
                                            in a cluster     to a quarter of the rows, most of which
                                                             stand at the edge of a cluster
who stays           the largest; others of  the largest      two clusters cannot both hold more than
                    half the class or more                   half of a class
==================  ======================  ===============  ======================================

Clustering takes time with the square of the rows: seconds for 7,000, half an hour for 100,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from btu.defenses.base import POISONED_MODEL, Given
from btu.errors import UserError, unknown
from btu.findings import Suspects
from btu.foundation import Foundation, keep_rows
from btu.seeding import derive_seed
from btu.stage_files import model_of, training_rows_of
from btu.stages import Stage, StageRun, stage
from btu.types import BoolArray, FloatArray, IntArray

HIDDEN_STATES = "hidden.safetensors"
NOISE = ("nearest", "drop", "keep")
# What HDBSCAN calls rows that are in no cluster.
NO_CLUSTER = -1


@dataclass(frozen=True)
class ClusterFilter:
    """CUBE.

    components: dimensions that PCA leaves, from 1 up; as many as there are where there are fewer.
    min_samples: rows around a row by which its density is told, itself among them, from 1 up;
        higher means fewer clusters and more noise.
    min_cluster_size: rows that make a cluster, from 2 up.
    noise: what becomes of rows in no cluster: ``nearest`` counts them to the cluster of the nearest
        row that is in one, ``drop`` takes them for a cluster of their own as the reference code
        does, ``keep`` keeps them whatever is around them.
    """

    components: int = 20
    min_samples: int = 100
    min_cluster_size: int = 5
    noise: str = "nearest"

    KIND: ClassVar[str] = "before training"
    NEEDS: ClassVar[tuple[str, ...]] = (POISONED_MODEL,)
    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "default": {},
        "reference": {"noise": "drop"},
    }

    def __post_init__(self) -> None:
        for name, low in (("components", 1), ("min_samples", 1), ("min_cluster_size", 2)):
            if getattr(self, name) < low:
                raise UserError(
                    f"defense.{name} must be at least {low}, got {getattr(self, name)}."
                )
        if self.noise not in NOISE:
            raise unknown("defense.noise", self.noise, NOISE)

    def check(self, given: Given) -> None:
        """Raise a `UserError` where more rows are asked for than there are."""
        for name in ("min_samples", "min_cluster_size"):
            if getattr(self, name) > given.train_rows:
                raise UserError(
                    f"defense.{name} {getattr(self, name)} is more than the {given.train_rows} "
                    "training rows; lower it."
                )

    def stages(self, base: Foundation) -> Stage:
        """Declare the hidden states, shared by all settings, the clustering, the training."""
        hidden = base.stage(
            hidden_states,
            "hidden states (cube)",
            {"precision": base.train.precision},
            {"rows": base.rows, "model": base.model},
            units=base.train_rows,
        )
        settings = ("components", "min_samples", "min_cluster_size", "noise")
        clustered = base.stage(
            cluster,
            "cluster (cube)",
            {name: getattr(self, name) for name in settings},
            {"rows": base.rows, "hidden": hidden},
            kind="host",
        )
        return base.fine_tune("fine-tune (cube)", clustered)


# What the stages do ------------------------------------------------------------------------------


@stage(version=1)
def hidden_states(run: StageRun) -> dict[str, Any]:
    """Write what the poisoned model makes of every training row.

    Writes ``hidden.safetensors``: ``hidden``, (rows, hidden) float32, the last hidden state as the
    output layer reads it.
    """
    from safetensors.numpy import save_file

    from btu.defenses.kit.representation import representations

    model = model_of(run, "model")
    with representations(model) as represent:
        hidden = run.in_batches(
            model,
            training_rows_of(run),
            represent,
            precision=run.config["precision"],
            stage="hidden states (cube)",
        )
    save_file({"hidden": hidden}, run.folder / HIDDEN_STATES)
    return {}


@stage(version=1)
def cluster(run: StageRun) -> dict[str, Any]:
    """Cluster the rows, and keep the largest cluster of each class."""
    from safetensors.numpy import load_file

    config = run.config
    hidden = load_file(run.inputs["hidden"] / HIDDEN_STATES)["hidden"].astype(np.float64)
    labels = training_rows_of(run).labels.numpy()
    seed = derive_seed(run.config["seed"], "cube")
    reduced = reduce_dimensions(hidden, config["components"], seed)
    found = clusters_of(reduced, config["min_samples"], config["min_cluster_size"])
    noise = found == NO_CLUSTER
    if config["noise"] == "nearest":
        found = join_nearest(reduced, found)
    taken, suspicion = outside_largest(found, labels, keep_noise=config["noise"] == "keep")
    keep_rows(run, ~taken)
    return {
        **Suspects(rows=suspicion, taken=taken).save(run.folder),
        "clusters": int(found.max()) + 1,
        "noise_rows": int(noise.sum()),
    }


def reduce_dimensions(hidden: FloatArray, components: int, seed: int) -> FloatArray:
    """Return the rows along their first principal components: (rows, at most components)."""
    from sklearn.decomposition import PCA

    pca = PCA(min(components, *hidden.shape), svd_solver="full", random_state=seed % 2**32)
    reduced: FloatArray = pca.fit_transform(hidden)
    return reduced


def clusters_of(points: FloatArray, min_samples: int, min_cluster_size: int) -> IntArray:
    """Return each row's cluster by HDBSCAN, `NO_CLUSTER` where it is in none: (rows,)."""
    from sklearn.cluster import HDBSCAN

    found: IntArray = HDBSCAN(
        min_cluster_size=min_cluster_size, min_samples=min_samples, copy=True
    ).fit_predict(points)
    return found.astype(np.int64)


def join_nearest(points: FloatArray, clusters: IntArray) -> IntArray:
    """Return `clusters` with every row in none counted to that of the nearest row in one.

    points: (rows, dimensions). clusters: (rows,). Without any cluster they stay as they are.
    """
    from sklearn.neighbors import NearestNeighbors

    noise = clusters == NO_CLUSTER
    if noise.all() or not noise.any():
        return clusters
    inside = NearestNeighbors(n_neighbors=1).fit(points[~noise])
    nearest = inside.kneighbors(points[noise], return_distance=False)[:, 0]
    joined = clusters.copy()
    joined[noise] = clusters[~noise][nearest]
    return joined


def outside_largest(
    clusters: IntArray, labels: IntArray, *, keep_noise: bool = False
) -> tuple[BoolArray, FloatArray]:
    """Return which rows are not in the largest cluster of their class, and each row's suspicion.

    clusters, labels: (rows,). Noise is a cluster like others, or with `keep_noise` none: it is then
    never outside. Of equal clusters the one with the lower number is kept. The suspicion of a row
    is the share of its class that is in other clusters than itself.
    """
    taken = np.zeros(len(labels), dtype=bool)
    suspicion = np.zeros(len(labels))
    for label in np.unique(labels):
        of_class = labels == label
        names, place, sizes = np.unique(clusters[of_class], return_inverse=True, return_counts=True)
        suspicion[of_class] = 1 - sizes[place] / of_class.sum()
        real = names != NO_CLUSTER if keep_noise else np.ones(len(names), dtype=bool)
        if real.any():
            largest = names[real][sizes[real].argmax()]
            taken |= of_class & (clusters != largest)
            if keep_noise:
                taken &= clusters != NO_CLUSTER
    return taken, suspicion
