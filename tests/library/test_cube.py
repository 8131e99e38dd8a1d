"""CUBE: cases made by hand, and what it does on a strongly poisoned toy set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_cells import Lab, own_stages
from torch import nn

from btu.attacked import mask_of
from btu.defenses.base import Given
from btu.defenses.cube import (
    HIDDEN_STATES,
    ClusterFilter,
    cluster,
    clusters_of,
    join_nearest,
    outside_largest,
    reduce_dimensions,
)
from btu.defenses.kit.representation import output_layer, representations
from btu.errors import UserError
from btu.findings import Suspects
from btu.recipe import Prepared
from btu.stage_files import load_encoded, model_of
from btu.stages import StageRun, compute, read_record
from btu.types import BoolArray, FloatArray
from btu.victims import Victim

CPU = torch.device("cpu")


def poisoned(lab: Lab) -> Prepared:
    return lab.prepare(rate=0.25)


def clustered(lab: Lab, folder: Path, hidden: FloatArray, **settings: Any) -> Suspects:
    """Cluster hidden states made by hand, one for each training row of `poisoned`."""
    prepared = poisoned(lab)
    lab.compute(prepared.foundation.rows)
    (folder / "hidden").mkdir(parents=True)
    save_file({"hidden": hidden.astype(np.float32)}, folder / "hidden" / HIDDEN_STATES)
    stages = {s.name: s for s in own_stages(ClusterFilter(**settings), prepared)}
    inputs = {"rows": lab.root / prepared.foundation.rows.key, "hidden": folder / "hidden"}
    run = StageRun(stages["cluster (cube)"].config, {}, inputs, folder, CPU)
    found = Suspects.load(folder, cluster(run))
    assert found is not None
    return found


def heaps(lab: Lab) -> tuple[FloatArray, BoolArray]:
    """Return hidden states with a heap for each class and one for the poison, and the mask."""
    prepared = poisoned(lab)
    lab.compute(prepared.poisoned, prepared.foundation.rows)
    mask = mask_of(lab.root / prepared.poisoned.key)
    rows = load_encoded(lab.root / prepared.foundation.rows.key / "train.safetensors")
    hidden = np.random.default_rng(0).normal(0, 1, (len(mask), 8))
    hidden[:, 0] += 30 * rows.labels.numpy()
    hidden[:, 1] += 30 * mask
    return hidden, mask


def test_rows_outside_the_largest_cluster_of_their_class_are_taken() -> None:
    clusters = np.array([0, 0, 0, 1, 1, 1, 1, 0, -1])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    taken, suspicion = outside_largest(clusters, labels)
    # Class 0 has 3 rows in cluster 0 and 1 in 1; class 1 has 3 in 1, 1 in 0 and 1 in none.
    assert taken.tolist() == [False, False, False, True, False, False, False, True, True]
    assert suspicion == pytest.approx([0.25, 0.25, 0.25, 0.75, 0.4, 0.4, 0.4, 0.8, 0.8])


def test_kept_noise_is_neither_taken_nor_the_largest_cluster() -> None:
    clusters, labels = np.array([-1, -1, -1, 0, 0, 1]), np.zeros(6, dtype=np.int64)
    taken, _ = outside_largest(clusters, labels, keep_noise=True)
    assert taken.tolist() == [False, False, False, False, False, True]
    # As a cluster like others, noise is the largest here.
    taken, _ = outside_largest(clusters, labels)
    assert taken.tolist() == [False, False, False, True, True, True]


def test_a_class_that_is_all_noise_loses_nothing() -> None:
    taken, _ = outside_largest(np.array([-1, -1]), np.array([0, 0]), keep_noise=True)
    assert not taken.any()


def test_noise_joins_the_cluster_of_the_nearest_row_in_one() -> None:
    points = np.array([[0.0], [1.0], [4.0], [9.0], [10.0]])
    # 4 is 3 away from 1 and 5 away from 9.
    assert join_nearest(points, np.array([0, 0, -1, 1, 1])).tolist() == [0, 0, 0, 1, 1]
    assert join_nearest(points, np.full(5, -1)).tolist() == [-1] * 5


def test_two_heaps_of_rows_are_two_clusters() -> None:
    rng = np.random.default_rng(0)
    heaps = np.concatenate([rng.normal(0, 1, (40, 8)), rng.normal(20, 1, (20, 8))])
    reduced = reduce_dimensions(heaps, 3, seed=0)
    assert reduced.shape == (60, 3)
    found = join_nearest(reduced, clusters_of(reduced, min_samples=5, min_cluster_size=5))
    assert len(set(found[:40])) == len(set(found[40:])) == 1
    assert found[0] != found[-1]
    # Not more dimensions than there are.
    assert reduce_dimensions(heaps, 20, seed=0).shape == (60, 8)


def test_a_representation_is_what_the_logits_are_made_of(victim: Victim, lab: Lab) -> None:
    prepared = lab.prepare(Path(victim.spec.name).name)
    base = prepared.foundation
    lab.compute(base.model)
    inputs = {"rows": lab.root / base.rows.key, "model": lab.root / base.model.key}
    run = StageRun({}, {}, inputs, lab.root, CPU)
    model = model_of(run, "model")
    data = load_encoded(inputs["rows"] / "train.safetensors").take(np.arange(40))
    logits = run.predict(model, data, precision="fp32", stage="logits")
    with representations(model) as represent:
        hidden = run.in_batches(model, data, represent, precision="fp32", stage="hidden")
    layer = output_layer(model)
    assert hidden.shape == (40, layer.in_features)
    with torch.no_grad():
        again = layer(torch.from_numpy(hidden))
    assert torch.allclose(again, torch.from_numpy(logits), atol=1e-5)
    # No hook is left behind.
    assert not layer._forward_pre_hooks


def test_a_model_without_an_output_layer_is_named(bert: Victim) -> None:
    model = bert.new_model(0)
    model.classifier = nn.Identity()
    with pytest.raises(UserError, match="BertForSequenceClassification has no linear layer with 2"):
        output_layer(model)


def test_cube_takes_the_poisoned_rows_where_the_model_sets_them_apart(
    lab: Lab, tmp_path: Path
) -> None:
    hidden, mask = heaps(lab)
    found = clustered(lab, tmp_path, hidden, min_samples=5, min_cluster_size=20)
    assert found.flagged is None
    # The poison's heap is none of the classes' and smaller: 60 rows of class 1 against 120 or so.
    assert np.array_equal(found.taken, mask)
    assert found.rows is not None
    assert found.rows[mask].min() > found.rows[~mask].max()
    kept = pq.read_table(tmp_path / "kept.parquet")["kept"].to_numpy()
    assert np.array_equal(kept, ~mask)


def test_cube_trains_on_the_rows_that_it_keeps(lab: Lab) -> None:
    defense, base = ClusterFilter(min_samples=5), poisoned(lab).foundation
    last = compute(defense.stages(base), lab.root)
    record = read_record(last)
    found = Suspects.load(last, record["facts"])
    assert found is not None
    assert found.taken is not None
    kept = int((~found.taken).sum())
    assert record["facts"]["measured"]["rows_kept"] == kept
    assert {epoch["rows"] for epoch in record["history"]} == {kept}


def test_settings_share_the_hidden_states(lab: Lab) -> None:
    base = poisoned(lab).foundation
    few, many = (ClusterFilter(min_samples=n).stages(base) for n in (5, 50))
    clusters = [last.inputs["kept"] for last in (few, many)]
    assert clusters[0].key != clusters[1].key
    assert clusters[0].inputs["hidden"].key == clusters[1].inputs["hidden"].key
    # The hidden states have nothing of the settings.
    assert set(clusters[0].inputs["hidden"].config) == {"victim", "seed", "precision"}


def test_noise_is_joined_dropped_or_kept(lab: Lab, tmp_path: Path) -> None:
    hidden, mask = heaps(lab)
    # One clean row alone in the void, nearest to the others of its class.
    stray = int(np.flatnonzero(~mask)[0])
    hidden[stray, 2] += 40
    taken = {
        noise: clustered(
            lab, tmp_path / noise, hidden, min_samples=5, min_cluster_size=20, noise=noise
        ).taken
        for noise in ("nearest", "drop", "keep")
    }
    assert all(found is not None for found in taken.values())
    assert [bool(taken[noise][stray]) for noise in taken] == [False, True, False]
    assert all(found[mask].all() for found in taken.values())


def test_hidden_states_have_a_row_for_each_training_row(lab: Lab) -> None:
    stages = {stage.name: stage for stage in own_stages(ClusterFilter(), poisoned(lab))}
    (folder,) = lab.compute(stages["hidden states (cube)"])
    hidden = load_file(folder / HIDDEN_STATES)["hidden"]
    assert hidden.shape == (240, 16)  # the tiny victim's hidden size
    assert np.isfinite(hidden).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "defense.components must be at least 1, got 0"),
        ({"min_samples": 0}, "defense.min_samples must be at least 1, got 0"),
        ({"min_cluster_size": 1}, "defense.min_cluster_size must be at least 2, got 1"),
        ({"noise": "near"}, "unknown defense.noise 'near'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClusterFilter(**settings)


def test_more_samples_than_rows_are_refused_while_planning() -> None:
    cell = Given(None, classes=2, train_rows=90, clean_rows=0)
    with pytest.raises(UserError, match=r"min_samples 100 is more than the 90 training rows"):
        ClusterFilter().check(cell)
    ClusterFilter(min_samples=90).check(cell)
