"""What stands for a response: the gradient of a fresh adapter, a trained one or some parameters, or an embedding."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bpo.capture import (
    Consumer,
    Embedding,
    Layer,
    Linear,
    Plan,
    Replay,
    Slot,
    UnsupportedModelError,
    by_autograd,
    floating_tensors,
    map_tensors,
    sum_gradients,
)
from bpo.config import SelectConfig
from bpo.data import warn
from bpo.logprobs import CompletionLogps, Forward, predicting_positions
from bpo.models import base_of
from bpo.store import EMBEDDED
from bpo.tokens import TokenizedResponses

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

# Norms, biases and the like stay below this share of the weights.
_UNADAPTED_SHARE = 0.05
# Largest relative error of the self-check, by the precision of the model's arithmetic.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# The self-check looks at so many coordinates at most (256 MB a response), of every kind of parameter at least one.
_CHECKED_COORDINATES = 1 << 26
# Two responses of at least so many tokens: with fewer, positions could be mistaken for samples.
_PROBE_TOKENS = 4


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
            parts[_kind(name)] = parts.get(_kind(name), 0) + slot.size
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
        rows = _probe_rows(forward.tokenized)
        calls = _probe(forward, rows)
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
        """Hands the coordinates of a batch of responses to ``consume``; see :func:`bpo.capture.sum_gradients`."""
        return sum_gradients(forward, plan, rows, consume)

    def _planned(self, model: PreTrainedModel, calls: dict[str, _Call]) -> Plan:
        plan = Plan()
        replays = plan.replays
        uncalled: list[Layer | str] = []
        for layer in self.layers:
            call = calls.get(layer.name)
            if call is None:
                uncalled.append(layer)
            elif call.separable or call.head:
                plan.layers.append(layer)
            elif (replay := _replay_around(_parent(layer.name), model, calls, replays)) is not None:
                replay.layers.append(layer)
            else:
                plan.whole.update(_slots_of(layer))
        for name, slot in self.loose.items():
            if _parent(name) not in calls:
                uncalled.append(name)
            elif (replay := _replay_around(_parent(name), model, calls, replays)) is not None:
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
            around = around or _replay_around(_parent(_parent(name)), model, calls, replays)
            if around is not None:
                around.parameters[name[len(around.name) + 1 :]] = self.loose[name]
            else:
                plan.whole[name] = self.loose[name]
        _merge(replays)
        return plan

    def _to_modules(self, model: PreTrainedModel, plan: Plan, calls: dict[str, _Call], wrong: Collection[str]) -> None:
        """Takes parameters by autograd from the nearest module that can be run again, in place of their layer."""
        for layer in _layers_of(plan, wrong, self.slots):
            replay = _replay_around(_parent(layer.name), model, calls, plan.replays)
            for name, slot in _slots_of(layer).items():
                if replay is None:
                    plan.whole[name] = slot
                else:
                    replay.parameters[name[len(replay.name) + 1 :]] = slot
        _merge(plan.replays)

    def _to_whole(self, _: PreTrainedModel, plan: Plan, __: dict[str, _Call], wrong: Collection[str]) -> None:
        """Takes parameters by autograd from the whole model, in place of all else."""
        offsets = {self.slots[name].offset for name in wrong}
        _layers_of(plan, wrong, self.slots)
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
            kinds.setdefault(_kind(name), name)
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


class FreshAdapter(Features):
    """The B-gradients of a fresh LoRA on every linear layer, without touching the model.

    A fresh adapter adds B·A·x with B = 0, so it does not change the forward pass; its A-gradients are zero and its
    B-gradient is Σ_t g_t (A x_t)ᵀ with g_t the gradient at the layer's own output (LoRA, arXiv 2106.09685, with
    α/r = 1). So nothing has to be attached: A is drawn as PEFT draws it (Kaiming uniform, a = √5, that is
    U(−1/√in, 1/√in)) from the seed and the layer's name, and layer inputs are reduced to A·x on the way forward.

    Experts fused into one weight (experts, out, in) get an A each: B's gradient is that of the weight, times Aᵀ.

    Args:
        model: A causal language model without adapter.
        rank: Rows of A.
        seed: Of A.
        patterns: Shell patterns for the names of the weights to adapt; None for all.

    Raises:
        UnsupportedModelError: No weight that an adapter could be put on.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int, patterns: Sequence[str] | None = None) -> None:
        super().__init__()
        self.rank = rank
        self._patterns = patterns
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is head:
                continue
            if is_linear(module) and _matches(f"{name}.weight", patterns):
                out_features, in_features = _linear_shape(module)
                a = _uniform(seed, name, (rank, in_features)).to(module.weight.device)
                transposed = not isinstance(module, nn.Linear)
                slot = self._slot(f"{name}.weight", (out_features, rank), right=a, transposed=transposed)
                self.layers.append(Linear(name, module, slot))
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                full_name = f"{name}.{attribute}"
                if _is_fused_experts(module, parameter) and _matches(full_name, patterns):
                    experts, out_features, in_features = parameter.shape
                    a = _uniform(seed, full_name, (experts, rank, in_features)).to(parameter.device)
                    self.loose[full_name] = self._slot(full_name, (experts, out_features, rank), right=a)
        if not self.slots:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no linear layers to put an adapter on"
                + ("; use features='full'." if patterns is None else f" whose weights match {list(patterns)}.")
            )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        return {"kind": "fresh LoRA B", "rank": self.rank, "names": _digest(self.slots), "coordinates": self.dim}

    def warn_of_gaps(self, model: PreTrainedModel) -> None:
        """Says how much of the model lies outside of what LoRA adapts, unless that was asked for."""
        if self._patterns is not None:
            return
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        adapted = {id(model.get_parameter(name)) for name in self.slots}
        head = model.get_output_embeddings()
        adapted |= embeddings | ({id(parameter) for parameter in head.parameters()} if head is not None else set())
        left = {name: p.numel() for name, p in model.named_parameters() if id(p) not in adapted}
        share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
        if share > _UNADAPTED_SHARE:
            largest = max(left, key=lambda name: left[name])
            warn(
                f"{share:.0%} of the weights are in no layer that is adapted, such as {largest}: the gradients say "
                "nothing of them."
            )


