"""Per-sample gradients of a model, exactly, from one forward and one backward over a batch.

The log-probabilities of the responses of a batch are summed and differentiated once. Hooks on the layers catch each
layer's inputs and output gradients, from which the gradient of every sample follows, since samples do not mix. Autograd
itself computes no parameter gradient, but for a self-check on two short responses: parameters are frozen and no
``.grad`` is allocated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bpo.config import SelectConfig
from bpo.data import warn
from bpo.logprobs import completion_logps
from bpo.tokens import TokenizedResponses

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

# Per-sample gradients of one parameter are formed for so many samples at a time that they stay below this.
_GRADIENT_BUFFER_BYTES = 256 << 20
# Norms, linear biases and the like stay below this; packed experts are far above.
_UNADAPTED_SHARE = 0.05
# Largest relative error of the self-check, by the precision of the model's arithmetic.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

Consumer = Callable[[int, torch.Tensor, slice], None]
"""Receives the coordinate at which a parameter starts, (n, size) gradients, and the part of the batch they are of."""

_WHOLE_BATCH = slice(None)


class UnsupportedModelError(ValueError):
    """The per-sample gradients of this model cannot be had exactly; the message names the modules or parameters."""


class FreshAdapter:
    """The B-gradients of a fresh LoRA on every linear layer, without touching the model.

    A fresh adapter adds B·A·x with B = 0, so it does not change the forward pass; its A-gradients are zero and its
    B-gradient is Σ_t g_t (A x_t)ᵀ with g_t the gradient at the layer's own output (LoRA, arXiv 2106.09685, with
    α/r = 1). So nothing has to be attached: A is drawn as PEFT draws it (Kaiming uniform, a = √5, that is
    U(−1/√in, 1/√in)) from the seed and the layer's name, and layer inputs are reduced to A·x on the way forward.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int) -> None:
        head = model.get_output_embeddings()
        self.layers: list[tuple[str, nn.Module, torch.Tensor, int]] = []
        self.seen: set[int] = set()  # coordinates of the layers that gave a gradient
        self.dim = 0
        for name, module in model.named_modules():
            if module is head or not _is_linear(module):
                continue
            out_features, in_features = _linear_shape(module)
            generator = torch.Generator().manual_seed(_seed_of(seed, name))
            bound = in_features**-0.5
            a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
            self.layers.append((name, module, a, self.dim))
            self.dim += out_features * rank
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no linear layers to put an adapter on; use features='full'."
            )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        rank = self.layers[0][2].shape[0]
        return {"kind": "fresh LoRA B", "rank": rank, "layers": len(self.layers), "coordinates": self.dim}

    def attach(self, batch: _Batch, consume: Consumer) -> list[Any]:
        """Registers the hooks; returns their handles."""
        return [
            module.register_forward_hook(self._hook(name, a, offset, batch, consume))
            for name, module, a, offset in self.layers
        ]

    def _hook(self, name: str, a: torch.Tensor, offset: int, batch: _Batch, consume: Consumer) -> Callable[..., None]:
        placed: dict[torch.device, torch.Tensor] = {}

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            x = batch.by_sample(name, inputs[0].detach())
            if x.device not in placed:
                placed[x.device] = a.to(x.device)
            reduced = x.float() @ placed[x.device].T  # (n, t, r)

            def on_gradient(gradient: torch.Tensor) -> None:
                self.seen.add(offset)
                g = batch.by_sample(name, gradient).float()  # (n, t, out)
                consume(offset, torch.bmm(g.transpose(1, 2), reduced).flatten(1), _WHOLE_BATCH)  # (n, out * r)

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def self_check(self, *_: Any) -> None:
        """Nothing to compare with: the adapter exists in the algebra only (its exactness is a test of bpo)."""

    def warn_of_gaps(self, model: PreTrainedModel) -> None:
        """Says which layers never gave a gradient, and how much of the model has no linear layer to adapt.

        Packed experts of a mixture are such a case: no linear layer, so no adapter, in PEFT as here.
        """
        silent = [name for name, _, _, offset in self.layers if offset not in self.seen]
        if silent:
            warn(f"{len(silent)} of {len(self.layers)} linear layers gave no gradient, such as {silent[0]}.")
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        adapted = {id(parameter) for _, module, _, _ in self.layers for parameter in module.parameters()}
        head = model.get_output_embeddings()
        adapted |= embeddings | ({id(parameter) for parameter in head.parameters()} if head is not None else set())
        left = {name: p.numel() for name, p in model.named_parameters() if id(p) not in adapted}
        share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
        if share > _UNADAPTED_SHARE:
            largest = max(left, key=lambda name: left[name])
            warn(
                f"{share:.0%} of the weights are outside linear layers, such as {largest}: a LoRA adapter does not "
                "train them, and the gradients say nothing of them."
            )


