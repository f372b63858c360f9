"""The order in which sequences are stored, and the batches in which they are computed: what memory allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bpo.system.memory import within_memory
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Padded tokens of a batch. On a CPU twice as many were no faster and took half as much memory again. With fewer, a GPU
# waits for the interpreter, which has as much to do for a small model as for a large one (on an H100, 135M parameters
# ran three times as fast at 32,768 tokens as at 8,192); large models need the memory.
_CPU_TOKENS = 1024
_GPU_TOKENS = range(4096, 32768 + 1)
_GPU_TOKENS_TIMES_PARAMETERS = 2e13

# Tokens of a block where no tokens of a batch are given, and batches of a block where they are. Blocks must not depend
# on the machine, since it is at their ends that batches are cut alike wherever they are computed.
_BLOCK_TOKENS = 1 << 17
_BATCHES_OF_A_BLOCK = 8

_Result = TypeVar("_Result")


@dataclasses.dataclass
class BatchTokens:
    """How many padded tokens a batch of more than one sequence holds at most; less once memory did not suffice."""

    limit: int


def in_batches(
    run: Callable[[npt.NDArray[np.int64]], _Result],
    order: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    tokens_per_batch: int | BatchTokens,
    name: Callable[[np.int64], str] = lambda row: "",
) -> Iterator[tuple[npt.NDArray[np.int64], _Result]]:
    """Runs sequences in batches. One that does not fit into memory is halved, and so are those after it.

    Args:
        run: Takes the (n,) indices of a batch.
        order: (R,) indices of the sequences, in the order in which they are run.
        lengths: (S,) tokens of each sequence.
        tokens_per_batch: At most so many padded tokens in a batch of more than one; or a limit that is lowered where
            memory does not suffice, and holds for what comes after these sequences, too.
        name: What an error calls a sequence, after its number of tokens.

    Yields:
        The indices of each batch, and what it came to.

    Raises:
        MemoryError: Memory does not suffice for a single sequence.
    """
    tokens = tokens_per_batch if isinstance(tokens_per_batch, BatchTokens) else BatchTokens(tokens_per_batch)
    remaining = order
    while len(remaining):
        size = first_batch(lengths[remaining], tokens.limit)
        rows, longest = remaining[:size], int(lengths[remaining[:size]].max())
        result, error = within_memory(run, rows)
        if result is None and size == 1:
            raise MemoryError(
                f"Memory does not suffice for one sequence of {longest} tokens{name(rows[0])}: {error}\nLower "
                "SelectConfig.max_length, set gradient_checkpointing, or load the model in a smaller dtype."
            )
        if result is None:
            tokens.limit = longest * (size // 2)
            warn(f"Memory does not suffice for {size} sequences of {longest} tokens; going on with {size // 2}.")
            continue
        remaining = remaining[size:]
        yield rows, result


def batch_tokens(tokens_per_batch: int | None, model: torch.nn.Module) -> int:
    """Returns how many padded tokens a batch holds at most; ``None`` asks for what suits a model where it is.

    Example:
        >>> import torch
        >>> batch_tokens(None, torch.nn.Linear(2, 2)), batch_tokens(64, torch.nn.Linear(2, 2))
        (1024, 64)
    """
    if tokens_per_batch is not None:
        return tokens_per_batch
    parameters = list(model.parameters())
    if all(parameter.device.type in ("cpu", "meta") for parameter in parameters):
        return _CPU_TOKENS
    suited = int(_GPU_TOKENS_TIMES_PARAMETERS / sum(parameter.numel() for parameter in parameters))
    return min(max(suited, _GPU_TOKENS[0]), _GPU_TOKENS[-1])


def longest_first(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the order of sequences in which memory peaks in the first batch, and batches hold little padding."""
    return np.argsort(-lengths, kind="stable")


def batches_by_tokens(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Cuts sequences, longest first, into batches of at most ``tokens_per_batch`` padded tokens.

    Longest first means that memory peaks in the first batch.

    Args:
        lengths: (R,) tokens of each sequence.
        tokens_per_batch: Budget; a longer sequence forms a batch of its own.

    Returns:
        Index arrays that together cover all sequences once.

    Example:
        >>> [batch.tolist() for batch in batches_by_tokens(np.array([3, 9, 4, 4]), 9)]
        [[1], [2, 3], [0]]
    """
    return batches_in_order(longest_first(lengths), lengths, tokens_per_batch)


def batches_in_order(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], tokens_per_batch: int
) -> list[npt.NDArray[np.int64]]:
    """Cuts (n,) indices of sequences, in their order, into batches as :func:`in_batches` runs them."""
    batches = []
    while len(order):
        size = first_batch(lengths[order], tokens_per_batch)
        batches.append(order[:size])
        order = order[size:]
    return batches


# Rows that lie near one another in a store: 16 MiB of 1024 float16. With fewer, batches hold more padding: 3 % more at
# 8192 tokens a batch with 1024 of them (the lengths of 4,424 real responses), 0.3 % at 1024.
_NEIGHBOURHOOD = 8192


def storage_order(
    lengths: npt.NDArray[np.int64], prompts: npt.NDArray[np.int64], neighbourhood: int = _NEIGHBOURHOOD
) -> npt.NDArray[np.int64]:
    """Returns the order in which the sequences of a store are computed and kept.

    Prompts stay in the order of the data, a neighbourhood at a time, so that whatever reads the pairs of one prompt
    after the other reads the file from start to end. Within a neighbourhood the longest sequences come first, so that
    batches hold little padding; and the neighbourhood of the longest sequence of all comes first, so that memory which
    does not suffice is found out at once. The order depends neither on batches nor on what is there already, so an
    interrupted store goes on as it would have.

    Args:
        lengths: (S,) tokens of each sequence.
        prompts: (S,) prompt of each sequence, ascending.
        neighbourhood: Sequences, rounded up to whole prompts.

    Returns:
        (S,) int64.

    Example:
        >>> storage_order(np.array([3, 5, 4, 9, 1]), np.array([0, 0, 1, 1, 2]), 2).tolist()
        [3, 2, 1, 0, 4]
    """
    first_of_prompt = np.searchsorted(prompts, prompts)
    place = first_of_prompt // neighbourhood
    if len(place):
        place[place == place[np.argmax(lengths)]] = -1
    return np.lexsort((-lengths, place))


def blocks_of(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], tokens_per_batch: int | None
) -> list[npt.NDArray[np.int64]]:
    """Cuts the sequences of a store into blocks, each of which any process can compute, with the same batches.

    Args:
        order: (S,) indices of all sequences of the data, in the order in which they are kept.
        lengths: (S,) tokens of each sequence.
        tokens_per_batch: The setting; None for what suits the model.

    Returns:
        The indices of each block.

    Example:
        >>> [block.tolist() for block in blocks_of(np.arange(6), np.full(6, 100), 25)]
        [[0, 1], [2, 3], [4, 5]]
    """
    tokens = _BLOCK_TOKENS if tokens_per_batch is None else _BATCHES_OF_A_BLOCK * tokens_per_batch
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.split(order, np.flatnonzero(np.diff(before // tokens)) + 1) if len(order) else []


def first_batch(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> int:
    """Returns how many of the first sequences make up a batch of at most ``tokens_per_batch`` padded tokens."""
    # Were the others no longer than the first one, there would be room for no more than this.
    most = max(1, tokens_per_batch // max(int(lengths[0]), 1))
    padded = np.maximum.accumulate(lengths[:most]) * np.arange(1, len(lengths[:most]) + 1)
    return max(1, int(np.searchsorted(padded, tokens_per_batch, side="right")))
