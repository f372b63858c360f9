"""The gradients of pairs, never formed: rows of responses, and two coefficients a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bpo import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.system.progress import Progress
    from bpo.world.shares import Shares


class PairGradients(NamedTuple):
    """The gradients z = a·h_w + b·h_l of P pairs, as :func:`bpo.cluster_pairs` takes them.

    Attributes:
        rows: (R, d), the sketch h of each response up to a factor: float32, float16, uint16 (the bits of bfloat16) or
            int8.
        pairs: (P, 2) int64, rows of the preferred and of the other response.
        coefficients: (P, 2) float32, a and b of each pair, times the factors of its two rows.
    """

    rows: npt.NDArray[Any]
    pairs: npt.NDArray[np.int64]
    coefficients: npt.NDArray[np.float32]

    @classmethod
    def of_rows(cls, rows: npt.NDArray[Any]) -> PairGradients:
        """Gradients that are formed already: each pair is a row of its own."""
        index = np.arange(len(rows))
        return cls(rows, np.stack([index, index], axis=1), np.tile(np.array([1, 0], dtype=np.float32), (len(rows), 1)))

    def take(self, index: npt.NDArray[np.int64]) -> PairGradients:
        """Some of the pairs, over the same rows."""
        return PairGradients(self.rows, self.pairs[index], self.coefficients[index])


def pair_norms(
    gradients: PairGradients, threads: int | None, progress: Progress | None = None, shares: Shares | None = None
) -> npt.NDArray[np.float32]:
    """Returns ‖z‖ of each pair, (P,) float32; NaN or infinite where its coefficients or its rows are not finite.

    With ``shares`` each process measures its own.
    """
    finite = np.isfinite(gradients.coefficients.sum(axis=1))
    coefficients = np.where(finite[:, None], gradients.coefficients, 0).astype(np.float32)
    norms = _core.pair_norms(
        gradients.rows,
        gradients.pairs,
        coefficients,
        finite=False,
        threads=threads,
        progress=progress,
        processes=shares,
    )
    norms[~finite] = np.nan
    return norms


def unit_features(
    gradients: PairGradients, norms: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]
) -> PairGradients:
    """Returns gradients at unit length, NaN where they are not usable."""
    scale = np.full(len(norms), np.nan, dtype=np.float32)
    scale[usable] = 1 / norms[usable]
    return gradients._replace(coefficients=gradients.coefficients * scale[:, None])
