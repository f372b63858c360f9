"""The frozen diagonal of Adam or Sophia: the gradient as the optimizer of a checkpoint would scale it.

Adam divides each coordinate by √v̂ + ε, v̂ the bias-corrected mean of squared gradients (Kingma & Ba, arXiv 1412.6980).
With v̂ frozen at what the checkpoint has, that is linear: the gradient of a pair still follows from those of its two
responses. LESS (arXiv 2402.04333) goes one step further: its denominator contains the square of the sample's own
gradient, and its numerator the momentum. Neither is offered. With a square in the denominator one row a response would
no longer do, and the momentum is the same vector for every sample.

Sophia (arXiv 2305.14342) moves by clip(m / (ρBh), 1), m the mean gradient, h that of the diagonal of the Hessian and B
the tokens of a step. That is m / max(ρBh, |m|); with this denominator frozen at what the checkpoint has it is linear,
too *(ours)*. Muon has no such factors: it moves by the whole momentum matrix with its singular values set to 1. SOAP's
squares are of the coordinates of another basis.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bpo.gradients.parameters import FreshAdapter
from bpo.system.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bpo.config import SelectConfig
    from bpo.gradients.features import Features

_OPTIMIZER = "optimizer.pt"

# Tokens of a step, which Sophia's step() takes for its Hessian and does not save; a Trainer leaves it at this default.
_SOPHIA_TOKENS = 5120
# What the authors' code adds to the denominator.
_SOPHIA_EPSILON = 1e-15

# How the states of other optimizers are recognised.
_OTHER_OPTIMIZERS = {
    "GG": "SOAP, whose second moments are those of another basis",
    "state1": "a bitsandbytes optimizer",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "momentum_buffer": "SGD",
    "exp_avg": "an optimizer that keeps no second moments, such as Lion",
}
_MUON = "Muon, which scales no coordinate: it sets the singular values of the momentum to 1"
_WHAT_TO_DO = "Train the checkpoint with one of the 32-bit AdamW, such as optim='adamw_torch' (bpo.warm_up does)"


class Preconditioner:
    """The factors 1 / (√v̂ + ε), or those of Sophia, of the coordinates of some features.

    Attributes:
        scales: (dim,) float32. Zero where the state is zero: the parameter got no gradient in training (the embedding
            of a token that did not occur), and dividing by ε alone would let it outweigh all others.
    """

    def __init__(self, scales: torch.Tensor) -> None:
        self.scales = scales
        self._placed: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def __call__(self, offset: int, gradients: torch.Tensor) -> torch.Tensor:
        """Returns (n, size) gradients of the coordinates from ``offset`` on, scaled, on their own device."""
        size = gradients.shape[1]
        key = offset, size, gradients.device
        if key not in self._placed:
            self._placed[key] = self.scales[offset : offset + size].to(gradients.device)
        return gradients * self._placed[key]

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the factors (hex)."""
        return hashlib.sha256(self.scales.numpy().data).hexdigest()


def preconditioner_path(model: Any, config: SelectConfig) -> str | None:
    """Returns the file that ``SelectConfig.preconditioner`` means, None where there is to be none.

    Args:
        model: What the policy is given as; ``"checkpoint"`` is the ``optimizer.pt`` in its directory.
        config: Settings.

    Raises:
        ValueError: ``"checkpoint"`` with a model that is not given by the path of a directory.
        FileNotFoundError: No such file.
    """
    if config.preconditioner is None:
        return None
    if config.preconditioner != "checkpoint":
        path = Path(config.preconditioner).expanduser()
    elif isinstance(model, (str, Path)) and Path(model).expanduser().is_dir():
        path = Path(model).expanduser()
    else:
        named = f"{model} is none" if isinstance(model, (str, Path)) else f"this is a {type(model).__name__}"
        raise ValueError(
            "SelectConfig.preconditioner='checkpoint' is the optimizer.pt in the directory of the model, but "
            f"{named}. Give the model by that path, or the path of its optimizer.pt as preconditioner."
        )
    if path.is_dir():
        path = path / _OPTIMIZER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Trainer writes optimizer.pt into its checkpoints unless save_only_model is set, or "
            "DeepSpeed or FSDP save the optimizer in parts; v̂ of those can be given as a .safetensors file of "
            "{parameter name: v̂}."
        )
    return str(path)


