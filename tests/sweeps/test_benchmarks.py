"""The benchmarks follow the code that they measure: each can be imported and explains itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_explains_itself(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    # A dataclass with postponed annotations looks its module up there.
    monkeypatch.setitem(sys.modules, found.name, module)
    found.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert module.__doc__ is not None
    # argparse breaks lines where it likes.
    told = " ".join(capsys.readouterr().out.split())
    assert module.__doc__.splitlines()[0] in told
