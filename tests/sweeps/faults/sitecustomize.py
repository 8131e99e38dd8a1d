"""Python runs this on start where its folder is on PYTHONPATH: stages wait or fail on request.

The file that BTU_FAULTS names defines what happens to a stage, by its name or key: see
`launching.Workplace.fault`. It is read before every stage, so that a test can change it while a
sweep runs.
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


def patch_stages(module: ModuleType) -> None:
    run_stage = module.run_stage

    def wrapped(node: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        fault = _fault(node)
        if "raises" in fault:
            raise RuntimeError(fault["raises"])
        if named.get("accumulation", 1) < fault.get("parts", 1):
            import torch

            raise torch.OutOfMemoryError("out of memory, as the test wants it")
        if "tells" in fault:
            Path(fault["tells"]).write_text(json.dumps(dict(os.environ)))
        record = run_stage(node, *arguments, **named)
        # All files of the attempt are written by now, and none of it is committed.
        while _fault(node).get("held"):
            time.sleep(0.05)
        return record

    module.run_stage = wrapped


def patch_tracking(module: ModuleType) -> None:
    tell = module.Tracker._log_files

    def wrapped(*arguments: Any) -> None:
        # MLflow has the run by now, and nothing of what belongs into it.
        while _fault({"name": "tracking", "key": ""}).get("held"):
            time.sleep(0.05)
        tell(*arguments)

    module.Tracker._log_files = wrapped


PATCHES = {"btu.stages": patch_stages, "orchestrator.tracking.writer": patch_tracking}


def _fault(node: dict[str, Any]) -> dict[str, Any]:
    faults: dict[str, Any] = json.loads(Path(os.environ["BTU_FAULTS"]).read_text())
    fault: dict[str, Any] = faults.get(node["key"]) or faults.get(node["name"], {})
    return fault


class Finder:
    """Patches modules as they are imported; importing them here would cost seconds everywhere."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = run
        return spec


if "BTU_FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
