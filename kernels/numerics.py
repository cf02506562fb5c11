"""Loads, stores and products that are correct in Triton's interpreter too.

The interpreter computes bf16 arithmetic, comparisons and products on bit patterns, and truncates
where the device rounds to nearest even. So kernels compute in fp32 only, and load, round and
multiply through these functions; on a device they compile to the plain instructions.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load(pointer, mask=None):
    """Loads as fp32; masked elements are 0."""
    if mask is None:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 ``value`` rounded to nearest even in ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def store(pointer, value, mask=None):
    """Stores fp32 ``value``, rounded to the element type of ``pointer``."""
    tl.store(pointer, round_to(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, accumulator):
    """``a @ b + accumulator`` in fp32; operands of one storage dtype, no dimension below 16.

    fp32 operands are multiplied in full precision, not as TF32, and the products of each call are
    summed separately: a single chain of additions over a long row is less accurate than libraries.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    elif a.dtype == tl.float32:
        # The last argument has no meaning for fp32, but the compiler merges both sums into one
        # chain if it is 0.
        return accumulator + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")
