"""The page's charts as files, for papers and slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from btu.drawing import FORMATS, draw, save
from btu.errors import UserError, unknown
from orchestrator.report.charts import Chart, charts
from orchestrator.results.source import Source, records_or_refuse

# The panels of one file; further panels go to further files.
MOST_PANELS = 24


def write_figures(source: Source, folder: Path, formats: Iterable[str] = ("pdf",)) -> list[Path]:
    """Write a sweep's charts as NAME.FORMAT into a folder; return the files.

    A chart of more than `MOST_PANELS` panels continues in NAME-2.FORMAT; one without data is not
    written. The folder is made where it is missing.

    Raises:
        UserError: a format is unknown, no cell is finished, or the folder cannot be written.
    """
    formats = list(formats)
    for name in formats:
        if name not in FORMATS:
            raise unknown("figure format", name, FORMATS)
    records = records_or_refuse(source)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder for the figures.")
    drawn = charts(records, source.tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(_written(drawn, folder, formats))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); name another folder for the "
            "figures."
        ) from error


def _written(drawn: Iterable[Chart], folder: Path, formats: Sequence[str]) -> Iterator[Path]:
    for chart in drawn:
        for number, start in enumerate(range(0, len(chart.panels), MOST_PANELS), 1):
            figure = draw(chart.panels[start : start + MOST_PANELS])
            stem = chart.name if number == 1 else f"{chart.name}-{number}"
            for suffix in formats:
                path = folder / f"{stem}.{suffix}"
                save(figure, path)
                yield path
