"""The demo: scenes of coloured shapes, how to train a small LLaVA on them, and one so trained."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the bundled checkpoint, in the layout that the hub's LLaVA checkpoints have."""
    return Path(__file__).parent / "checkpoint"
