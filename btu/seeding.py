"""One seed per cell; every random draw has a stream of its own, named after what it decides.

With named streams a draw does not change when another one is added or switched off: the poisoned
rows of a cell do not depend on whether exposure round 2 runs.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed of the stream called `names` under `seed`.

    Stable across processes, machines and Python versions (SHA-256, never ``hash``).
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