class Parameters(Features):
    """The gradients of real parameters of the model: a trained adapter, everything, or what matches some patterns.

    Args:
        model: The model.
        names: Parameters, as in ``named_parameters()``.
        factor_dim: Where given, the gradient G of a linear layer or embedding that is larger than that on both sides is
            kept as P · G · Qᵀ with random signs P (factor_dim, out) and Q (factor_dim, in), divided by √factor_dim:
            ⟨P G Qᵀ, P H Qᵀ⟩ has the mean ⟨G, H⟩.
        seed: Of P and Q.
    """

    def __init__(
        self, model: PreTrainedModel, names: Sequence[str], factor_dim: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.factor_dim = factor_dim
        wanted = set(names)
        by_identity: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if name in wanted:
                by_identity[id(parameter)] = name
        # Tied weights have several owners and one slot: their contributions add up.
        for name, module in model.named_modules():
            owned = {
                attribute: by_identity[id(parameter)]
                for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in by_identity
            }
            table = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
            closed = table or _has_closed_form(module)
            for attribute, parameter_name in owned.items():
                if parameter_name not in self.slots:
                    factored = factor_dim if closed and attribute == "weight" else None
                    transposed = closed and not table and not isinstance(module, nn.Linear)
                    self._add(parameter_name, module.get_parameter(attribute), factored, transposed, seed)
                if not closed:
                    self.loose[f"{name}.{attribute}"] = self.slots[parameter_name]
            if owned and table:
                self.layers.append(Embedding(name, module, self.slots[owned["weight"]]))
            elif owned and closed:
                weight, bias = (self.slots[owned[key]] if key in owned else None for key in ("weight", "bias"))
                self.layers.append(Linear(name, module, weight, bias))

    def _add(self, name: str, parameter: torch.Tensor, factor_dim: int | None, transposed: bool, seed: int) -> None:
        if factor_dim is None or min(parameter.shape) <= factor_dim:
            self._slot(name, parameter.shape, transposed=transposed)
            return
        shape = reversed(parameter.shape) if transposed else parameter.shape
        left, right = (
            _signs(seed, f"{name} {side}", (factor_dim, size)).to(parameter.device)
            for side, size in zip(("left", "right"), shape, strict=True)
        )
        self._slot(name, (factor_dim, factor_dim), left=left, right=right, transposed=transposed)

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        described = {"kind": "parameters", "names": _digest(self.slots), "coordinates": self.dim}
        return described if self.factor_dim is None else {**described, "factor_dim": self.factor_dim}

    def _exact(
        self, forward: Forward, plan: Plan, row: npt.NDArray[np.int64], names: list[str]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """By autograd, which knows nothing of hooks and plans."""
        kept, logp = by_autograd(forward, {name: self.slots[name] for name in names}, row)
        return {
            name: kept[name].cpu() if name in kept else torch.zeros(1, self.slots[name].size) for name in names
        }, logp


class ResponseEmbeddings(Features):
    """The mean of the policy's last hidden states over the positions that predict the response, without a backward.

    Those are the inputs of the output head, so what the decoder says of each token of the response just before it
    comes. Hidden states share one large direction; it cancels in the difference of two responses, which is the feature
    of a pair under every loss that depends on this difference alone *(ours)*. Token weights weigh log π only.

    Args:
        model: A causal language model, with or without an adapter.

    Raises:
        UnsupportedModelError: A model that does not say which module lies below its output head.
    """

    noun = "embeddings"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        base = base_of(model)
        self._decoder: nn.Module = base.base_model
        if self._decoder is base:
            raise UnsupportedModelError(
                f"{type(base).__name__} has no decoder apart from its output head (base_model_prefix="
                f"{base.base_model_prefix!r} names no module), so its last hidden states cannot be had. Use "
                "features='lora' or 'full'."
            )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        return {"kind": EMBEDDED}

    def plan(self, forward: Forward) -> Plan:
        """Checks, on two short responses, that an embedding does not depend on the batch; there is nothing to plan.

        Raises:
            UnsupportedModelError: It does.
        """
        plan = Plan()
        rows = _probe_rows(forward.tokenized)
        if not self.slots:
            sizes: list[int] = []
            self.catch(forward, plan, rows, lambda _, embeddings, __: sizes.append(embeddings.shape[1]))
            self._slot("last hidden state", sizes[:1])
        wrong = self._wrong(forward, plan, rows)
        if wrong:
            raise UnsupportedModelError(
                f"The embedding of a response depends on the other responses of its batch (relative difference "
                f"{max(wrong.values()):.1e})."
            )
        return plan

    def catch(self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], consume: Consumer) -> CompletionLogps:
        """Hands the embeddings of a batch of responses to ``consume``, in one forward."""
        predicting = predicting_positions(forward.tokenized, rows)
        width = predicting.shape[1] + 1
        caught: list[torch.Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0]
            if hidden.shape[:-1] != (len(rows), width):
                raise UnsupportedModelError(
                    f"{type(self._decoder).__name__}: its output has shape {tuple(hidden.shape)}, in which {len(rows)} "
                    f"samples of {width} tokens cannot be told apart."
                )
            mask = predicting.to(hidden.device)[..., None]
            # Filled, not multiplied: padding may be NaN.
            total = hidden[:, :-1].float().masked_fill(~mask, 0).sum(dim=1)
            caught.append(total / mask.sum(dim=1).clamp(min=1))

        handle = self._decoder.register_forward_hook(hook)
        try:
            with torch.inference_mode():
                logps = forward.logps(rows)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise UnsupportedModelError(
                f"{type(forward.model).__name__} ran its {type(self._decoder).__name__} {len(caught)} times in one "
                "forward, so its last hidden states cannot be told."
            )
        consume(0, caught[0], slice(0, len(rows)))
        return logps


def choose_features(model: PreTrainedModel, config: SelectConfig) -> Features:
    """Decides what stands for a response (``SelectConfig.features`` and ``SelectConfig.parameters``).

    A ``PeftModel`` gives the gradients of its trainable parameters, ``modules_to_save`` included; where every B of a
    LoRA is zero (never trained), its A is left out, since A's gradients are exactly zero then.

    Raises:
        UnsupportedModelError: An adapter whose gradients cannot be had by sample, or patterns that match nothing.
    """
    peft_config = getattr(model, "peft_config", None)
    if peft_config is not None and not hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries an adapter without being a PeftModel. Pass the path of the adapter, or a "
            "model made by PeftModel.from_pretrained or get_peft_model."
        )
    if config.features == "embeddings":
        if peft_config is not None:
            _check_adapters(model)
        return ResponseEmbeddings(model)
    if config.features == "lora" and peft_config is None:
        return FreshAdapter(model, config.lora_rank, config.sketch_seed, config.parameters)
    names = [name for name, _ in model.named_parameters()]
    if config.features == "lora":
        names = _adapter_parameters(model)
    names = [name for name in names if _matches(name, config.parameters)]
    if not names:
        raise UnsupportedModelError(
            f"No parameter of {type(model).__name__} matches SelectConfig.parameters={list(config.parameters or ())}."
        )
    integer = [name for name in names if not model.get_parameter(name).is_floating_point()]
    if integer:
        raise UnsupportedModelError(
            f"{integer[0]} is quantized to {model.get_parameter(integer[0]).dtype} and has no gradient. Use "
            "features='lora', which needs the layers' inputs and outputs only, or leave it out with "
            "SelectConfig.parameters."
        )
    return Parameters(model, names, config.factor_dim, config.sketch_seed)


