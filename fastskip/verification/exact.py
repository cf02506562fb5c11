"""Double precision where Hugging Face's decoders stay in single precision.

Their RMS norms and rotary tables compute in fp32 whatever the dtype of the model. A truth that an
fp32 result is measured against must not carry errors of that size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compute_in_double(decoder: nn.Module, keep: Callable[[Any], None]) -> None:
    """Hook a decoder's norms and rotary table to compute in fp64; `keep` receives the handles."""
    for module in decoder.modules():
        if hasattr(module, "variance_epsilon"):
            keep(module.register_forward_hook(_rms_norm))
        elif hasattr(module, "inv_freq"):
            keep(module.register_forward_hook(_rotary_table, with_kwargs=True))


def _rms_norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = args
    mean_square = x.square().mean(dim=-1, keepdim=True)
    normed: Tensor = x * torch.rsqrt(mean_square + module.variance_epsilon) * module.weight
    return normed


def _rotary_table(
    module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    angles = positions[..., None].double() * module.inv_freq.double()
    if hasattr(module, "mrope_section"):  # Hugging Face assigns an axis to each frequency
        cosine, sine = map(module.recomposition_frequencies, (angles.cos(), angles.sin()))
        return cosine * module.attention_scaling, sine * module.attention_scaling
    both_halves = torch.cat([angles, angles], dim=-1)
    return (
        both_halves.cos() * module.attention_scaling,
        both_halves.sin() * module.attention_scaling,
    )
