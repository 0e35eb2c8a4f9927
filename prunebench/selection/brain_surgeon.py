"""Optimal Brain Surgeon on one matrix: what goes, and what the weights that stay become.

The output W X of a linear layer is kept in the sense of least squares when some of W's entries, or
whole columns, become zero; all it needs of X is H, a multiple of the sum of x x^T (Hassibi & Stork
1993; column by column as in SparseGPT, Frantar & Alistarh 2023, arXiv 2301.00774).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCK = 128  # columns whose mask is chosen at once, SparseGPT's


def spread(count: int, sizes: Sequence[int]) -> list[int]:
    """Shares of `count` in proportion to `sizes`, whole numbers that add up to it."""
    parts, before, seen = [], 0, 0
    for size in sizes:
        seen += size
        parts.append(round(count * seen / sum(sizes)) - before)
        before += parts[-1]
    return parts


def prune(
    weight: Tensor, moment: Tensor, target: int | tuple[int, int], damping: float
) -> tuple[Tensor, Tensor]:
    """Zero weights from left to right; what that costs goes to the columns behind (SparseGPT).

    Of `BLOCK` columns at once, or of M, those weights go whose w^2 / [H^-1]_jj is lowest.

    Args:
        weight: [rows, columns], float64.
        moment: H, [columns, columns].
        target: how many weights go; or (N, M), of which every M columns of a row keep N.

    Returns:
        The new weight, and which of its entries stay, bool.
    """
    weight, columns = weight.clone(), weight.shape[1]
    factor = upper_factor(weight, moment, damping)
    kept = torch.ones_like(weight, dtype=torch.bool)
    parts = torch.arange(columns).split(BLOCK if isinstance(target, int) else target[1])
    counts = spread(target, [len(part) for part in parts]) if isinstance(target, int) else []
    for place, part in enumerate(parts):
        start, end = part[0].item(), part[-1].item() + 1
        block, behind = factor[start:end, start:end], factor[start:end, start:]
        score = (weight[:, start:end] / block.diag()).square()
        stays = above(score, counts[place]) if counts else highest(score, target[0])
        weight[:, start:] -= errors(weight[:, start:end], block, stays) @ behind
        weight[:, start:end] *= stays
        kept[:, start:end] = stays
    return weight, kept


def errors(weight: Tensor, block: Tensor, stays: Tensor) -> Tensor:
    """What each weight of some columns that goes leaves to those behind, 0 for those that stay.

    Column by column it is e_j = (w_j - sum over i < j of e_i U_ij) / U_jj, U the factor of H^-1;
    for a row's columns that go that is a triangular system, e U = w.

    Args:
        weight, stays: [rows, columns].
        block: U of these columns.
    """
    gone = (~stays).to(weight)
    systems = block * gone.unsqueeze(2) * gone.unsqueeze(1) + torch.diag_embed(1 - gone)
    wanted = (weight * gone).unsqueeze(1)
    return torch.linalg.solve_triangular(systems, wanted, upper=True, left=False).squeeze(1)


def upper_factor(weight: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of H^-1; columns that never saw an input are zeroed in `weight`."""
    moment, dead = moment.clone(), moment.diag() == 0
    moment[dead, dead] = 1
    weight[:, dead] = 0
    moment.diagonal().add_(damping * moment.diag().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    return torch.linalg.cholesky(inverse, upper=True)


def above(score: Tensor, count: int) -> Tensor:
    """False for the `count` lowest of a matrix; of equal scores the first go."""
    kept = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    kept[score.flatten().argsort(dim=0, stable=True)[:count]] = False
    return kept.view(score.shape)


def highest(score: Tensor, n: int) -> Tensor:
    """True for the `n` highest of every row; of equal scores the first stay."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :n], True)


class Reader:
    """A matrix that loses columns, and the inverse of H over those that are left."""

    def __init__(self, parameter: nn.Parameter, moment: Tensor, damping: float):
        self.parameter, self.weight = parameter, parameter.detach().double().clone()
        factor = upper_factor(self.weight, moment, damping)
        self.inverse = factor.T @ factor

    def order(self, columns: Tensor) -> list[int]:
        """Channels from the lowest error to the highest; `columns` are theirs, [channels, k]."""
        blocks = torch.stack([self.inverse[c][:, c] for c in columns])
        scale = torch.linalg.cholesky(blocks).diagonal(dim1=1, dim2=2).square()
        errors = (self.weight[:, columns].square() / scale).sum(dim=(0, 2))
        return errors.argsort(dim=0, stable=True).tolist()

    def remove(self, columns: Tensor) -> None:
        """Zero columns [k] and solve for the others: W -= W_S [H^-1_SS]^-1 H^-1_S."""
        part = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.weight -= self.weight[:, columns] @ part
        self.inverse -= self.inverse[:, columns] @ part
        self.weight[:, columns] = 0
        self.inverse[columns, columns] = 1  # never asked again, but divided by

    def write(self) -> None:
        """Put the weight into the network."""
        self.parameter.data.copy_(self.weight)
