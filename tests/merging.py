"""What the tests of merged projections share: how models move, and what must hold afterwards."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def ids() -> Tensor:
    return torch.arange(10, 22).view(2, 6)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=ids()).logits
    return out


def assert_same_logits(actual: Any, expected: Any) -> None:
    """Two models with the same weights, one of them possibly merged."""
    theirs = logits(expected)
    # Plain fp32 code is off by about ten roundings of the largest logit in these models.
    allowed = 64 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    torch.testing.assert_close(logits(actual), theirs, rtol=0, atol=allowed)


def groups(model: Any) -> Iterator[list[nn.Linear]]:
    for layer in model.get_decoder().layers:
        for part, names in GROUPS.items():
            yield [getattr(getattr(layer, part), name) for name in names]


def is_merged(model: Any) -> bool:
    """Whether all weights and biases of each group lie one after the other in one storage."""
    return all(
        before.data_ptr() + before.nbytes == after.data_ptr()
        and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        for modules in groups(model)
        for name in ("weight", "bias")
        for before, after in zip(
            [getattr(module, name) for module in modules[:-1]],
            [getattr(module, name) for module in modules[1:]],
            strict=True,
        )
    )


def assert_equal_parameters(actual: Any, expected: Any) -> None:
    named = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == named.keys()
    for name, parameter in actual.named_parameters():
        assert torch.equal(parameter, named[name]), name


MOVES: dict[str, Callable[[Any], Any]] = {
    "to the same dtype": lambda m: m.to(torch.float32),
    "to the same device": lambda m: m.to("cpu"),
    "there and back": lambda m: m.to(torch.float64).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch_save_and_load(m),
    "load_state_dict": lambda m: load(m, m.state_dict()),
    "load_state_dict assign": lambda m: load(m, m.state_dict(), assign=True),
}


def torch_save_and_load(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def load(model: Any, state: dict[str, Tensor], **options: Any) -> Any:
    model.load_state_dict(state, strict=True, **options)
    return model
