"""What stands for a response: coordinates, such as those of its gradient, and how to catch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bpo.gradients.capture import sum_gradients
from bpo.gradients.layers import Slot

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.gradients.capture import Plan
    from bpo.gradients.layers import Consumer, Layer
    from bpo.policy.logprobs import CompletionLogps, Forward


class Features:
    """Coordinates of a response, and how to catch them once a plan says by which way each comes.

    Attributes:
        dim: Number of coordinates.
        slots: Name of each parameter to where its gradient lies.
        layers: Candidates for a closed form.
        loose: Parameters without one, by the path of the module that owns them (a tied one has several).
        noun: What they are, in the plural.
    """

    noun = "gradients"

    def __init__(self) -> None:
        self.dim = 0
        self.slots: dict[str, Slot] = {}
        self.layers: list[Layer] = []
        self.loose: dict[str, Slot] = {}

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        raise NotImplementedError

    def learn_shapes(self, forward: Forward, rows: npt.NDArray[np.int64]) -> None:
        """Adds the slots that only a forward pass over some responses ((n,) of them) tells, where there are such."""

    def catch(self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], consume: Consumer) -> CompletionLogps:
        """Hands the coordinates of a batch of responses to ``consume``; see :func:`sum_gradients`."""
        return sum_gradients(forward, plan, rows, consume)

    def refusal(self, errors: Mapping[str, float]) -> str:
        """Says that what is caught in a batch is not what responses have alone: name → relative error."""
        worst = sorted(errors, key=lambda name: -errors[name])[:5]
        named = ", ".join(f"{name} ({errors[name]:.1e})" for name in worst)
        return (
            f"The per-sample gradients of {len(errors)} parameters are not those of the responses alone: {named} "
            "(error relative to its own). Leave their modules out with SelectConfig.parameters."
        )

    def warn_of_gaps(self, model: PreTrainedModel) -> None:
        """Says how much of the model is left out, where that is worth knowing."""

    def _slot(
        self,
        name: str,
        shape: Sequence[int],
        *,
        left: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
        transposed: bool = False,
    ) -> Slot:
        slot = Slot(self.dim, torch.Size(shape), left, right, transposed)
        self.slots[name] = slot
        self.dim += slot.size
        return slot
