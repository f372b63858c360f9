"""What stands for a response, and the choice of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.gradients.capture import Plan, sum_gradients
from bpo.gradients.layers import Slot, UnsupportedModelError
from bpo.gradients.plan import (
    kind_of,
    merge_replays,
    parent_of,
    probe,
    probe_rows,
    replay_around,
    slots_of,
    take_layers,
)
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.gradients.layers import Consumer, Layer
    from bpo.gradients.plan import Call
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
        plan = self._planned(forward.model, calls)
        wrong = self._wrong(forward, plan, rows)
        # A module around may use the parameters of a layer without calling it; else only the whole model will do.
        for escalate in (self._to_modules, self._to_whole):
            if wrong:
                escalate(forward.model, plan, calls, wrong)
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

    def _planned(self, model: PreTrainedModel, calls: dict[str, Call]) -> Plan:
        plan = Plan()
        replays = plan.replays
        uncalled: list[Layer | str] = []
        for layer in self.layers:
            call = calls.get(layer.name)
            if call is None:
                uncalled.append(layer)
            elif call.separable or call.head:
                plan.layers.append(layer)
            elif (replay := replay_around(parent_of(layer.name), model, calls, replays)) is not None:
                replay.layers.append(layer)
            else:
                plan.whole.update(slots_of(layer))
        for name, slot in self.loose.items():
            if parent_of(name) not in calls:
                uncalled.append(name)
            elif (replay := replay_around(parent_of(name), model, calls, replays)) is not None:
                replay.parameters[name[len(replay.name) + 1 :]] = slot
            else:
                plan.whole[name] = slot
        # What had no part in two short responses: an expert that no token chose, or a parameter that a module around
        # its owner uses. It joins the module that is run again anyway; other layers wait for longer responses.
        for item in uncalled:
            name = item if isinstance(item, str) else item.name
            around = next((replay for prefix, replay in replays.items() if name.startswith(f"{prefix}.")), None)
            if not isinstance(item, str):
                (plan.layers if around is None else around.layers).append(item)
                continue
            around = around or replay_around(parent_of(parent_of(name)), model, calls, replays)
            if around is not None:
                around.parameters[name[len(around.name) + 1 :]] = self.loose[name]
            else:
                plan.whole[name] = self.loose[name]
        merge_replays(replays)
        return plan

    def _to_modules(self, model: PreTrainedModel, plan: Plan, calls: dict[str, Call], wrong: Collection[str]) -> None:
        """Takes parameters by autograd from the nearest module that can be run again, in place of their layer."""
        for layer in take_layers(plan, wrong, self.slots):
            replay = replay_around(parent_of(layer.name), model, calls, plan.replays)
            for name, slot in slots_of(layer).items():
                if replay is None:
                    plan.whole[name] = slot
                else:
                    replay.parameters[name[len(replay.name) + 1 :]] = slot
        merge_replays(plan.replays)

    def _to_whole(self, _: PreTrainedModel, plan: Plan, __: dict[str, Call], wrong: Collection[str]) -> None:
        """Takes parameters by autograd from the whole model, in place of all else."""
        offsets = {self.slots[name].offset for name in wrong}
        take_layers(plan, wrong, self.slots)
        for name, replay in list(plan.replays.items()):
            replay.parameters = {n: slot for n, slot in replay.parameters.items() if slot.offset not in offsets}
            if not replay.parameters and not replay.layers:
                del plan.replays[name]
        plan.whole.update({name: self.slots[name] for name in wrong})
        warn(
            f"The gradients of {len(wrong)} parameters, such as {next(iter(wrong))}, take a forward and a backward of "
            "the whole model for each response. Leave them out with SelectConfig.parameters if that is too slow."
        )

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
