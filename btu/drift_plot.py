"""The drift plot of a cell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Okabe-Ito: told apart by the color-blind.
CLEAN, FLAGGED, TRIGGER = "#999999", "#E69F00", "#0072B2"
LABELED = 5


def drift_plot(tokens: pd.DataFrame, path: Path) -> None:
    """Plot each round's drift against how often a token occurs; name what was flagged first.

    tokens: from `btu.scoring.token_table`. Without drift columns nothing is drawn.
    """
    rounds = [c for c in tokens.columns if c.startswith("drift_")]
    if not rounds:
        return
    import pandas as pd
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(rounds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: trials may run in threads without a display
    seen = tokens[tokens["count"] > 0]
    groups = [
        ("not flagged", ~seen.flagged & ~seen.trigger, CLEAN, ".", 12),
        ("flagged, clean", seen.flagged & ~seen.trigger, FLAGGED, "s", 24),
        ("trigger, missed", ~seen.flagged & seen.trigger, TRIGGER, "x", 60),
        ("trigger, flagged", seen.flagged & seen.trigger, TRIGGER, "*", 130),
    ]
    for index, column in enumerate(rounds):
        axes = figure.add_subplot(1, len(rounds), index + 1)
        for label, mask, color, marker, size in groups:
            part = seen[mask]
            axes.scatter(
                part["count"], part[column], s=size, c=color, marker=marker, label=label,
                alpha=0.5 if marker == "." else 1.0, linewidths=1.2 if marker == "x" else 0,
            )  # fmt: skip
        named = pd.concat([seen[seen.trigger], seen[seen.flagged].nlargest(LABELED, column)])
        named = named.drop_duplicates("token_id")
        for token, count, drift in zip(named.token, named["count"], named[column], strict=True):
            axes.annotate(
                str(token).replace("$", r"\$"),  # mathtext would read a token "$" as markup
                (count, drift),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
        axes.set_xscale("log")
        axes.set_title(f"exposure round {column.removeprefix('drift_')}")
        axes.set_xlabel("occurrences in the training set")
        axes.grid(alpha=0.2)
        if index == 0:
            axes.set_ylabel("drift of the embedding row (L2)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(groups), fontsize=9)
    figure.savefig(path, dpi=110)
