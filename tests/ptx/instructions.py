"""All instructions, by name."""

from tests.ptx import accesses, arithmetic, collectives

HANDLERS = {**arithmetic.INSTRUCTIONS, **accesses.INSTRUCTIONS, **collectives.INSTRUCTIONS}
