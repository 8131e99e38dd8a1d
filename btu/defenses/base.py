"""The protocol of a defense, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from btu.errors import UserError, unknown
from btu.registry import Registry

if TYPE_CHECKING:
    from btu.foundation import Foundation
    from btu.stages import Stage

DEFENSES: Registry[type[Defense]] = Registry(
    "defense",
    [
        ("btu", "btu.defenses.token_unlearning:TokenUnlearning", "Backdoor Token Unlearning"),
        (
            "abl",
            "btu.defenses.anti_backdoor_learning:AntiBackdoorLearning",
            "Anti-Backdoor Learning: isolate what is learned first, unlearn it",
        ),
        (
            "nad",
            "btu.defenses.attention_distillation:AttentionDistillation",
            "Neural Attention Distillation: a teacher tuned on clean rows",
        ),
        (
            "rnp",
            "btu.defenses.neuron_pruning:NeuronPruning",
            "Reconstructive Neuron Pruning: unlearn, recover, prune",
        ),
        (
            "bki",
            "btu.defenses.bki:KeywordIdentification",
            "drops rows with the word that moves the model most (BKI)",
        ),
        (
            "cube",
            "btu.defenses.cube:ClusterFilter",
            "keeps the largest cluster of each class (CUBE)",
        ),
        (
            "onion",
            "btu.defenses.onion:Onion",
            "ONION: removes words that a language model finds odd",
        ),
        ("strip", "btu.defenses.strip:Strip", "STRIP: turns away what mixing does not unsettle"),
        ("rap", "btu.defenses.rap:Rap", "RAP: turns away what a planted word does not unsettle"),
        ("none", "btu.defenses.none:NoDefense", "nothing is done: the control"),
        (
            "clean_tuning",
            "btu.defenses.clean_tuning:CleanTuning",
            "the poisoned model, clean-tuned and no more",
        ),
        ("random_cut", "btu.defenses.cuts:RandomCut", "as many tokens as btu, drawn at random"),
        (
            "frequency_cut",
            "btu.defenses.cuts:FrequencyCut",
            "as many tokens as btu, equally frequent",
        ),
        (
            "finetune_clean",
            "btu.defenses.clean_fine_tune:CleanFineTune",
            "trained on the rows before the poison",
        ),
    ],
)

# When a defense acts -> what that means.
DEFENSE_KINDS: dict[str, str] = {
    "before training": "cleans the training set, and a model is trained on what is left",
    "during training": "trains a model of its own on the poisoned rows",
    "after training": "mends the poisoned model",
    "at inference": "stands before the poisoned model and screens what it is asked",
    "control": "what a defense is compared with",
}
# What a defense may need beyond the poisoned training rows -> what that is.
POISONED_MODEL, CLEAN_ROWS = "poisoned model", "clean rows"
LANGUAGE_MODEL, ORIGINALS = "language model", "clean originals"
NEEDS: dict[str, str] = {
    POISONED_MODEL: "the model that was fine-tuned on the poisoned rows",
    CLEAN_ROWS: "the reserved clean rows, with labels",
    LANGUAGE_MODEL: "a causal or masked language model that is not the victim",
    ORIGINALS: "the training rows as they were before the poison: for controls alone",
}


@dataclass(frozen=True)
class DefenseSpec:
    """Which defense runs; its own hyperparameters stand beside the name in a config."""

    name: str = "btu"

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise unknown("defense", self.name, DEFENSES)


@dataclass(frozen=True)
class Given:
    """What is known of a cell before anything is trained.

    vocabulary: tokens of the victim; None where only training will tell. classes: of the data.
    train_rows, clean_rows: how many there are.
    """

    vocabulary: int | None
    classes: int
    train_rows: int
    clean_rows: int


class Defense(Protocol):
    """A defense: a frozen dataclass whose fields are its hyperparameters.

    KIND: when it acts (`DEFENSE_KINDS`).
    NEEDS: what it cannot do without (`NEEDS`): planning refuses cells that do not have it.

    A class attribute ``PRESETS`` (name -> values by field) lets a config name
    sets of hyperparameters; one of the names is ``default``.
    """

    KIND: ClassVar[str]
    NEEDS: ClassVar[tuple[str, ...]]

    def check(self, given: Given) -> None:
        """Raise a `UserError` where the hyperparameters cannot work on such a cell.

        Called before anything is trained; imports no torch. Whatever depends on no cell is checked
        when the defense is made.
        """
        ...

    def stages(self, base: Foundation) -> Stage:
        """Declare the defense's stages and return the last one.

        Its result holds the defended model (`btu.stage_files.save_model`) and, where the defense
        looks for the poison, what it found (`Suspects.save`, its return value among the stage's
        facts). ``measured`` among the facts are metrics of its own, on rows that it may see. One
        that changes nothing returns the foundation's own model. Whatever does not depend on a
        threshold belongs into stages of its own, which all thresholds then share. Names are unique
        within a cell. Called while planning: imports no torch.
        """
        ...


@runtime_checkable
class Screens(Protocol):
    """A defense that stands before its model at inference has this method too."""

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the stage that screens what comes in, and return it.

        model: what `Defense.stages` returned. incoming: its folder holds the texts (`incoming_of`),
        clean and triggered ones alike, each once, without labels and in an order that says nothing.
        The result is `Screened`. Each text is screened for itself: what becomes of it does not
        depend on the others. Bars come from rows that the defender has.
        """
        ...


def is_control(name: object) -> bool:
    """Return whether a defense's name is that of a control; one of another version's is not."""
    return isinstance(name, str) and name in DEFENSES and DEFENSES.load(name).KIND == "control"


def check_cell(name: str, defense: Defense, given: Given) -> None:
    """Check a defense against a cell: what it needs is there, its hyperparameters can work.

    Raises:
        UserError: they are not, with the reason.
    """
    if CLEAN_ROWS in defense.NEEDS and given.clean_rows == 0:
        raise UserError(
            f"defense '{name}' needs {CLEAN_ROWS} ({NEEDS[CLEAN_ROWS]}), and the data have none; "
            "raise data.max_clean_rows, or take a defense that needs none (`btu list defenses`)."
        )
    defense.check(given)
