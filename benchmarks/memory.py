"""Peak memory of a run, including the weights."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: str) -> None:
    """Reset the peak; where the system cannot, `peak_bytes` is that of the process so far."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text("5")  # 5: the peak of the resident set
    except OSError:
        return


def peak_bytes(device: str) -> int | None:
    """Bytes allocated on a GPU, bytes resident on a CPU; None if the system does not report it."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return next((int(kib) * 1024 for kib in found), None)
