"""The protocol of a defense, and the registry."""

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
            "dpoe",
            "btu.defenses.dpoe:DenoisedProductOfExperts",
            "DPoE: a shallow model takes the trigger's shortcut from the main one",
        ),
        (
            "musclelora",
            "btu.defenses.low_rank_training:LowRankTraining",
            "MuScleLoRA: low-rank training along the gradients of clean rows",
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
            "fine_mixing",
            "btu.defenses.fine_mixing:FineMixing",
            "gives most weights their pretrained values, and tunes (Fine-mixing)",
        ),
        (
            "crow",
            "btu.defenses.crow:Crow",
            "CROW: keeps neighbouring layers consistent on perturbed clean rows",
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
            "zdef",
            "btu.defenses.zdef:ZScoreFilter",
            "drops rows with a token far too common in their class (Z-defence)",
        ),
        (
            "onion",
            "btu.defenses.onion:Onion",
            "ONION: removes words that a language model finds odd",
        ),
        ("strip", "btu.defenses.strip:Strip", "STRIP: rejects texts that mixing hardly affects"),
        ("rap", "btu.defenses.rap:Rap", "RAP: rejects texts that a planted word hardly affects"),
        (
            "dan",
            "btu.defenses.dan:Dan",
            "DAN: rejects texts whose hidden states are far from clean ones",
        ),
        (
            "badacts",
            "btu.defenses.badacts:BadActs",
            "BadActs: rejects texts that move many neurons out of their range",
        ),
        ("none", "btu.defenses.none:NoDefense", "no defense: the control"),
        (
            "clean_tuning",
            "btu.defenses.clean_tuning:CleanTuning",
            "the poisoned model after clean tuning alone",
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

# When a defense acts -> description.
DEFENSE_KINDS: dict[str, str] = {
    "before training": "cleans the training set, and a model is trained on what is left",
    "during training": "trains a model of its own on the poisoned rows",
    "after training": "repairs the poisoned model",
    "at inference": "screens the texts that the poisoned model gets",
    "control": "what a defense is compared with",
}
# What a defense may need beyond the poisoned training rows -> description.
POISONED_MODEL, CLEAN_ROWS = "poisoned model", "clean rows"
LANGUAGE_MODEL, ORIGINALS = "language model", "clean originals"
SINGLE_TEXTS = "single texts"
NEEDS: dict[str, str] = {
    POISONED_MODEL: "the model that was fine-tuned on the poisoned rows",
    CLEAN_ROWS: "the reserved clean rows, with labels",
    LANGUAGE_MODEL: "a causal or masked language model that is not the victim",
    ORIGINALS: "the training rows as they were before the poison: for controls only",
    SINGLE_TEXTS: "rows of one text each, no pairs: it takes words out of the text",
}


@dataclass(frozen=True)
class DefenseSpec:
    """The name of the defense; its hyperparameters are beside the name in a config."""

    name: str = "btu"

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise unknown("defense", self.name, DEFENSES)


@dataclass(frozen=True)
class Given:
    """Facts about a cell that are known before training.

    vocabulary: size of the victim's vocabulary; None if it is not known before loading.
    classes: number of classes in the data.
    train_rows: number of training rows.
    clean_rows: number of reserved clean rows.
    pairs: whether each row is a pair of texts.
    """

    vocabulary: int | None
    classes: int
    train_rows: int
    clean_rows: int
    pairs: bool = False


class Defense(Protocol):
    """A defense: a frozen dataclass whose fields are its hyperparameters.

    A class attribute ``PRESETS`` (name -> values by field) defines named sets of hyperparameters
    for a config's ``preset``; one of the names is ``default``. A field with the
    metadata ``path`` may name a folder.

    KIND: when the defense acts (`DEFENSE_KINDS`).
    NEEDS: what the defense requires (`NEEDS`); planning refuses cells that lack it.
    """

    KIND: ClassVar[str]
    NEEDS: ClassVar[tuple[str, ...]]

    def check(self, given: Given) -> None:
        """Raise a `UserError` if the hyperparameters cannot work on such a cell.

        Called before anything is trained; imports no torch. Checks that do not depend on the cell
        belong in ``__post_init__``.
        """
        ...

    def stages(self, base: Foundation) -> Stage:
        """Declare the defense's stages and return the last one.

        The last stage's folder contains the defended model (`btu.stage_files.save_model`) and, if
        the defense looks for the poison, its findings (`Suspects.save`, whose return value is part
        of the stage's facts). The fact ``measured`` holds the defense's own metrics, on rows that
        it may see. A defense that changes no model returns the foundation's own model stage. Work
        that does not depend on a threshold belongs in separate stages, which all thresholds then
        share. Stage names are unique within a cell. Called while planning: imports no torch.
        """
        ...


@runtime_checkable
class Screens(Protocol):
    """A defense that screens texts at inference has this method too."""

    def screen(self, base: Foundation, model: Stage, incoming: Stage) -> Stage:
        """Declare the stage that screens incoming texts, and return it.

        The stage writes a `Screened`. Each text is screened independently of the others. Thresholds
        come from rows that the defender has.

        base: what the defense starts from.
        model: the stage that `Defense.stages` returned.
        incoming: its folder contains the texts (`incoming_of`), clean and triggered ones, each
            once, without labels and in an order that reveals nothing.
        """
        ...


def is_control(name: object) -> bool:
    """Return whether a name is that of a control; names that are not registered are not."""
    return isinstance(name, str) and name in DEFENSES and DEFENSES.load(name).KIND == "control"


def check_cell(name: str, defense: Defense, given: Given) -> None:
    """Check that a cell has what a defense needs, and that its hyperparameters can work.

    Raises:
        UserError: a need is missing, or a hyperparameter cannot work.
    """
    if CLEAN_ROWS in defense.NEEDS and given.clean_rows == 0:
        raise UserError(
            f"defense '{name}' needs {CLEAN_ROWS} ({NEEDS[CLEAN_ROWS]}), and the data have none; "
            "raise data.max_clean_rows, or take a defense that needs none (`btu list defenses`)."
        )
    if SINGLE_TEXTS in defense.NEEDS and given.pairs:
        raise UserError(
            f"defense '{name}' needs {SINGLE_TEXTS} ({NEEDS[SINGLE_TEXTS]}), and the rows of these "
            "data are pairs (data.pair_column); take a defense without this need "
            "(`btu list defenses`), or data of single texts."
        )
    defense.check(given)
