"""The track's sampler with gradients through all its steps, in the activation memory of one.

Plain back-propagation holds the activations of every pass of the network. Here each (guided)
prediction is checkpointed: its input latent is kept, and the network runs again when the backward
pass comes to it. Between predictions a solver only adds, scales and clips latents, so that all
samplers can be followed as they are, those with a history of predictions too. What a step leaves
behind is a latent or two, however large the network.

Source: the time-step gradient checkpointing of EcoDiff (Zhang et al. 2026, "Learnable Sparsity for
Vision Generative Models"), which recomputes whole steps of a solver without history.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from prunebench.diffusion.sampling import Sampler
from prunebench.models.conditions import Condition

Around = Callable[[], AbstractContextManager]


class Trajectory(Sampler):
    """A Sampler whose `latents` and `denoise` can be differentiated at any number of steps.

    Args:
        around: makes what is entered around every prediction, that of the backward pass included:
            for instance masks on the model. Both passes of a guided prediction see the same.
        generators: what `around` draws from; the backward pass draws the same numbers again and
            leaves the generators as they were. One that is not named goes on instead, and the
            gradients belong to other draws than the latents do.

    The rest is as for Sampler. Metered models count the recomputed passes too.
    """

    def __init__(
        self,
        *given: object,
        around: Around = nullcontext,
        generators: Sequence[Generator] = (),
        **named: object,
    ):
        super().__init__(*given, **named)
        self.around, self.generators = around, tuple(generators)

    def latents(self, y: Condition, seeds: Sequence[int]) -> Tensor:
        """Follow the sampler from seeded noise, [N, C, H, W]; no autoencoder decodes them.

        Args:
            y: the conditions, on the model's device.
            seeds: of each image's noise, the start and what a sampler adds on the way.
        """
        randomness = [Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in randomness])
        return self.denoise(noise.to(self.device), y, randomness)

    def predict(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """As Sampler's; where gradients are on, only the inputs are kept for the backward pass."""
        if not torch.is_grad_enabled():
            return self._surrounded(x, t, y)
        states = [generator.get_state() for generator in self.generators]

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _replayed(self.generators, states)

        # To the end, or the hooks that meter the network would not see the second pass.
        with set_checkpoint_early_stop(False):
            return checkpoint(self._surrounded, x, t, y, use_reentrant=False, context_fn=contexts)

    def _surrounded(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        with self.around():
            return super().predict(x, t, y)


@contextmanager
def _replayed(generators: Sequence[Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Inside, generators draw from earlier states on; afterwards from where they were."""
    now = [generator.get_state() for generator in generators]
    _set(generators, states)
    try:
        yield
    finally:
        _set(generators, now)


def _set(generators: Sequence[Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