def load_preconditioner(path: str, model: PreTrainedModel, features: Features) -> Preconditioner:
    """Reads the second moments of Adam, or the state of Sophia, for the parameters that are differentiated.

    Two kinds of files are read, and nothing in them is executed:

    - ``optimizer.pt`` of a Trainer's checkpoint, by torch's restricted loader (``weights_only``), memory-mapped. It
      numbers the parameters; their names are ``param_names`` where the optimizer was given them, else Trainer's order:
      the parameters that require a gradient, those with weight decay first. β2 and ε, or ρ, are those of
      ``param_groups``. Sophia's is the state of the authors' ``SophiaG`` under a Trainer, which leaves the tokens of a
      step at 5,120.
    - ``.safetensors``: {parameter name: v̂}, already corrected for bias, for optimizers that write no ``optimizer.pt``.
      ε is ``eps`` of its metadata, else 1e-8, Adam's default.

    Args:
        path: The file.
        model: The policy, with the ``requires_grad`` it came with, or the adapter that was trained.
        features: What is differentiated.

    Returns:
        The factors, in the order of ``features``.

    Raises:
        ValueError: Features of a fresh adapter; a file that is no such state; the state of another optimizer or model;
            a parameter without state. The message names the file and the parameters.
    """
    if isinstance(features, FreshAdapter):
        raise ValueError(
            "SelectConfig.preconditioner needs the optimizer state of what is differentiated, and a fresh adapter has "
            "none. Run bpo.warm_up and pass what it returns as SelectConfig.checkpoints, pass a trained adapter, or, "
            "for a checkpoint of full fine-tuning, set features='full'."
        )
    if any(slot.projected for slot in features.slots.values()):
        raise ValueError(
            "SelectConfig.preconditioner scales single coordinates, which factor_dim does not keep; leave one of them "
            "out."
        )
    if path.endswith(".safetensors"):
        found = _from_safetensors(path, features)
    else:
        found = _from_optimizer(path, model, features)
    scales = torch.zeros(features.dim)
    for name, denominators in found:
        slot = features.slots[name]
        factors = (1 / denominators).masked_fill(denominators == 0, 0)
        scales[slot.offset : slot.offset + slot.size] = factors.flatten()
    untrained = int((scales == 0).sum())
    if untrained == features.dim:
        raise ValueError(f"{path}: every second moment is zero, so no gradient has reached the optimizer.")
    if untrained:
        warn(
            f"{path}: {untrained} of {features.dim} coordinates had no gradient in training (v̂ = 0); they are left "
            "out, since dividing by ε alone would let them outweigh all others."
        )
    return Preconditioner(scales)


_Denominators = Iterator[tuple[str, torch.Tensor]]
"""Parameter name, and float32 numbers of the parameter's shape that its gradient is divided by, 0 without a state."""


