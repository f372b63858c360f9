"""Models whose weights processes share out (FSDP2): what they are, and how the processes that run one stay in step.

Each forward and backward gathers the weights of a layer from all processes, so all must run as many of them, in the
same order, though each may run its own batch. The weights of a process are a part of themselves (``DTensor``), but what
layers are given and what comes back are whole, and the gradients of a fresh adapter need no more than these.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bpo.system.memory import within_memory
from bpo.world.world import world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from bpo.world.world import World

_Result = TypeVar("_Result")


def is_unit(module: torch.nn.Module) -> bool:
    """Whether FSDP2 gathers the weights of a module when it runs."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 shares the weights of a model out."""
    return any(is_unit(module) for module in model.modules())


def class_of(model: torch.nn.Module) -> type:
    """Returns the class of a model as it was before FSDP2 made one of its own from it."""
    kinds = type(model).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


def is_part(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a process's part of one."""
    return type(tensor.data).__name__ == "DTensor"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor, in every process; all of them must ask for it."""
    if not is_part(tensor):
        return tensor
    part: Any = tensor.detach()
    full: torch.Tensor = part.to(device_of_mesh(part)).full_tensor()
    return full


def device_of_mesh(part: Any) -> torch.device:
    """Returns where this process computes with a tensor of which it has a part, which may be kept elsewhere."""
    kind = part.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def arithmetic(model: torch.nn.Module) -> torch.dtype | None:
    """Returns the type to which FSDP2 casts the weights of a model when it gathers them; None for their own."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        policy = getattr(state() if state is not None else None, "_mp_policy", None)
        if policy is not None and policy.param_dtype is not None:
            found: torch.dtype = policy.param_dtype
            return found
    return None


def sharers() -> int:
    """Returns how many processes call the same functions now: one within :func:`bpo.alone`."""
    return world().size


def ready(model: torch.nn.Module) -> None:
    """Has FSDP2 do now what it does to modules before their first forward, which is to stay."""
    for module in model.modules():
        if is_unit(module) and module._get_fsdp_state()._is_root is None:  # type: ignore[operator]
            module.unshard()  # type: ignore[operator]
    reshard(model)


def reshard(model: torch.nn.Module) -> None:
    """Has each process hold its part of the weights and no more.

    After a forward without a backward FSDP2 leaves those of the model's own unit in place of the parts.
    """
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def no_graph(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context for passes without gradients.

    Weights that FSDP2 gathers under ``inference_mode`` could never be trained again.
    """
    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def in_step(
    run: Callable[[npt.NDArray[np.int64]], _Result], batches: Sequence[npt.NDArray[np.int64]], processes: World
) -> Iterator[_Result]:
    """Runs batches in rounds, a batch a process; who has none left runs another's again, for nothing.

    Args:
        run: Takes the (n,) indices of a batch; what it returns is sent to the first process.
        batches: Those of all processes, the same in each.
        processes: Which there are.

    Yields:
        In the first process, what each batch came to, in order; in the others nothing.

    Raises:
        MemoryError: Memory does not suffice for a batch.
    """
    for start in range(0, len(batches), processes.size):
        together = batches[start : start + processes.size]
        own = together[min(processes.rank, len(together) - 1)]
        result, error = within_memory(run, own)
        if result is None:
            raise MemoryError(
                f"Memory does not suffice for {len(own)} sequences: {error}\nProcesses that share the weights of a "
                "model out run their batches in step, so that none is halved: set SelectConfig.tokens_per_batch lower."
            )
        yield from (processes.to_main(result) or [])[: len(together)]


@contextlib.contextmanager
def lost(processes: World) -> Iterator[None]:
    """Says what it means where a process can no longer gather weights from another."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ConnectionError(
            f"Process {processes.name} of {processes.size} lost another one, without whose part of the weights the "
            f"model cannot run. Start all again: what the gradient store has is kept. torch says: {error}"
        ) from None


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process did not answer: gloo's are of no class of their own."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
