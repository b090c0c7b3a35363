"""One figure of a benchmark, and the peak memory of a process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """One figure, and how it compares with its reference."""

    name: str
    value: float
    unit: str
    reference: str | None = None
    ratio: float | None = None


def peak_bytes() -> int:
    """Peak resident memory of this process; on Linux not ru_maxrss, which a child inherits from a larger parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
