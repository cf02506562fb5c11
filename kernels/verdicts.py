"""What verdicts are made of: measures, draws, scores and answers, of one row or of a tile of rows.

Shared by ``routing`` (any number of rows) and ``residual`` (few rows, at the end of an update), so
that both decide alike. Formulas are those of ``ops.fused_routes``; scores, agreements and moves go
by the names that ``ops.routes`` gives them. All in fp32.
"""

import triton
import triton.language as tl

from fastskip.ops.routes import EPSILON as ROW_EPSILON

TINY = tl.constexpr(1e-30)
EPSILON = tl.constexpr(ROW_EPSILON)


@triton.jit
def draw(position, salt):
    """``u`` in (0, 1]: the bits of ``routes.draw``."""
    value = (position.to(tl.uint32) * 0x9E3779B1) ^ salt.to(tl.uint32)
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    value = value ^ (value >> 16)
    return ((value >> 8) + 1).to(tl.float32) * (1 / (1 << 24))


@triton.jit
def measure(before, after, product, difference):
    """Cosine and relative change of rows, of sums over each: ``in^2``, ``out^2``, ``in * out``,
    ``(out - in)^2``."""
    cosine = product / tl.maximum(tl.sqrt(before * after), TINY)
    change = tl.sqrt(difference) / tl.maximum(tl.sqrt(before), TINY)
    return cosine, change


@triton.jit
def score(SCORE: tl.constexpr, cosine, change, square, product, bias, position, salt, D):
    """How much rows wish to skip. ``square``, ``product``: sums of ``h^2`` and ``weight * h``."""
    if SCORE == "cosine":
        return cosine
    elif SCORE == "change":
        return -change
    elif SCORE == "linear":
        return -(product * tl.rsqrt(square / D + EPSILON) + bias)
    else:
        tl.static_assert(SCORE == "random")
        return -draw(position, salt)


@triton.jit
def answer(score, bar):
    """1 where a row runs, else 0. NaN is not at the bar, so it runs."""
    return tl.where(score >= bar, 0, 1)
