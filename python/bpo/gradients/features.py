"""What stands for a response: coordinates, how they are caught, and the check that they are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.gradients.capture import Plan, sum_gradients
from bpo.gradients.layers import Slot, UnsupportedModelError
from bpo.gradients.plan import first_plan, kind_of, probe, probe_rows, to_modules, to_whole

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.gradients.layers import Consumer, Layer
    from bpo.policy.logprobs import CompletionLogps, Forward
# Largest relative error of the self-check, by the precision of the model's arithmetic.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# The self-check looks at so many coordinates at most (256 MB a response), of every kind of parameter at least one.
_CHECKED_COORDINATES = 1 << 26


class Features:
    """Coordinates of the gradient, and how to catch them.

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

    def parts(self) -> dict[str, int]:
        """Returns the coordinates of each kind of parameter, layers taken together, the largest first."""
        parts: dict[str, int] = {}
        for name, slot in self.slots.items():
            parts[kind_of(name)] = parts.get(kind_of(name), 0) + slot.size
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

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

    def plan(self, forward: Forward) -> Plan:
        """Finds out, on two short responses, how every gradient can be caught, and checks that it is right.

        Args:
            forward: The model these features are of, frozen, and the responses.

        Returns:
            The plan.

        Raises:
            UnsupportedModelError: The model's output for a response depends on the other responses of its batch, or the
                gradients of a batch are not those of its responses alone.
        """
        rows = probe_rows(forward.tokenized)
        calls = probe(forward, rows)
        plan = first_plan(forward.model, calls, self.layers, self.loose)
        wrong = self._wrong(forward, plan, rows)
        # A module around may use the parameters of a layer without calling it; else only the whole model will do.
        for escalate in (to_modules, to_whole):
            if wrong:
                escalate(plan, {name: self.slots[name] for name in wrong}, forward.model, calls)
                wrong = self._wrong(forward, plan, rows)
        if wrong:
            worst = sorted(wrong, key=lambda name: -wrong[name])[:5]
            named = ", ".join(f"{name} ({wrong[name]:.1e})" for name in worst)
            raise UnsupportedModelError(
                f"The per-sample gradients of {len(wrong)} parameters are not those of the responses alone: {named} "
                "(error relative to the whole gradient). Leave their modules out with SelectConfig.parameters."
            )
        return plan

    def catch(self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], consume: Consumer) -> CompletionLogps:
        """Hands the coordinates of a batch of responses to ``consume``; see :func:`sum_gradients`."""
        return sum_gradients(forward, plan, rows, consume)

    def _wrong(self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Returns the parameters whose gradients in a batch are not those of each response alone, and the errors."""
        names = self._checked()
        tolerance = _SELF_CHECK_TOLERANCE.get(forward.autocast or forward.model.dtype, 0.1)
        together, logps = self._caught(forward, plan, rows, names)
        errors: dict[str, float] = {}
        for index in range(len(rows)):
            exact, logp = self._exact(forward, plan, rows[index : index + 1], names)
            if not abs(logps[index] - logp) <= tolerance * abs(logp) and np.isfinite(logp):
                raise UnsupportedModelError(
                    f"log π of a response is {logps[index]:.6g} in a batch of two, but {logp:.6g} alone: in this model "
                    "responses of one batch act on one another, so no gradient of a single response exists."
                )
            norm = sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5
            if not (np.isfinite(norm) and norm > 0):
                continue  # NaN and zero gradients are flagged in the store and named later
            for name, gradient in exact.items():
                error = float((together[name][index] - gradient[0]).norm()) / norm
                if not error <= tolerance:
                    errors[name] = max(error, errors.get(name, 0.0))
        return errors

    def _checked(self) -> list[str]:
        """The parameters that the self-check looks at: one of every kind, then the others while there is room."""
        kinds: dict[str, str] = {}
        for name in self.slots:
            kinds.setdefault(kind_of(name), name)
        names, room = [], _CHECKED_COORDINATES
        for name in dict.fromkeys([*kinds.values(), *self.slots]):
            if self.slots[name].size <= room:
                names.append(name)
                room -= self.slots[name].size
        return names

    def _caught(
        self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], names: list[str]
    ) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.float32]]:
        """The gradients of some parameters, (n, size) each, and the log-probabilities, as the plan catches them."""
        by_offset = {self.slots[name].offset: torch.zeros(len(rows), self.slots[name].size) for name in names}

        def keep(offset: int, gradients: torch.Tensor, samples: slice) -> None:
            if offset in by_offset:
                by_offset[offset][samples] += gradients.cpu()

        logps = self.catch(forward, plan, rows, keep).logps
        return {name: by_offset[self.slots[name].offset] for name in names}, logps.cpu().numpy()

    def _exact(
        self, forward: Forward, plan: Plan, row: npt.NDArray[np.int64], names: list[str]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """The gradients of a response alone, (1, size) each, and its log-probability."""
        gradients, logps = self._caught(forward, plan, row, names)
        return gradients, float(logps[0])

    def warn_of_gaps(self, model: PreTrainedModel) -> None:
        """Says what of the model the gradients say nothing of, where that is worth knowing."""
