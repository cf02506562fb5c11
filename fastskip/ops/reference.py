"""The operations in plain torch: the definition of correctness and the CPU path.

Letters: ``N`` rows, ``D`` hidden size, ``F`` FFN size, ``H`` query heads, ``G`` key/value heads,
``K`` head dim, ``S`` cache slots. Nothing here knows about tokens, layers or policies. Every
function is out of place, and therefore safe for autograd, unless its name ends in ``_``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.contracts import Activation, Norm

_HALVES = (torch.bfloat16, torch.float16)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm or LayerNorm over the last axis, ``[N, D]``."""
    if norm.is_centred:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.epsilon)
    return rms_norm(x, norm.weight, norm.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis; the mean square is taken in fp32. ``[N, D]``."""
    if x.dtype in _HALVES:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    # In full precision nothing is cast, and these few steps cost half as much as torch's function.
    squares = x * x
    scale = squares.mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    if wants_gradient(x, weight):
        return x * scale * weight
    # Fresh memory from the system costs more than the arithmetic, so that of the squares is reused.
    return torch.mul(x, scale, out=squares).mul_(weight)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """``[N, 2F] -> [N, F]`` if gated, else ``[N, F] -> [N, F]``."""
    return gated_silu(x) if activation is Activation.GATED_SILU else F.relu(x)


def gated_silu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold both, gate first: ``[N, 2F] -> [N, F]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up) if not gate_up.requires_grad else F.silu(gate) * up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's half-split form: ``[N, H, K]`` with tables ``[N, 1, K]``.

    ``sine`` carries the sign: its first half is negated, so that the rotation is one roll, one
    product and one fused multiply-add.
    """
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)
