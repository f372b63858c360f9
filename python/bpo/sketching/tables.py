"""What the kernels are told of the slices at hand, in one array, so that one copy carries it all."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from bpo import _core

    Slice = tuple[int, torch.Tensor, int, int]  # offset, (n', size) gradients, first row, row after the last

# Purposes of random numbers, as in rust/rng.rs.
_SIGNS, _ROTATIONS = 1, 2

# Signs from one position of a stream, and the words that hold them.
_SIGNS_OF_POSITION, _WORDS = 128, 4


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables one after the other, each named by where it begins; what they hold is said by the kernels."""

    joined: npt.NDArray[np.int64]
    tasks: int
    owners: int
    slices: int
    begins: int
    visits: int
    programs: int  # that draw
    sign_words: int
    rotations: int

    @classmethod
    def of(cls, pending: list[Slice], sketcher: _core.Sketcher, size: int, draws: int) -> Tables:
        """Describes slices to the kernels.

        Args:
            pending: The slices, in the order in which they are added.
            sketcher: The sketch.
            size: Rows of the batch.
            draws: Positions that a program draws.
        """
        offset, width, first, stop, stride = (
            np.array(column, dtype=np.int64)
            for column in zip(
                *((offset, part.shape[1], first, stop, part.stride(0)) for offset, part, first, stop in pending),
                strict=True,
            )
        )
        address = np.array([part.data_ptr() for _, part, *_ in pending], dtype=np.uint64).view(np.int64)
        nnz, outputs = sketcher.nnz, sketcher.dim // sketcher.nnz
        lead, ahead = offset % outputs, offset % _SIGNS_OF_POSITION  # from the grid to the first coordinate
        blocks, positions = _over(lead + width, outputs), _over(ahead + width, _SIGNS_OF_POSITION)
        rotation_at, sign_at = (_before(nnz * count) for count in (blocks, positions))
        signs = _tasks(_SIGNS, nnz, offset // _SIGNS_OF_POSITION, positions, sign_at)
        rotations = _tasks(_ROTATIONS, nnz, offset // outputs, blocks, rotation_at)
        tasks = np.concatenate([signs, rotations])
        programs = _over(tasks[:, 3], draws)
        bits = _SIGNS_OF_POSITION * sign_at + ahead, _SIGNS_OF_POSITION * positions
        parts = [
            np.array([sketcher.seed], dtype=np.uint64).view(np.int64),
            np.column_stack([tasks, _before(programs)]),
            np.repeat(np.arange(len(tasks)), programs),
            np.column_stack([address, stride, first, width, lead, *bits, rotation_at, blocks]),
            *_visits(first, stop, size),
        ]
        _, tasks_at, owners_at, slices_at, begins_at, visits_at, _ = np.cumsum([0, *map(np.size, parts)]).tolist()
        return cls(
            joined=np.concatenate([part.ravel() for part in parts]),
            tasks=tasks_at,
            owners=owners_at,
            slices=slices_at,
            begins=begins_at,
            visits=visits_at,
            programs=int(programs.sum()),
            sign_words=_WORDS * nnz * int(positions.sum()),
            rotations=nnz * int(blocks.sum()),
        )


def _tasks(
    purpose: int,
    nnz: int,
    first: npt.NDArray[np.int64],
    count: npt.NDArray[np.int64],
    destination: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """A row for each slice and repetition: purpose, repetition, first position, count, destination."""
    repetition = np.tile(np.arange(nnz), len(first))
    first, count, destination = (np.repeat(column, nnz) for column in (first, count, destination))
    return np.column_stack([np.full_like(first, purpose), repetition, first, count, destination + repetition * count])


def _visits(
    first: npt.NDArray[np.int64], stop: npt.NDArray[np.int64], size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each row of the batch where its visits begin, and the end of the last; and the slices that they lead to."""
    counts = stop - first
    slices = np.repeat(np.arange(len(first)), counts)
    rows = np.arange(len(slices)) + np.repeat(first - _before(counts), counts)
    order = np.argsort(rows, kind="stable")  # so that slices stay in order
    return np.searchsorted(rows[order], np.arange(size + 1)), slices[order]


def _over(total: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """How many pieces of a size it takes."""
    return -(-total // size)


def _before(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many come before each."""
    return np.cumsum(counts) - counts
