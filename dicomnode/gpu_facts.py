"""Names of the NVIDIA GPUs and their driver, from /proc: no library, no device file, so any process may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path("/proc/driver/nvidia")


def gpu_facts(folder: Path = FOLDER) -> dict[str, Any]:
    """``devices``: model names; ``driver``: its version line. Both empty without a driver."""
    try:
        driver = folder.joinpath("version").read_text(errors="replace").splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        driver = ""
    devices = []
    for path in sorted(folder.glob("gpus/*/information")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        devices += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return {"devices": devices, "driver": driver}
