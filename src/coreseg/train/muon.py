"""Muon, an optimizer of matrices: every step is the momentum with all its singular values brought near 1.

As `torch.optim.Muon`, but in float32: that one works in bfloat16, which takes 26 times as long on a processor without
bfloat16 arithmetic (256 x 256, one thread, AVX2).

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the size of a step is AdamW's, Liu et al. (arXiv
2502.16982).
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of AdamW's usual step, as a share of the learning rate."""


def orthogonalised(matrix: Float[torch.Tensor, "rows columns"]) -> Float[torch.Tensor, "rows columns"]:
    """U V^T of the matrix's singular value decomposition, roughly: singular values end between some 0.7 and 1.2.

    By Newton-Schulz iterations; a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters that are matrices."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                ahead = parameter.grad.lerp(state["momentum_buffer"], MOMENTUM)
                size = RMS * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(ahead), alpha=-group["lr"] * size)
