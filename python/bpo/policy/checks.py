"""What can be a policy: a causal language model, whole or shared out by FSDP2. All else is refused before it runs."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
import transformers

from bpo.policy.sharding import class_of, device_of_mesh, is_part, is_sharded, is_unit, sharers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel


# Classes that score, tag or fill in text, by the end of their name.
_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering\w*|MultipleChoice|NextSentencePrediction|"
    r"MaskedLM|PreTraining)$"
)

_WHAT_IS_NEEDED = "A policy is a causal language model, such as AutoModelForCausalLM loads"


class UnsupportedModelError(ValueError):
    """A model that is no policy, or whose per-sample gradients cannot be had exactly; the message says why."""


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model inside a ``PeftModel``, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unwrapped(model: Any) -> Any:
    """Returns the model inside what ``torch.compile`` and data parallelism put around one: the same function."""
    while isinstance(model, torch.nn.Module):
        if "_orig_mod" in model._modules:  # OptimizedModule, whose import takes seconds
            model = model._modules["_orig_mod"]
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        else:
            break
    return model


def check_model(model: Any) -> None:
    """Checks that an object given as a model is one, and whole.

    Raises:
        TypeError: It is no model.
        UnsupportedModelError: Its weights are not here: sharded, or never loaded.
    """
    if isinstance(model, torch.nn.Module):
        _check_whole(model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model must be a path, a hub id, a PreTrainedModel or a PeftModel, not {type(model).__name__}."
        )


def check_policy(model: Any) -> None:
    """Checks that a model object is one whose responses follow their prompts, token by token.

    Raises:
        TypeError: It is no model.
        UnsupportedModelError: An encoder, an encoder-decoder, a model with another head or without one; or a model
            whose weights are not here, or in a form that nothing can be differentiated through.
    """
    check_model(model)
    base = base_of(model)
    kind = class_of(base)
    check_kind(base.config, kind)
    if base.base_model is base and base.get_output_embeddings() is None and kind.__name__.endswith("Model"):
        raise UnsupportedModelError(
            f"{kind.__name__} gives hidden states and no distribution of the next token. {_WHAT_IS_NEEDED}."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode, so nothing can be differentiated through it. Load the "
                "model outside."
            )
    for name, module in model.named_modules():
        packed = _packed(module)
        if packed is not None:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, which holds its weights packed ({packed}) and is no nn.Linear: "
                "its gradients cannot be had. Pass the model unquantized, or quantized by bitsandbytes."
            )


def check_kind(config: Any, kind: type | None = None) -> None:
    """Checks by its configuration, before it is loaded, that a model is a causal language model.

    Args:
        config: The configuration.
        kind: The class of the model; by default the one that was saved.

    Raises:
        UnsupportedModelError: It is not.
    """
    saved = next(iter(getattr(config, "architectures", None) or ()), type(config).__name__)
    name = saved if kind is None else kind.__name__
    forward = getattr(kind or getattr(transformers, saved, None), "forward", None)
    takes = () if forward is None else inspect.signature(forward).parameters
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in takes:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, whose prompts and responses are not one sequence. {_WHAT_IS_NEEDED}."
        )
    other = _OTHER_HEADS.search(name)
    if other is not None:
        scorer = " To score responses, give it to bpo.RewardModel." if other[1] == "SequenceClassification" else ""
        raise UnsupportedModelError(
            f"{name} gives no distribution of the next token (its head is for {other[1]}). {_WHAT_IS_NEEDED}.{scorer}"
        )
    if _is_encoder(config):
        raise UnsupportedModelError(
            f"{name} is an encoder: its tokens see those that come after them (is_decoder=False). {_WHAT_IS_NEEDED}."
        )


def _is_encoder(config: Any) -> bool:
    """Whether an architecture that fills in text has not been made a decoder, as BERT can be."""
    decoder = getattr(config, "is_decoder", None)
    return (
        decoder is False
        and not getattr(config, "causal", False)
        and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    )


def _check_whole(model: torch.nn.Module) -> None:
    """Refuses models of which this process has a part or nothing."""
    for name, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _SHARDING), None)
        if kind is not None:
            raise UnsupportedModelError(
                f"{name or 'The model'} is a {kind}, which shares its weights out over processes. {_WHAT_CAN_BE_SHARED}"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"{name} is shared out over processes by DeepSpeed's ZeRO-3 (ds_id, ds_status). {_WHAT_CAN_BE_SHARED} "
                "With ZeRO-3 configured, from_pretrained shares out whatever it loads while an HfDeepSpeedConfig (of "
                "a TrainingArguments) is alive: load the model before that."
            )
        if is_part(parameter) and not _by_fsdp(model, parameter):
            raise UnsupportedModelError(
                f"{name} is shared out over processes by tensor parallelism or a mesh of other dimensions than FSDP2's "
                f"own. {_WHAT_CAN_BE_SHARED}"
            )
    if is_sharded(model):
        check_in_step(model)
    held = {id(tensor) for module in model.modules() if is_offloaded(module) for tensor in _tensors(module)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and id(tensor) not in held:
            raise UnsupportedModelError(
                f"{name} has no values: the model is on the meta device. Load its weights (from_pretrained, or "
                "accelerate's load_checkpoint_and_dispatch)."
            )


_SHARDING = {"FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule"}

_WHAT_CAN_BE_SHARED = (
    "Pass a model whose weights are whole, on one device or several (device_map='auto'), or shared out by FSDP2 "
    "(torch's fully_shard, fsdp_version: 2 in accelerate's configuration)."
)


def check_in_step(model: torch.nn.Module) -> None:
    """Checks that all processes which share the weights of a model out are about to run it.

    Raises:
        UnsupportedModelError: Some of them only.
    """
    together, here = torch.distributed.get_world_size(), sharers()
    if is_sharded(model) and together != here:
        raise UnsupportedModelError(
            f"{class_of(model).__name__} is shared out by FSDP2 over {together} processes, all of which must run it "
            f"together, but this is for {here} of them: what a process does by itself (bpo.sample_responses, "
            "bpo.doctor, breadth by the policy's own embeddings, all within bpo.alone()) needs a whole model; breadth "
            "an embedder or prompt_embeddings."
        )


def check_one_pass(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Checks that parameters or modules which take a pass of their own for each response are of a whole model.

    Raises:
        UnsupportedModelError: They are not.
    """
    name = next(iter(names), None)
    if name is not None and is_sharded(model):
        raise UnsupportedModelError(
            f"{name}: its gradient takes a pass of its own for each response, which processes that share the weights "
            "out (FSDP2) cannot make in step; that of a linear layer or an embedding takes none. Differentiate "
            "features='lora', leave it out with SelectConfig.parameters, or pass a model whose weights are whole."
        )


