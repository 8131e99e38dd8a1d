"""A parsed page: rows by cell key, text, embedded figures."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Read(HTMLParser):
    """A page: its table by cell key, its text, what it links to, its embedded figures.

    labels: the label of each chart's first panel, which a screen reader reads out.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.heads: list[str] = []
        self.links: list[str] = []
        self.panels: list[tuple[str, int]] = []
        self.labels: dict[str, str] = {}
        self.words, self.json, self.policy = "", "", ""
        self._row: list[str] = []
        self._in: str | None = None
        self._exact: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("src", "href", "data", "action") if name in given]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "th":
            self.heads.append(given["data-name"])
        if tag == "tr" and given.get("id", "").startswith("cell-"):
            self._row = self.rows.setdefault(given["id"].removeprefix("cell-"), [])
        if tag == "td":
            self._row.append(given.get("data-v", ""))
            self._exact = given.get("data-v")
        if "data-panel" in given:
            self.labels.setdefault(given["data-chart"], given["aria-label"])
            self.panels.append((given["data-chart"], int(given["data-panel"])))
        self._in = given.get("id", "code") if tag in ("script", "style") else tag

    def handle_data(self, data: str) -> None:
        if self._in == "figures":
            self.json += data
        elif self._in == "td" and self._exact is None:
            self._row[-1] += data
        if self._in not in ("figures", "plotly", "code"):
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def value(self, key: str, column: str) -> str:
        return self.rows[key][self.heads.index(column)]

    @property
    def figures(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = json.loads(self.json)
        return found
