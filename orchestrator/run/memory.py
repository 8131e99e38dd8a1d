"""The most memory that a stage took. Without Ray."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures from its creation on.

    Of the whole process: what a stage finds loaded counts too. Where the system cannot forget an
    earlier peak (anything but Linux), it is that of all stages that the process computed so far.
    """

    def __init__(self, *, gpu: bool) -> None:
        """gpu: whether the stage computes on CUDA."""
        self._gpu = gpu
        with suppress(OSError):
            _RESET.write_text("5")  # proc(5): the peak becomes what is resident now
        if gpu:
            import torch

            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    @property
    def bytes(self) -> int:
        """Resident memory of the process."""
        with suppress(OSError):
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024  # getrusage(2)

    @property
    def gpu_bytes(self) -> int:
        """Memory that tensors took on the device; 0 without one."""
        if not self._gpu:
            return 0
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
