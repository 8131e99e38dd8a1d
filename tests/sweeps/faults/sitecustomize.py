"""Python runs this on start where its folder is on PYTHONPATH: stages wait or fail as told.

The file that BTU_FAULTS names says what befalls a stage, by its name; see `launching.Faults`. It is
read before every stage, so that a test can change it while a sweep runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

PATCHED = "btu.stages"


def patch(module: ModuleType) -> None:
    run_stage = module.run_stage

    def wrapped(node: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        fault = _fault(node)
        if "raises" in fault:
            raise RuntimeError(fault["raises"])
        if named.get("accumulation", 1) < fault.get("parts", 1):
            import torch

            raise torch.OutOfMemoryError("out of memory, as the test wants it")
        record = run_stage(node, *arguments, **named)
        # All files of the attempt are written by now, and none of it is committed.
        while _fault(node).get("held"):
            time.sleep(0.05)
        return record

    module.run_stage = wrapped


def _fault(node: dict[str, Any]) -> dict[str, Any]:
    faults: dict[str, Any] = json.loads(Path(os.environ["BTU_FAULTS"]).read_text())
    fault: dict[str, Any] = faults.get(node["name"], {})
    return fault


class Finder:
    """Patches a module as it is imported: importing it here would cost every process seconds."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


if "BTU_FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
