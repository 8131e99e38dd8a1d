"""What the tests of defenses that screen at inference share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_cells import Lab

from btu.defenses.base import Defense
from btu.findings import Screened, incoming_of
from btu.recipe import Prepared, evaluation_screened
from btu.stage_files import write_table
from btu.stages import Stage, compute, read_record, stage
from btu.types import Rows


def screen_of(defense: Defense, prepared: Prepared, came: Stage | None = None) -> Stage:
    """Return the stage that a screening defense ends with; came: its input."""
    base = prepared.foundation
    asked = came or prepared.incoming
    screened: Stage = defense.screen(base, defense.stages(base), asked)  # type: ignore[attr-defined]
    return screened


def own_screens(defense: Defense, prepared: Prepared) -> list[Stage]:
    """Return the stages that a screening defense adds, in the order in which they are computed."""
    given = {*prepared.shared, *(stage.key for stage in prepared.incoming.closure())}
    return [s for s in screen_of(defense, prepared).closure() if s.key not in given]


def decisions(defense: Defense, prepared: Prepared, lab: Lab) -> tuple[Rows, Screened]:
    """Compute a screen; return its input texts and its verdicts."""
    (folder,) = lab.compute(screen_of(defense, prepared))
    return incoming_of(lab.root / prepared.incoming.key), Screened.load(folder)


def scores(defense: Defense, prepared: Prepared, lab: Lab) -> dict[str, Any]:
    """Return the scores of the poisoned model behind the screen."""
    last = screen_of(defense, prepared)
    (folder,) = lab.compute(
        evaluation_screened(prepared, defense.stages(prepared.foundation), last, "defended")
    )
    facts: dict[str, Any] = read_record(folder)["facts"]
    return facts


def screened_alone(defense: Defense, prepared: Prepared, texts: list[str], root: Path) -> Screened:
    """Return the verdicts on these texts if there are no others.

    root: a folder in which everything but the screen is computed already.
    """
    came = Stage("some texts", write_texts, {"texts": texts}, kind="host")
    return Screened.load(compute(screen_of(defense, prepared, came), root))


@stage(version=1)
def write_texts(run: Any) -> dict[str, Any]:
    """Write the texts in the config as the incoming ones."""
    write_table(
        run.folder / "incoming.parquet", {"text": [t.encode() for t in run.config["texts"]]}
    )
    return {}
