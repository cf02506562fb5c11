"""One `generate` call of one prompt, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fastskip.plan.costs import GenerationCost, Planned, generation_cost


@dataclass(frozen=True, slots=True)
class SingleCall:
    """Rows of a prompt at batch 1, and new tokens; `text_before` text rows precede the image."""

    n_image: int
    n_text: int
    text_before: int
    n_new: int

    def cost(self, plan: Planned) -> GenerationCost:
        """What the call costs under a plan; raises as `generation_cost` does."""
        return generation_cost(
            plan, self.n_image, self.n_text, self.n_new, text_before=self.text_before
        )

    def to_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return asdict(self)
