"""What goes into linear layers and convolutions, for methods that weigh weights by activations.

A weight is seen as a matrix [rows, columns], one row per output: for a convolution the columns of
one kernel position stand together, channel by channel, so that neighbours along the input
dimension are neighbours here (`matrix`, `unmatrix`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Take = Callable[[str, Tensor], None]  # of a weight's name and the inputs of its layer


def matrix(weight: Tensor) -> Tensor:
    """A weight [out, in] or [out, in, h, w] as [out, columns]."""
    return weight.movedim(1, -1).flatten(1)


def unmatrix(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `matrix`: [out, columns] in the shape of a weight."""
    out, channels, *kernel = shape
    return values.reshape(out, *kernel, channels).movedim(-1, 1).contiguous()


@contextmanager
def watched(model: nn.Module, names: Sequence[str], take: Take) -> Iterator[None]:
    """Inside, `take` gets what goes into the layer of every named weight, pass by pass.

    Inputs of a linear layer are [..., columns], those of a convolution [N, C, H, W].
    """
    handles = []
    for name in names:

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            take(name, inputs[0].detach())

        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer's rows are multiplied with, [samples, columns] in the order of `matrix`."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    unfolded = nn.functional.unfold(
        inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    by_channel = unfolded.unflatten(1, (inputs.shape[1], -1))  # [N, channels, kernel, places]
    return by_channel.permute(0, 3, 2, 1).flatten(0, 1).flatten(1)


def squares(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Sum over samples of the squared inputs of every column, float64 [columns].

    Images are summed before they are unfolded, which needs the memory of one.
    """
    total = inputs.double().square()
    if isinstance(layer, nn.Linear):
        return total.flatten(0, -2).sum(0)
    return patches(layer, total.sum(0, keepdim=True)).sum(0)


def order_of_use(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[str]:
    """The names in the order in which `run` first uses their layers; unused ones last."""
    used: dict[str, None] = {}
    with watched(model, names, lambda name, _: used.setdefault(name)):
        run()
    return [*used, *(name for name in names if name not in used)]
