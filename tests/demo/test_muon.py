"""Muon against torch's, and the iteration against what it is for."""

import pytest
import torch

from fastskip.demo.muon import Muon, orthogonal

SHAPES = ((48, 24), (24, 48), (48, 24), (32, 32))


def test_updates_are_those_of_torch() -> None:
    """But for torch's products in bfloat16: so many digits agree."""
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    first = Muon(ours, lr=0.1)
    second = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [matrix.detach().clone() for matrix in ours]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            moved = (a - old).norm()
            assert moved > 0.1 and (a - b).norm() / moved < 0.03


@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 16, 40)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
    assert values.min() > 0.5 and values.max() < 1.4


def test_matrices_without_gradient_stay() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    Muon([matrix], lr=1.0).step()
    assert torch.equal(matrix, torch.ones(4, 4))


def test_the_state_goes_into_a_file_and_back() -> None:
    def made() -> tuple[torch.nn.Parameter, Muon]:
        matrix = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
        return matrix, Muon([matrix], lr=0.1)

    gradients = [torch.randn(3, 4) for _ in range(2)]
    whole, optimiser = made()
    for gradient in gradients:
        whole.grad = gradient
        optimiser.step()
    first, before = made()
    first.grad = gradients[0]
    before.step()
    second, after = made()
    second.data.copy_(first.data)
    after.load_state_dict(before.state_dict())
    second.grad = gradients[1]
    after.step()
    assert torch.equal(second, whole)
