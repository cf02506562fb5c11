"""What `fastskip train` works on: policy, examples, masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastskip.commands.common import resolve_policy

if TYPE_CHECKING:
    from fastskip.study.pruning import WeightMasks
    from fastskip.study.training import Settings

DEMO_POLICY = "every_nth_block"
DEMO_SCENES, DEMO_HELD_OUT = 1000, 64


def policy_for(
    policy: str | None,
    path: str,
    config: Any,
    *,
    demo: bool,
    learns_routers: bool,
    out: Path,
    seed: int,
) -> Any:
    """The policy to train under; linear routers without a weight file get untrained weights."""
    if demo and policy is None:
        if not learns_routers:
            return resolve_policy(DEMO_POLICY, path, config)
        from fastskip.policy import RouterRule, SkipPolicy

        rule = RouterRule(
            "2:7", ["image", "text"], ["block"], "linear", 0.0, weights="untrained.safetensors"
        )
        chosen = SkipPolicy(routers=(rule,), name="demo routers")
    else:
        chosen = resolve_policy(policy, path, config)
    if not learns_routers:
        return chosen
    weights = [chosen.path_of(rule.weights) for rule in chosen.routers if rule.weights]
    if not weights or any(file.exists() for file in weights):
        return chosen
    from fastskip.families import shape_of
    from fastskip.study.training.gates import fresh_routers

    shape = shape_of(config)
    return fresh_routers(chosen, shape.depth, shape.hidden_size, out / "untrained", seed)


def examples_of(
    *,
    demo: bool,
    data: Path | None,
    images: Path | None,
    held_out: Path | None,
    settings: "Settings",
) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """What to train on, and what to measure on."""
    from fastskip.study.training import JsonLines

    skip = settings.skip_broken
    measured = None if held_out is None else JsonLines(held_out, images, skip_broken=skip)
    if not demo:
        assert data is not None
        return JsonLines(data, images, skip_broken=skip), measured
    from fastskip.demo.scenes import Split

    learned = _Scenes(DEMO_SCENES, Split.TRAIN, settings.seed)
    return learned, measured or _Scenes(DEMO_HELD_OUT, Split.VALIDATION, settings.seed)


class _Scenes(Sequence[Any]):
    """Questions about generated images, which are drawn on access."""

    def __init__(self, count: int, split: Any, seed: int) -> None:
        from fastskip.demo.evaluation import held_out

        self._items = held_out(count, seed, split=split)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        from fastskip.demo.scenes import draw
        from fastskip.study.training import Example, Turn

        scene, question = self._items[index]
        where = f"generated scene {index}"
        return Example((Turn(question.text, question.answer),), (draw(scene),), where)


def masks_of(mask: Path | None) -> "WeightMasks | None":
    """The masks of a file."""
    if mask is None:
        return None
    from fastskip.study.pruning import WeightMasks

    return WeightMasks.load(mask)