def _adapter_parameters(model: PreTrainedModel) -> list[str]:
    """The parameters that training would change: those that require a gradient, else those of the active adapters."""
    _check_adapters(model)
    parameters = dict(model.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not names:  # loaded for inference: everything is frozen
        names = [name for name in parameters if any(f".{adapter}." in f"{name}." for adapter in model.active_adapters)]
    b_names = [name for name in names if ".lora_B." in name]
    if b_names and not any(bool(parameters[name].any()) for name in b_names):
        names = [name for name in names if ".lora_A." not in name]
    return names


def _check_adapters(model: PreTrainedModel) -> None:
    """Refuses adapters that change the tokens, or that take no part in the forward pass."""
    for name in model.active_adapters:
        if model.peft_config[name].is_prompt_learning:
            kind = getattr(model.peft_config[name].peft_type, "value", model.peft_config[name].peft_type)
            raise UnsupportedModelError(
                f"The adapter '{name}' is of type {kind}, which puts tokens in front of the prompt: those are not the "
                "tokens that bpo differentiates. Pass a model with another adapter, or without one."
            )
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True or getattr(module, "disable_adapters", False) is True:
            raise UnsupportedModelError(
                f"{name}: its adapter is merged or disabled, so it takes no part in the forward pass. Unmerge or "
                "enable it, or pass the model without adapter."
            )


@dataclasses.dataclass
class _Call:
    """What a module was given and gave back on the way of a gradient, as far as samples are concerned."""

    rules: list[str]
    output: int
    output_rule: str
    head: bool

    @property
    def separable(self) -> bool:
        return self.output_rule != "shared" and self.rules[:1] not in ([], ["shared"])


def _probe(forward: Forward, rows: npt.NDArray[np.int64]) -> dict[str, _Call]:
    """Runs two responses through the model and notes how every module that has a part in the gradient sees them."""
    size, width = len(rows), int(forward.tokenized.lengths[rows].max())
    n_predicting = int(predicting_positions(forward.tokenized, rows).sum())
    calls: dict[str, _Call] = {}

    def rule(tensor: torch.Tensor) -> str:
        first = tensor.shape[0] if tensor.dim() else 0
        return {size: "samples", size * width: "tokens"}.get(first, "shared")

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rules: list[str] = []
            map_tensors((args, kwargs), lambda given: rules.append(rule(given)))
            shape = next((given.shape for given in args if isinstance(given, torch.Tensor)), torch.Size())
            head = shape[:-1] == (1, n_predicting)

            def note(call: _Call, _: torch.Tensor) -> None:
                if calls.setdefault(name, call) != call:
                    calls[name] = _Call([], 0, "shared", head=False)  # called in ways that cannot be told apart

            for index, tensor in enumerate(floating_tensors(output)):
                if not tensor.requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(True)
                if tensor.requires_grad:
                    call = _Call(rules, index, rule(tensor), head)
                    tensor.register_hook(functools.partial(note, call))  # type: ignore[no-untyped-call]

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in forward.model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad():
            forward.logps(rows).logps.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _probe_rows(tokenized: TokenizedResponses) -> npt.NDArray[np.int64]:
    """Two short responses, of different length where there are such, so that padding has a part."""
    order = np.argsort(tokenized.lengths, kind="stable")
    eligible = order[tokenized.lengths[order] >= _PROBE_TOKENS]
    if len(eligible) < 2:
        return order[-2:]
    longer = eligible[tokenized.lengths[eligible] > tokenized.lengths[eligible[0]]]
    return np.array([eligible[0], longer[0] if len(longer) else eligible[1]])


def _replay_around(
    name: str, model: PreTrainedModel, calls: dict[str, _Call], replays: dict[str, Replay]
) -> Replay | None:
    """The nearest module around a name, itself included, that can be run again for one sample."""
    while name:
        call = calls.get(name)
        if call is not None and call.separable:
            return replays.setdefault(
                name, Replay(name, model.get_submodule(name), call.rules, call.output, call.output_rule)
            )
        name = _parent(name)
    return None


def _merge(replays: dict[str, Replay]) -> None:
    """Takes replays within others into these: each module is run again once."""
    for name in sorted(replays, key=len):
        outer = next((replay for prefix, replay in replays.items() if name.startswith(f"{prefix}.")), None)
        if outer is not None:
            inner = replays.pop(name)
            within = name[len(outer.name) + 1 :]
            outer.parameters.update({f"{within}.{key}": slot for key, slot in inner.parameters.items()})
            outer.layers.extend(inner.layers)


def _layers_of(plan: Plan, names: Collection[str], slots: dict[str, Slot]) -> list[Layer]:
    """Takes the layers that give the gradients of some parameters out of the plan."""
    offsets = {slots[name].offset for name in names}
    taken: list[Layer] = []
    for layers in (plan.layers, *(replay.layers for replay in plan.replays.values())):
        found = [layer for layer in layers if any(slot.offset in offsets for slot in _slots_of(layer).values())]
        taken += found
        layers[:] = [layer for layer in layers if layer not in found]
    return taken


def _slots_of(layer: Layer) -> dict[str, Slot]:
    slots = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
    return {f"{layer.name}.{key}": slot for key, slot in slots.items() if slot is not None}


def _kind(name: str) -> str:
    """The name of a parameter without the number of its layer."""
    return re.sub(r"\b\d+\b", "*", name)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantized or not, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _has_closed_form(module: nn.Module) -> bool:
    """Whether the module is a linear layer that does nothing but its product: a subclass may scale or quantize."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _is_fused_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds the weights of several experts, (experts, ·, ·); convolutions have three sides, too."""
    return parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]  # Conv1D holds its weight transposed


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """PEFT's first values of A."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=_generator(seed, name))


def _signs(seed: int, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Random ±1/√rows."""
    bits = torch.randint(0, 2, shape, generator=_generator(seed, name), dtype=torch.int8)
    signs: torch.Tensor = (2.0 * bits - 1.0) / shape[0] ** 0.5
    return signs


def _digest(slots: dict[str, Slot]) -> str:
    shapes = [(name, tuple(slot.shape)) for name, slot in slots.items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
