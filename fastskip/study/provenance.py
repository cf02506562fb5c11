"""The conditions of a measurement, as recorded in results and in policy provenance."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from fastskip import __version__
from fastskip.machine import device_name
from fastskip.wording import dtype_name


def circumstances(model: Any) -> dict[str, Any]:
    """The model, its dtype and device, package versions and the date, as plain data for JSON."""
    device = torch.device(model.device)
    return {
        "model": str(getattr(model, "name_or_path", "")),
        "dtype": dtype_name(model.dtype),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            "fastskip": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
