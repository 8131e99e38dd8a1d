"""The files of a cell's result, and its records as strict JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

RESULT = "result.json"
CONFIG = "config.yaml"
TOKENS = "tokens.parquet"
ROWS = "rows.parquet"
FLAGGED = "flagged_tokens.json"
PLOT = "drift.png"


def dumps(record: Mapping[str, Any]) -> str:
    """Return JSON with NaN as null: strict JSON has no NaN."""
    return json.dumps(json_value(record), indent=1, allow_nan=False)


def loads(text: str | bytes) -> dict[str, Any]:
    """Read a record that `dumps` wrote; a metric that is null is NaN again."""
    return with_nan(json.loads(text))


def with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record from strict JSON with null metrics as NaN again."""
    metrics = record.get("metrics", {})
    return {**record, "metrics": {k: float("nan") if v is None else v for k, v in metrics.items()}}


def json_value(value: Any) -> Any:
    """Return a value for strict JSON: plain containers, NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    # NumPy's scalars, without importing it.
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value != value else value
