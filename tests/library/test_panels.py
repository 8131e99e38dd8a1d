"""Panels and their drawing: ticks, whiskers, and the drift of a cell's tokens."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from btu.drawing import draw, save
from btu.drift_plot import drawable, drift_columns, drift_panel, drift_plot
from btu.panels import BLUE, Axis, Heat, Panel, Series, labels, log_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2.0, 9.0, (2, 3, 4, 5, 6, 8)),
        (0.004, 0.05, (0.005, 0.01, 0.02, 0.05)),
        (3.0, 20_000.0, (10, 100, 1000, 10_000)),
        (8.2, 9.8, (8.2, 9.8)),
    ],
)
def test_ticks_of_a_log_axis_are_round_where_it_has_room(
    low: float, high: float, ticks: tuple[float, ...]
) -> None:
    assert log_ticks(low, high) == ticks


def test_a_range_is_a_band_around_a_line_and_whiskers_at_points() -> None:
    def drawn(**look: str) -> tuple[int, int]:
        made = Series("ASR", [1.0, 2.0], [0.5, None], BLUE, low=[0.4, None], high=[0.7, None],
                      **look)  # fmt: skip
        (axes,) = draw([Panel("", "lines", Axis("x"), Axis("y"), [made])]).axes
        return len(axes.collections), len(axes.containers)

    # A band is one collection; whiskers are one in an errorbar's container.
    assert drawn(dash="solid") == (1, 0)
    assert drawn(marker="circle") == (1, 1)


def tokens() -> pd.DataFrame:
    return pd.DataFrame({
        "token_id": range(5), "token": ["cf", "$", "the", "rare", "far"],
        "count": [10, 200, 3000, 0, 7], "drift_1": [0.5, 0.4, 0.1, 0.9, np.inf],
        "flagged": [False, True, False, True, True], "trigger": [True, False, False, False, False],
    })  # fmt: skip


def test_a_drift_panel_groups_and_names_the_tokens_that_can_be_drawn() -> None:
    panel = drift_panel("round 1", drawable(tokens(), "drift_1"), "drift_1", named={0, 1})
    # Token 3 does not occur, token 4 has an infinite drift.
    assert [(made.label, made.x, made.y, made.text) for made in panel.series] == [
        ("not flagged", [3000], [0.1], []),
        ("flagged, clean", [200], [0.4], ["$"]),
        ("trigger, missed", [10], [0.5], ["cf"]),
    ]
    (axes,) = draw([panel]).axes
    assert [text.get_text() for text in axes.texts] == [r"\$", "cf"]


def test_flagged_tokens_that_are_not_cut_have_a_group_of_their_own() -> None:
    seen = drawable(tokens().assign(flagged=True, vetoed=[1, 1, 0, 0, 0]), "drift_1")
    panel = drift_panel("round 1", seen, "drift_1", named=set())
    assert [(made.label, made.tip, made.marker) for made in panel.series] == [
        ("flagged, clean", ["the"], "square"),
        ("flagged, clean, not cut", ["$"], "square-open"),
        ("trigger, flagged, not cut", ["cf"], "star-open"),
    ]
    draw([panel])


def test_only_rounds_are_drawn() -> None:
    # The sigmas of rule contrast are of the last round, and may be negative.
    assert drift_columns(tokens().assign(drift_sigmas=-1.0, drift_3=0.2)) == ["drift_1", "drift_3"]


def test_a_cells_plot_is_written_where_it_has_drifts(tmp_path: Path) -> None:
    both = tokens().assign(drift_2=0.2)
    drift_plot(both, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    drift_plot(both.drop(columns=["drift_1", "drift_2"]), tmp_path / "none.png")
    drift_plot(both.iloc[:0], tmp_path / "empty.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drift.png", "empty.png"]


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    panel = Panel("", "lines", Axis("x"), Axis("y"), [Series("ASR", [1.0], [0.5], BLUE, "solid")])
    for suffix in ("png", "svg", "pdf"):
        files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for file in files:
            save(draw([panel]), file)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_labels_are_short_distinct_and_on_one_line() -> None:
    long = "one two three four"
    found = labels(["cf", "a\nb", long, f"{long} {long}", f"{long} - {long}", "\x1b[31m"], most=12)
    # Of 12 characters one is the ellipsis, 3 (a third of the rest) the end and 8 the start. The
    # later ones leave 4 characters to their numbers: 5 at the start and 2 at the end, without the
    # white space beside the ellipsis.
    assert found == {
        "cf": "cf",
        "a\nb": "a b",
        long: "one two\N{HORIZONTAL ELLIPSIS}our",
        f"{long} {long}": "one t\N{HORIZONTAL ELLIPSIS}ur (2)",
        f"{long} - {long}": "one t\N{HORIZONTAL ELLIPSIS}ur (3)",
        "\x1b[31m": "\\x1b[31m",
    }


def test_labels_with_odd_characters_are_drawn_as_they_are() -> None:
    words = ["$\\frac{1}{2$", "\u65e5\u672c", "a $ b $ c"]
    texts = [f"{word} of a row" for word in words]
    heat = Heat(texts, ["0.1"], [[0.5]] * 3, [[False]] * 3, (0.0, 1.0))
    panels = [Panel(f"{word} title", "heat", Axis(word), Axis(""), heat=heat) for word in words]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, *_ = draw(panels).axes
    shown = [tick.get_text().replace("\\$", "$") for tick in first.get_yticklabels()]
    # The font of the figure has no Japanese.
    assert shown == [texts[0], "\\u65e5\\u672c of a row", texts[2]]


def test_bars_that_have_the_same_short_name_stay_two_bars() -> None:
    names = [f"{'w' * 150}{middle}{'w' * 150}" for middle in "ab"]
    bars = [Series("unlearn", [1.0, 2.0], names, BLUE)]
    (axes,) = draw([Panel("", "bars", Axis("seconds"), Axis("", "category"), bars)]).axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 2.0]
    assert len({bar.get_y() for bar in axes.patches}) == 2
    assert len({tick.get_text() for tick in axes.get_yticklabels()}) == 2
