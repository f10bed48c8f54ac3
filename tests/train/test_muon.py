"""Muon takes the steps of PyTorch's, without its rounding."""

import pytest
import torch

from coreseg.train.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_its_steps_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ends = []
    for optimizer_of in (
        lambda params: Muon(params, lr=0.01, weight_decay=0.1),
        lambda params: torch.optim.Muon(params, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        weights = torch.nn.Parameter(start.clone())
        optimizer = optimizer_of([weights])
        for gradient in gradients:
            weights.grad = gradient.clone()
            optimizer.step()
        ends.append(weights.detach() - start)
    ours, theirs = ends
    assert (ours - theirs).norm() < 0.02 * theirs.norm(), "theirs is rounded to bfloat16"


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(20, 50)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_gradient_of_zeros_and_none_at_all() -> None:
    weights, unused = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    weights.grad = torch.zeros(3, 2)
    Muon([weights, unused], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weights.detach(), torch.full((3, 2), 0.95))
    assert torch.equal(unused, torch.ones(3, 2))
