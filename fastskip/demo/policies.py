"""What the demo compares: mild and harsh ways to run a small model."""

from dataclasses import dataclass

from fastskip.policy import SkipPolicy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run the model; without a policy, it is Hugging Face's own.

    `is_quick`: `--quick` includes it. `is_shown`: its answers are printed under the pictures.
    """

    label: str
    policy: SkipPolicy | None = None
    is_quick: bool = False
    is_shown: bool = False

    @property
    def is_arrangement(self) -> bool:
        """Whether it saves launches rather than work, so that floors cannot say what it gains."""
        return self.policy is not None and bool(self.policy.arrangements)


HF = Candidate("Hugging Face", is_quick=True)
DENSE = Candidate("dense", SkipPolicy.preset("dense"), is_quick=True, is_shown=True)


def candidates(depth: int, quick: bool = False) -> tuple[Candidate, ...]:
    """Hugging Face, dense, and policies for a model of `depth` layers, similar ones together."""
    late, half, paired = 3 * depth // 8, depth // 2, depth // 2 * 2 - 2

    def preset(label: str, name: str, /, **options: object) -> Candidate:
        return Candidate(label, SkipPolicy.preset(name, **options))

    def main(label: str, name: str, /, *, shown: bool = False, **options: object) -> Candidate:
        return Candidate(label, SkipPolicy.preset(name, **options), True, shown)

    every = (
        HF,
        DENSE,
        main(f"no image FFN from {late}", "image_ffn", start=late),
        preset("no image FFN at all", "image_ffn", start=0, end=depth),
        main(f"image frozen from {late}", "frozen_visual", shown=True, start=late),
        preset("image frozen from 1", "frozen_visual", start=1),
        preset(f"image gone after {half}", "visual_withdrawal", after=half),
        main(f"image gone after {late - 1}", "visual_withdrawal", after=late - 1),
        preset("2nd blocks, image", "every_nth_block", scope="image"),
        preset("2nd FFNs, generated", "every_nth_ffn", scope="generated"),
        main("2nd blocks, generated", "every_nth_block", scope="generated"),
        main("2nd blocks, all tokens", "every_nth_block", shown=True),
        preset("parallel blocks", "parallel_blocks"),
        preset("block pairs", "block_pairs", start=2, end=paired),
    )
    return tuple(each for each in every if each.is_quick or not quick)