def _by_fsdp(model: torch.nn.Module, parameter: Any) -> bool:
    """Whether nothing but FSDP2 has cut a parameter: along one dimension of its mesh."""
    cuts = sum(not placement.is_replicate() for placement in parameter.placements)
    return cuts <= 1 and any(
        parameter is own for module in model.modules() if is_unit(module) for own in module.parameters()
    )


def _packed(module: torch.nn.Module) -> str | None:
    """The dtype in which a layer of another library holds its weights, None where it is none of these.

    Layers that are an ``nn.Linear`` are known to give gradients of their inputs (bitsandbytes), or are found out when
    they do not.
    """
    if isinstance(module, torch.nn.Linear):
        return None
    small = (torch.int8, torch.uint8, torch.int16, torch.int32)
    packed = (tensor.dtype for tensor in _tensors(module) if tensor.dim() > 1 and tensor.dtype in small)
    return next((str(dtype) for dtype in packed), None)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A module's own parameters and buffers."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _hooks(module: torch.nn.Module) -> list[Any]:
    """What accelerate put in front of a module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", () if hook is None else (hook,)))


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether accelerate keeps the weights of a module elsewhere, and brings them for each forward."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def kept_value(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns a parameter or buffer from where accelerate keeps it, for one that is on the meta device."""
    owner, _, own = name.rpartition(".")
    hook = next(hook for hook in _hooks(model.get_submodule(owner)) if getattr(hook, "offload", False))
    value: torch.Tensor = hook.weights_map[own]
    return value


def device_of(module: torch.nn.Module, parameter: torch.Tensor) -> torch.device:
    """Returns where a module computes with its own parameter: where that is, unless accelerate brings it elsewhere."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    device = next((device for device in devices if device is not None), None)
    if device is not None:
        return torch.device(device)
    return device_of_mesh(parameter) if is_part(parameter) else parameter.device
