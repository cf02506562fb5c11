"""What the demo compares: policies that suit a small model, gentle ones and harsh ones."""

from dataclasses import dataclass

from fastskip.policy import SkipPolicy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run the model; without a policy it is Hugging Face's own."""

    label: str
    policy: SkipPolicy | None = None

    @property
    def is_arrangement(self) -> bool:
        """Whether it saves launches rather than work, so that no floor says what it can gain."""
        return self.policy is not None and bool(self.policy.arrangements)


HF = Candidate("Hugging Face")
DENSE = Candidate("dense", SkipPolicy.preset("dense"))


def candidates(depth: int, quick: bool = False) -> tuple[Candidate, ...]:
    """Hugging Face, dense, and policies for a model of `depth` layers, kin together."""
    late, half, paired = 3 * depth // 8, depth // 2, depth // 2 * 2 - 2
    every = (
        HF,
        DENSE,
        _candidate(f"no image FFN from {late}", "image_ffn", start=late),
        _candidate("no image FFN at all", "image_ffn", start=0, end=depth),
        _candidate(f"image frozen from {late}", "frozen_visual", start=late),
        _candidate("image frozen from 1", "frozen_visual", start=1),
        _candidate(f"image gone after {half}", "visual_withdrawal", after=half),
        _candidate(f"image gone after {late - 1}", "visual_withdrawal", after=late - 1),
        _candidate("2nd blocks, image", "every_nth_block", scope="image"),
        _candidate("2nd FFNs, generated", "every_nth_ffn", scope="generated"),
        _candidate("2nd blocks, generated", "every_nth_block", scope="generated"),
        _candidate("2nd blocks, all tokens", "every_nth_block"),
        _candidate("parallel blocks", "parallel_blocks"),
        _candidate("block pairs", "block_pairs", start=2, end=paired),
    )
    return tuple(every[index] for index in QUICK) if quick else every


QUICK = (0, 1, 2, 4, 7, 10, 11)


def shown(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Those whose answers are printed beside the pictures: dense, a gentle and a harsh one."""
    labels = {"frozen_visual": None, "every_nth_block": None}
    for candidate in reversed(candidates):
        if candidate.policy is not None and candidate.policy.name in labels:
            labels[candidate.policy.name] = candidate
    return candidates


def _candidate(label: str, preset: str, **options: object) -> Candidate:
    return Candidate(label, SkipPolicy.preset(preset, **options))
