"""The keys of every stage of every shipped sweep, as in existing stores.

A key that changes without its stage's version is a result that is lost: written down once, here.
When a version is raised on purpose, or a sweep gains cells, write the file again:

    python tests/sweeps/test_golden_keys.py
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import btu
from btu.stages import StageFunction
from orchestrator.plan.graph import Graph
from orchestrator.sweep.load import load_sweep, resolve

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "keys.json"
SWEEPS = [*sorted((HERE.parents[1] / "sweeps").glob("*.yaml")), HERE / "golden" / "all_parts.yaml"]

# Stand for the rows of each role, the victim's weights and the sizes of the corpus: no data are
# read, and a path is in no key.
ROWS = {"train": "t" * 64, "clean": "c" * 64, "eval": "e" * 64}
COUNTS = {"rows_train": 80, "rows_clean": 20, "rows_eval": 30}


def keys_of(path: Path) -> dict[str, list[str]]:
    """Return the keys of a sweep's stages by the stages' names; those of a name in order."""
    graph = Graph()
    found: dict[str, set[str]] = {}
    sweep = load_sweep(path)
    cells = list(sweep.cells())
    for cell in [*cells, *sweep.controls_of(cell.varied for cell in cells)]:
        last = graph.cell(resolve(cell.config), ROWS, "w" * 64, COUNTS, revision="r" * 64)
        for stage in last.closure():
            found.setdefault(stage.name, set()).add(stage.key)
    return {name: sorted(keys) for name, keys in sorted(found.items())}


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Any]:
    known: dict[str, Any] = json.loads(GOLDEN.read_text())
    return known


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_keys_are_those_that_stores_have(path: Path, golden: Mapping[str, Any]) -> None:
    assert keys_of(path) == golden[path.stem]


# The id of each stage function in the keys of existing stores, with its version.
FUNCTIONS = {
    "btu.defenses.anti_backdoor_learning:isolate": 1,
    "btu.defenses.anti_backdoor_learning:train_rest": 1,
    "btu.defenses.anti_backdoor_learning:unlearn": 2,
    "btu.defenses.attention_distillation:distil": 2,
    "btu.defenses.attention_distillation:teach": 1,
    "btu.defenses.badacts:activation_states": 1,
    "btu.defenses.badacts:screen_texts": 1,
    "btu.defenses.bki:find_keywords": 1,
    "btu.defenses.bki:score_words": 1,
    "btu.defenses.crow:regularize": 1,
    "btu.defenses.cube:cluster": 1,
    "btu.defenses.cube:hidden_states": 1,
    "btu.defenses.cuts:cut_others": 2,
    "btu.defenses.dan:layer_distances": 1,
    "btu.defenses.dan:screen_texts": 1,
    "btu.defenses.kit.contradiction:fit_half": 1,
    "btu.defenses.kit.contradiction:predict_rows": 1,
    "btu.defenses.kit.layers:clean_layers": 1,
    "btu.defenses.kit.layers:incoming_layers": 1,
    "btu.defenses.fine_mixing:mix_weights": 1,
    "btu.defenses.fine_mixing:try_ratios": 1,
    "btu.defenses.dpoe:train_experts": 1,
    "btu.defenses.low_rank_training:train_low_rank": 1,
    "btu.defenses.neuron_pruning:judge": 1,
    "btu.defenses.neuron_pruning:prune": 2,
    "btu.defenses.neuron_pruning:recover": 2,
    "btu.defenses.neuron_pruning:unlearn": 1,
    "btu.defenses.onion:learn": 2,
    "btu.defenses.onion:remove_outliers": 1,
    "btu.defenses.onion:score_clean": 2,
    "btu.defenses.onion:score_incoming": 2,
    "btu.defenses.rap:incoming_drops": 2,
    "btu.defenses.rap:plant": 2,
    "btu.defenses.rap:screen_texts": 1,
    "btu.defenses.strip:clean_entropies": 1,
    "btu.defenses.strip:incoming_entropies": 1,
    "btu.defenses.strip:screen_texts": 1,
    "btu.defenses.token_unlearning:detect": 2,
    "btu.defenses.token_unlearning:expose": 1,
    "btu.defenses.token_unlearning:flag_tokens": 1,
    "btu.defenses.token_unlearning:score": 1,
    "btu.defenses.token_unlearning:unlearn": 3,
    "btu.defenses.zdef:drop_rows": 1,
    "btu.defenses.zdef:score_tokens": 1,
    "btu.foundation:fine_tune_kept": 1,
    "btu.attacked:learn_trigger": 1,
    "btu.recipe:clean_rows": 1,
    "btu.recipe:clean_tune": 1,
    "btu.recipe:evaluate_model": 1,
    "btu.recipe:evaluate_screened": 1,
    "btu.recipe:evaluation_rows": 2,
    "btu.recipe:evaluation_texts": 1,
    "btu.recipe:fine_tune": 1,
    "btu.recipe:incoming_texts": 1,
    "btu.recipe:poison_rows": 2,
    "btu.recipe:training_rows": 2,
    "btu.recipe:triggered_rows": 1,
    "btu.recipe:unpoisoned_rows": 1,
    "btu.scan:accuracy": 1,
    "btu.scan:suspect_rows": 1,
    "btu.scan:trusted_rows": 2,
    "btu.stealth:measure_rows": 1,
    "orchestrator.trial:score_cell": 4,
}


def test_stage_functions_are_known_by_the_ids_that_stores_have() -> None:
    found: dict[str, int] = {}
    for module in pkgutil.walk_packages(btu.__path__, "btu."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, StageFunction):
                # One id, one function: equal ids would share their results.
                assert found.setdefault(value.id, value.version) == value.version
                place, name = value.path.split(":")
                assert getattr(importlib.import_module(place), name) is value
    assert found == FUNCTIONS


def test_every_sweep_is_written_down(golden: Mapping[str, Any]) -> None:
    assert sorted(golden) == sorted(path.stem for path in SWEEPS)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({path.stem: keys_of(path) for path in SWEEPS}, indent=1) + "\n")
