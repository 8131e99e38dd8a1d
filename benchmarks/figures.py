"""Bars and figures of the benchmarks: what was found, whether a bar was met, and on which machine.

Every benchmark judges through `Judge`. A bar of structure (each cell has a run, results are equal)
is always judged. A bar of speed needs a quiet machine: ``--no-bars`` reports what was found and
leaves it unjudged. `Judge.end` writes the figures with ``--json FILE``, and exits with 1 if a bar
was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from btu.provenance import code_version

PACKAGES = ("torch", "transformers", "ray", "mlflow")
# A path of this machine, alone or as the value of an option or of KEY=VALUE.
_PATH = re.compile(r"(?:(?<==)|^)(?:~|\.{1,2})?/(?:[^\s/]+/)*([^\s/]+)/?$")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks have."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--no-bars", action="store_true", help="do not judge speed (structure is always judged)"
    )


def count(text: str) -> int:
    """Return a number from the command line that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


@dataclass
class Judge:
    """The bars and figures of one run of a benchmark.

    name: the benchmark's name.
    json: where `end` writes the figures; None writes none.
    speed: whether bars of speed are judged.
    figures: what was measured, by name.
    """

    name: str
    json: Path | None = None
    speed: bool = True
    figures: dict[str, Any] = field(default_factory=dict)
    _bars: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, options: argparse.Namespace) -> Judge:
        """Return the judge of a benchmark with these options."""
        return cls(name, options.json, not options.no_bars)

    def structure(self, bar: str, found: str, met: bool) -> None:
        """Judge what has to hold on any machine."""
        self._add(bar, found, "met" if met else "MISSED")

    def fast(self, bar: str, found: str, met: bool) -> None:
        """Judge a speed or a size."""
        verdict = "met" if met else "MISSED"
        self._add(bar, found, verdict if self.speed else "not judged")

    def _add(self, bar: str, found: str, verdict: str) -> None:
        self._bars.append({"bar": bar, "found": found, "verdict": verdict})
        print(f"bar: {bar}: {found}, {verdict}", flush=True)

    @property
    def missed(self) -> list[str]:
        """The bars that were missed."""
        return [bar["bar"] for bar in self._bars if bar["verdict"] == "MISSED"]

    def end(self) -> NoReturn:
        """Write the figures, and exit: 0 if every judged bar was met."""
        if self.json is not None:
            content = {
                "benchmark": self.name,
                "command": command(sys.argv),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "commit": code_version(),
                "machine": machine(),
                "bars": self._bars,
                "figures": self.figures,
            }
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"figures: {self.json}")
        raise SystemExit(bool(self.missed))


def command(arguments: list[str]) -> str:
    """Return a command line without this machine's paths: a folder is FOLDER and its own name.

    The option ``--json`` is left out: it says where the figures went.
    """
    script, *rest = arguments
    words: list[str] = []
    skip = False
    for word in rest:
        if skip or word == "--json":
            skip = word == "--json"
        elif not word.startswith("--json="):
            words.append(_PATH.sub(lambda found: f"FOLDER/{found[1]}", word))
    return " ".join(["python", f"benchmarks/{Path(script).name}", *words])


def machine() -> dict[str, Any]:
    """Return what the speed of this machine depends on. Neither host names nor paths."""
    import psutil

    model, flags = _cpu()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "amx": "amx_bf16" in flags,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> tuple[str, set[str]]:
    """Return the name of the CPU and its features; the latter only where Linux lists them."""
    facts: Mapping[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        # Of several cores the first counts.
        facts = {k.strip(): v.strip() for k, _, v in reversed(list(lines))}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, set(facts.get("flags", "").split())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