def _adams(path: str, name: str, second_moment: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Returns √v̂ + ε."""
    if not (torch.isfinite(second_moment).all() and (second_moment >= 0).all()):
        raise ValueError(f"{path}: the second moments of {name} are not all finite and at least 0.")
    return (second_moment.sqrt() + epsilon).masked_fill(second_moment == 0, 0)


def _sophias(path: str, name: str, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
    """Returns max(ρBh + ε, |m|)."""
    hessian, momentum, rho = state["hessian"].float(), state["exp_avg"].float(), float(group["rho"])
    if not (torch.isfinite(hessian).all() and torch.isfinite(momentum).all() and (hessian >= 0).all()):
        raise ValueError(f"{path}: the state of {name} is not finite, or its Hessian below 0.")
    if not 0 < rho < math.inf:
        raise ValueError(f"{path}: ρ = {rho} is none that Sophia takes.")
    denominators = torch.maximum(rho * _SOPHIA_TOKENS * hessian + _SOPHIA_EPSILON, momentum.abs())
    return denominators.masked_fill((hessian == 0) & (momentum == 0), 0)


def _from_safetensors(path: str, features: Features) -> _Denominators:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file: {error}") from None
    with file:
        known = set(file.keys())
        _check_complete(path, [name for name in features.slots if name not in known], features)
        try:
            epsilon = float((file.metadata() or {}).get("eps", 1e-8))
        except ValueError:
            epsilon = math.nan
        _check_hyperparameters(path, 0.0, epsilon)
        for name, slot in features.slots.items():
            _check_shape(path, name, tuple(file.get_slice(name).get_shape()), slot.shape)
        for name in features.slots:
            yield name, _adams(path, name, file.get_tensor(name).float(), epsilon)


def _from_optimizer(path: str, model: PreTrainedModel, features: Features) -> _Denominators:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors and plain values, and anything else is not executed: "
            f"{str(error).splitlines()[0]}"
        ) from None
    saved = saved if isinstance(saved, dict) else {}
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(states, dict) or not isinstance(groups, list) or not all("params" in group for group in groups):
        raise ValueError(f"{path} holds no optimizer state ('state' and 'param_groups').")
    index_of = _indices_by_name(path, groups, model)
    _check_complete(path, [name for name in features.slots if not states.get(index_of.get(name))], features)
    parameters = dict(model.named_parameters())
    group_of = {index: group for group in groups for index in group["params"]}
    for name, index in index_of.items():
        if states.get(index) and name in parameters:
            kept = _check_kind(path, name, states[index], group_of[index])
            _check_shape(path, name, tuple(states[index][kept].shape), parameters[name].shape)
    for name in features.slots:
        state, group = states[index_of[name]], group_of[index_of[name]]
        if "hessian" in state:
            yield name, _sophias(path, name, state, group)
            continue
        beta2, epsilon = float(group["betas"][1]), float(group["eps"])
        _check_hyperparameters(path, beta2, epsilon)
        # AMSGrad divides by the largest v so far.
        second_moment = state.get("max_exp_avg_sq", state["exp_avg_sq"]).float()
        yield name, _adams(path, name, second_moment / (1 - beta2 ** float(state["step"])), epsilon)


def _indices_by_name(path: str, groups: list[dict[str, Any]], model: PreTrainedModel) -> dict[str, int]:
    """Returns the number that the optimizer gave to each parameter."""
    from transformers import Trainer

    indices = [index for group in groups for index in group["params"]]
    if all("param_names" in group for group in groups):
        return dict(zip((name for group in groups for name in group["param_names"]), indices, strict=True))
    sizes = [len(group["params"]) for group in groups]
    decay = set(Trainer.get_decay_parameter_names(None, model))
    for trained in _trained(model):
        # Trainer.create_optimizer's two groups; an optimizer of the user's own may have one.
        parts = [[name for name in trained if name in decay], [name for name in trained if name not in decay]]
        if len(groups) == 1:
            parts = [trained]
        if [len(part) for part in parts] == sizes:
            return dict(zip((name for part in parts for name in part), indices, strict=True))
    raise ValueError(
        f"{path}: the optimizer trained {' + '.join(map(str, sizes))} parameters, but the model has "
        f"{' or '.join(str(len(trained)) for trained in _trained(model))} to train. Pass the model that was trained, "
        "where some parameters were frozen as an object in which they are (requires_grad). For parameter groups of "
        "your own, give the optimizer model.named_parameters(): it then saves the names."
    )


def _trained(model: PreTrainedModel) -> list[list[str]]:
    """What may have been trained: what requires a gradient now, and the active adapter, which PEFT loads frozen."""
    trained = [[name for name, parameter in model.named_parameters() if parameter.requires_grad]]
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        # PEFT's own list of what belongs to an adapter: also modules_to_save, biases and trained tokens. It shortens
        # the names, so parameters are told by where they lie in memory.
        own = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        places = {tensor.data_ptr() for tensor in own.values()}
        trained.append([name for name, parameter in model.named_parameters() if parameter.data_ptr() in places])
    return [names for index, names in enumerate(trained) if names and names not in trained[:index]]


def _check_complete(path: str, missing: list[str], features: Features) -> None:
    if missing:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"{path} has no state for {len(missing)} of the {len(features.slots)} differentiated parameters: {named}. "
            "They were not trained, or by an optimizer without state such as SGD. Differentiate what was trained "
            f"(SelectConfig.features). {_WHAT_TO_DO}."
        )


def _check_kind(path: str, name: str, state: dict[str, Any], group: dict[str, Any]) -> str:
    """Checks that a state is one that gives factors, Adam's or Sophia's; returns what of it has the parameter's shape.

    Raises:
        ValueError: That of another optimizer, which is named.
    """

    def is_there(key: str) -> bool:
        return isinstance(state.get(key), torch.Tensor) and state[key].is_floating_point()

    known = 1 <= float(state.get("step", math.nan)) < math.inf
    if known and is_there("exp_avg_sq") and "GG" not in state and {"betas", "eps"} <= set(group):
        return "exp_avg_sq"
    if known and is_there("hessian") and is_there("exp_avg") and "rho" in group:
        return "hessian"
    kind = next((kind for key, kind in _OTHER_OPTIMIZERS.items() if key in state), "another optimizer")
    if {"ns_steps", "ns_coefficients"} & set(group):
        kind = _MUON
    raise ValueError(
        f"{path}: the state of {name} is that of {kind} ({', '.join(sorted(map(str, state)))}), not Adam's step and "
        f"exp_avg_sq. {_WHAT_TO_DO}."
    )


def _check_shape(path: str, name: str, found: tuple[int, ...], wanted: torch.Size) -> None:
    if found != tuple(wanted):
        raise ValueError(
            f"{path}: the second moments of {name} have shape {found}, the parameter {tuple(wanted)}. The file belongs "
            "to another model, or other parameters were trained: pass the model, or adapter, that was trained with it."
        )


def _check_hyperparameters(path: str, beta2: float, epsilon: float) -> None:
    if not (0 <= beta2 < 1 and 0 < epsilon < math.inf):
        raise ValueError(f"{path}: β2 = {beta2} and ε = {epsilon} are none that Adam takes.")