class Parameters:
    """The gradients of real parameters of the model: a trained adapter, or everything.

    Linear layers, embeddings and GPT-2's Conv1D have closed forms; any other module that owns parameters is
    differentiated by itself, one sample at a time, from its recorded input and output gradient.
    """

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        wanted = set(names)
        self.model = model
        self.slots: dict[str, tuple[int, torch.Size]] = {}
        self.dim = 0
        by_identity: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if name in wanted:
                self.slots[name] = (self.dim, parameter.shape)
                self.dim += parameter.numel()
                by_identity[id(parameter)] = name
        # Tied weights have several owners and one slot: their contributions add up.
        self.owners: list[tuple[str, nn.Module, dict[str, str]]] = []
        for module_name, module in model.named_modules():
            owned = {
                attribute: by_identity[id(parameter)]
                for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in by_identity
            }
            if owned:
                self.owners.append((module_name, module, owned))

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        digest = hashlib.sha256(repr([(name, tuple(shape)) for name, (_, shape) in self.slots.items()]).encode())
        return {"kind": "parameters", "names": digest.hexdigest()[:16], "coordinates": self.dim}

    def attach(self, batch: _Batch, consume: Consumer) -> list[Any]:
        """Registers the hooks; returns their handles."""
        return [
            module.register_forward_hook(self._hook(name, module, owned, batch, consume), with_kwargs=True)
            for name, module, owned in self.owners
        ]

    def _hook(
        self, name: str, module: nn.Module, owned: dict[str, str], batch: _Batch, consume: Consumer
    ) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if batch.replaying:
                return
            if not isinstance(output, torch.Tensor):
                raise UnsupportedModelError(
                    f"{name} ({type(module).__name__}) owns parameters and returns {type(output).__name__}, not one "
                    "tensor, so its gradients cannot be told apart by sample. Use features='lora'."
                )
            if not output.requires_grad:
                output.requires_grad_(True)
            x = args[0].detach() if args else next(iter(kwargs.values())).detach()

            def on_gradient(gradient: torch.Tensor) -> None:
                for attribute, parameter_name in owned.items():
                    offset, shape = self.slots[parameter_name]
                    step = max(1, _GRADIENT_BUFFER_BYTES // (4 * shape.numel()))
                    n = batch.size
                    for start in range(0, n, step):
                        samples = slice(start, min(start + step, n))
                        consume(offset, _per_sample(module, attribute, name, x, gradient, batch, samples), samples)

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def self_check(self, tokenized: TokenizedResponses, pad_id: int) -> None:
        """Compares with autograd, one sample at a time, on the two shortest responses.

        Raises:
            UnsupportedModelError: The gradients differ; the message names the parameters that differ most.
        """
        rows = np.argsort(tokenized.lengths, kind="stable")[:2]
        hooked = torch.zeros(len(rows), self.dim)

        def keep(offset: int, gradients: torch.Tensor, samples: slice) -> None:
            hooked[samples, offset : offset + gradients.shape[1]] += gradients.cpu()

        sum_gradients(self.model, self, tokenized, rows, pad_id, keep)
        parameters = dict(self.model.named_parameters())
        chosen = [parameters[name] for name in self.slots]
        errors: dict[str, float] = {}
        tolerance = _SELF_CHECK_TOLERANCE.get(self.model.dtype, 0.1)
        for parameter in chosen:
            parameter.requires_grad_(True)
        for index in range(len(rows)):
            logp = completion_logps(self.model, tokenized, rows[index : index + 1], pad_id)
            exact = torch.autograd.grad(logp.sum(), chosen, allow_unused=True)
            flat = [
                torch.zeros(parameter.numel()) if gradient is None else gradient.float().flatten().cpu()
                for parameter, gradient in zip(chosen, exact, strict=True)
            ]
            norm = torch.cat(flat).norm()
            if not (torch.isfinite(norm) and norm > 0):
                continue  # NaN and zero gradients are flagged in the store and named later
            for (name, (offset, shape)), gradient in zip(self.slots.items(), flat, strict=True):
                error = float((hooked[index, offset : offset + shape.numel()] - gradient).norm() / norm)
                if not error <= tolerance:
                    errors[name] = max(error, errors.get(name, 0.0))
        for parameter in chosen:
            parameter.requires_grad_(False)
        if errors:
            worst = sorted(errors, key=lambda name: -errors[name])[:5]
            named = ", ".join(f"{name} ({errors[name]:.1e})" for name in worst)
            raise UnsupportedModelError(
                f"The per-sample gradients of {len(errors)} parameters differ from autograd's by more than {tolerance} "
                f"of the whole gradient: {named}. Their modules mix the samples of a batch, or their parameters are "
                "used without calling the module. Pass the model without adapter and features='lora'."
            )

    def warn_of_gaps(self, _: PreTrainedModel) -> None:
        """Nothing is left out: these are the parameters that were asked for."""


class _Batch:
    """Size and width of the batch in flight, for hooks that must tell its samples apart."""

    size = 0
    width = 0
    replaying = False  # a module is being differentiated by itself; its hooks must not record that

    def by_sample(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (n, t, features) of a tensor whose leading dimensions are samples and positions, flattened or not."""
        if tensor.dim() >= 3 and tensor.shape[0] == self.size:
            return tensor.flatten(1, -2)
        if tensor.dim() == 2 and tensor.shape[0] == self.size * self.width:
            return tensor.view(self.size, self.width, -1)
        raise UnsupportedModelError(
            f"{name}: its input has shape {tuple(tensor.shape)}, in which {self.size} samples of {self.width} tokens "
            "cannot be told apart (mixture-of-experts layers regroup tokens). This model is not supported yet."
        )


def sum_gradients(
    model: PreTrainedModel,
    features: FreshAdapter | Parameters,
    tokenized: TokenizedResponses,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    consume: Consumer,
) -> torch.Tensor:
    """Runs one forward and one backward over a batch and hands every parameter's per-sample gradients to ``consume``.

    Args:
        model: A causal language model with frozen parameters (see :func:`bpo.models.inference_state`).
        features: Which gradients to form.
        tokenized: Token ids of all responses.
        rows: (n,) which of them form the batch.
        pad_id: Padding token.
        consume: Receives offset, (n', size) gradients and, for parameters, the slice of the batch they belong to.

    Returns:
        (n,) float32 log-probabilities of the responses.
    """
    batch = _Batch()
    batch.size = len(rows)
    batch.width = int(tokenized.lengths[rows].max())

    def require_gradient(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    # The graph starts at the embedded tokens: with all parameters frozen nothing else would need one.
    handles = [model.get_input_embeddings().register_forward_hook(require_gradient)]
    handles += features.attach(batch, consume)
    try:
        with torch.enable_grad():
            logps = completion_logps(model, tokenized, rows, pad_id)
            logps.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return logps.detach()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _has_closed_form(module: nn.Module) -> bool:
    """Whether the module is a linear layer that does nothing but its product: a subclass may scale or quantise."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]  # Conv1D holds its weight transposed


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _per_sample(
    module: nn.Module,
    attribute: str,
    name: str,
    x: torch.Tensor,
    gradient: torch.Tensor,
    batch: _Batch,
    samples: slice,
) -> torch.Tensor:
    """Returns the (n', size) float32 gradients of one parameter of one module, for a slice of the batch."""
    parameter = getattr(module, attribute)
    if _has_closed_form(module):
        g = batch.by_sample(name, gradient)[samples].float()  # (n', t, out)
        if attribute == "bias":
            return g.sum(dim=1)
        inputs = batch.by_sample(name, x)[samples].float()  # (n', t, in)
        left, right = (g, inputs) if isinstance(module, nn.Linear) else (inputs, g)
        return torch.bmm(left.transpose(1, 2), right).flatten(1)
    if x.shape[0] != batch.size or gradient.shape[0] != batch.size:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) gets an input of shape {tuple(x.shape)}, whose first dimension is not "
            f"the {batch.size} samples of the batch. Use features='lora'."
        )
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        g, ids = gradient[samples].float(), x[samples]  # (n', t, d), (n', t)
        rows = torch.zeros(g.shape[0], *parameter.shape, device=g.device)
        for index in range(g.shape[0]):
            rows[index].index_add_(0, ids[index], g[index])
        if module.padding_idx is not None:
            rows[:, module.padding_idx] = 0
        return rows.flatten(1)
    parameters = {key: value.detach() for key, value in module.named_parameters(recurse=False)}
    gradients = []
    for index in range(*samples.indices(batch.size)):
        leaf = parameters[attribute].clone().requires_grad_(True)
        batch.replaying = True
        try:
            with torch.enable_grad():
                output = torch.func.functional_call(module, {**parameters, attribute: leaf}, (x[index : index + 1],))
        finally:
            batch.replaying = False
        gradients.append(torch.autograd.grad(output, leaf, gradient[index : index + 1])[0].float().flatten())
    return torch.stack(gradients)


def choose_features(model: PreTrainedModel, config: SelectConfig) -> FreshAdapter | Parameters:
    """Decides what is differentiated (``SelectConfig.features``).

    A ``PeftModel`` gives the gradients of its trainable adapter; where every B is zero (never trained) those of B
    alone, since the A-gradients are exactly zero then.

    Raises:
        UnsupportedModelError: An adapter type whose gradients cannot be had by sample.
    """
    peft_config = getattr(model, "peft_config", None)
    if peft_config is not None and not hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries an adapter without being a PeftModel. Pass the path of the adapter, or a "
            "model made by PeftModel.from_pretrained or get_peft_model."
        )
    if config.features == "full":
        return Parameters(model, [name for name, _ in model.named_parameters()])
    if peft_config is None:
        return FreshAdapter(model, config.lora_rank, config.sketch_seed)
    kinds = {str(getattr(entry.peft_type, "value", entry.peft_type)) for entry in peft_config.values()}
    if kinds != {"LORA"}:
        raise UnsupportedModelError(f"Only LoRA adapters are supported, the model has {sorted(kinds)}.")
    if any(getattr(entry, "use_dora", False) for entry in peft_config.values()):
        raise UnsupportedModelError("DoRA adapters are not supported: their magnitudes mix with the LoRA gradients.")
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True or getattr(module, "disable_adapters", False) is True:
            raise UnsupportedModelError(
                f"{name}: its adapter is merged or disabled, so it takes no part in the forward pass. Unmerge or "
                "enable it, or pass the model without adapter."
            )
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        active = model.active_adapter
        trainable = [name for name, _ in model.named_parameters() if "lora_" in name and f".{active}." in name]
    parameters = dict(model.named_parameters())
    b_names = [name for name in trainable if ".lora_B." in name]
    if b_names and not any(bool(parameters[name].any()) for name in b_names):
        trainable = [name for name in trainable if ".lora_A." not in name]
    return Parameters(model, trainable)
