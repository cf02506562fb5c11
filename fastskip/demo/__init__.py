"""The demo: scenes of coloured shapes, a recipe for a small LLaVA, and a trained checkpoint."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the bundled checkpoint, in the layout of the hub's LLaVA checkpoints."""
    return Path(__file__).parent / "checkpoint"
