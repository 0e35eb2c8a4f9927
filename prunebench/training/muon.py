"""Muon (Jordan et al. 2024), matrices of one shape at a time."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon with one batched orthogonalisation for all matrices of a shape.

    A small transformer has dozens of small matrices, whose products one by one took a fifth of a
    training step. Settings, state and results are those of torch's, up to bfloat16's rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; every parameter is a matrix [m, n]."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _by_shape(group["params"]):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        rows, columns = parameters[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        directions = orthogonalised(
            torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        directions = directions.to(parameters[0].dtype)
        torch._foreach_add_(parameters, list(directions.unbind()), alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    groups = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.shape].append(parameter)
    return list(groups.values())


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About U V^T of every matrix U S V^T of a batch [k, m, n], in bfloat16.

    Newton-Schulz iterations with the quintic of Jordan's Muon, which push singular values of
    matrices of norm 1 to about 1 (0.5 to 1.5).
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
