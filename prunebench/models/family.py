"""The interface of a model family: what its module `prunebench/models/<family>.py` offers.

A family is two files. Its settings and tiny instances, which planning reads without torch, are in
`prunebench/models/configs/<family>.py`; a third file, `<family>.yaml` beside the module, lists
configurations that its authors published, if any. docs/add_a_model.md adds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunebench.models.conditions import Condition
    from prunebench.models.units import Layer, Width

Granularity = Literal["stage", "whole", "block", "branch"]


class Network(Protocol):
    """The denoiser that a family builds, a torch.nn.Module.

    Attributes:
        null_class: the label of "no class"; None for a network that has none.
    """

    null_class: int | None

    def __call__(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """What it predicts for noisy images.

        Args:
            x: float [N, C, H, W].
            t: float [N], in the time of the objective the network is trained for.
            y: classes int64 [N], which a network without classes ignores; or what text encoders
                made of a prompt each, a mapping of tensors whose first axis is N.

        Returns:
            Float [N, C, H, W]: noise or velocity, whichever the objective asks for; or, for a
            network that predicts its variance too, [N, 2C, H, W].
        """


@runtime_checkable
class Family(Protocol):
    """A family's module. Every function takes networks that are pruned already, too.

    Names are those of the network's parameters and modules. Where the authors' checkpoints are
    named or stored otherwise, `LAYOUTS` says how: a mapping of names to
    `prunebench.models.official.Layout`, which a family without such checkpoints leaves out.
    """

    def build(self, config: Mapping[str, object]) -> nn.Module:
        """A new `Network` with random weights, drawn from torch's global generator.

        Args:
            config: settings that the family's `Config` accepts.
        """

    def layers(self, model: nn.Module, granularity: Granularity) -> list[Layer]:
        """What can be bypassed, in the order it runs: blocks, or the branches of blocks.

        `parameters` of a layer is what the network loses with it. Families whose blocks have one
        branch answer both alike. "whole" are blocks with the projections around them, and "stage"
        pairs of blocks and levels of a UNet, where a family has such; else they are "block".
        """

    def remove_layer(self, model: nn.Module, name: str) -> None:
        """Bypass a layer in place, as if it wrote nothing into the residual stream.

        Its parameters leave the network. Afterwards `layers` no longer lists it.
        """

    def copy_layer(self, model: nn.Module, name: str) -> None:
        """Run a `copyable` layer once more right behind itself (`prunebench.models.repeats`).

        The copy has weights of its own, equal to the layer's: `layer.parameters` more.
        """

    def widths(self, model: nn.Module) -> list[Width]:
        """Channels, heads or neurons that can be cut, with every tensor that they lie in.

        A width that may lose all of them says so; what was emptied is no longer listed.
        The network's input, output and time keep their size. Must work on the meta device.
        """

    def weights(self, model: nn.Module) -> list[str]:
        """Parameters (matrices, kernels) that may be masked one element at a time."""

    def features(self, model: nn.Module) -> dict[str, str | None]:
        """Modules whose outputs distillation compares, pruned networks' with the dense one's.

        Each goes with the parameter whose axis 0 holds the channels (axis 1) of that output, or
        None where no width governs it. Of an output that is a tuple the first element is compared.
        """

    def refresh(self, model: nn.Module) -> None:
        """Derive attributes that follow from the shapes of tensors, after these were cut."""
