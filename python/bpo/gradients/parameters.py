"""The gradients of a fresh adapter, or of real parameters: a trained adapter, everything, or what matches patterns."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bpo.gradients.features import Features
from bpo.gradients.layers import Embedding, Linear
from bpo.policy.checks import UnsupportedModelError, device_of
from bpo.system.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bpo.gradients.layers import Slot


# Norms, biases and the like stay below this share of the weights.
_UNADAPTED_SHARE = 0.05


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
        of_weight: dict[int, Slot] = {}  # layers that share a weight, as Zamba's do, share its adapter
        for name, module in model.named_modules():
            if module is head:
                continue
            if is_linear(module) and matches(f"{name}.weight", patterns):
                if id(module.weight) in of_weight:
                    self.layers.append(Linear(name, module, of_weight[id(module.weight)]))
                    continue
                out_features, in_features = _linear_shape(module)
                a = _uniform(seed, name, (rank, in_features)).to(device_of(module, module.weight))
                transposed = not isinstance(module, nn.Linear)
                slot = self._slot(f"{name}.weight", (out_features, rank), right=a, transposed=transposed)
                self.layers.append(Linear(name, module, slot))
                of_weight[id(module.weight)] = slot
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                full_name = f"{name}.{attribute}"
                if _is_fused_experts(module, parameter) and matches(full_name, patterns):
                    transposed = getattr(module, "is_transposed", False) is True
                    experts, *sides = parameter.shape
                    out_features, in_features = reversed(sides) if transposed else sides
                    a = _uniform(seed, full_name, (experts, rank, in_features)).to(parameter.device)
                    shape = (experts, out_features, rank)
                    self.loose[full_name] = self._slot(full_name, shape, right=a, transposed=transposed)
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


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its class, quantized or not, or GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def _has_closed_form(module: nn.Module) -> bool:
    """Whether the module is a linear layer that does nothing but its product: a subclass may scale or quantize."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _is_fused_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds a weight for each of the experts that its module says it has, (experts, ·, ·).

    Convolutions, tables of positions and others have three sides, too.
    """
    experts = getattr(module, "num_experts", None)
    return parameter.dim() == 3 and parameter.shape[0] == experts and min(parameter.shape) > 1


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]  # Conv1D holds its weight transposed


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a name matches one of some shell patterns; None is all of them."""
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """PEFT's first values of A, rounded to bfloat16, so that they are the same in models of that type."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=_generator(seed, name)).bfloat16().float()


def _signs(seed: int, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Random ±1/√rows."""
    bits = torch.randint(0, 2, shape, generator=_generator(seed, name), dtype=torch.int8)
    signs: torch.Tensor = (2.0 * bits - 1.0) / shape[0] ** 0.5
    return signs


def _digest(slots: dict[str, Slot]) -> str:
    shapes = [(name, tuple(slot.shape)) for name, slot in slots.items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
