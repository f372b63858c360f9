"""How large a choice among pairs is: its clusters, and the bytes that it takes."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpo.config import SelectConfig
    from bpo.pairs.pair_gradients import PairGradients
    from bpo.world.shares import Shares

# What the stages after the gradients take at most, in bytes: measured as growth of the resident memory over selections
# of 160,000 and 320,000 responses with 560,000 and 1,120,000 pairs, and over clusterings of up to 1,000,000 responses
# mapped from 2 GB, with 125,000 to 3,500,000 pairs.
_FIXED_BYTES = 160 << 20  # rows of the map that are in hand, and slack
_BYTES_A_ROW = 250
_BYTES_A_PAIR = 500
# Beside these, stages that follow one another take so many for each number of a sketch.
_BYTES_A_THREAD = 252 * 12  # clustering: rows that a thread works on
_BYTES_A_CENTROID = 40
# Where processes share the pairs: numbers on their way to others, and what waits for a turn; the sums, sent and heard.
_BYTES_A_SHARED_PAIR = 100
_BYTES_A_SHARED_CENTROID = 32
_BYTES_A_PROMPT = 8  # whether prompts agree: the sum of each of 1,000 prompts
# The core's default of what it keeps from pass to pass.
_CACHE_BYTES = 1 << 30
# Covariances of pairs with those that they are to tell about, in float32.
INFORMATION_BYTES = 64 << 20
# The audit of labels: matrix, eigenvectors and what LAPACK works with, d × d float64 each; and copies of the rows
# that it takes at once. Measured with up to 2,048 numbers.
_BYTES_OF_AUDIT, _AUDITED_AT_ONCE, _BYTES_OF_AUDITED = 48, 8192, 32
# Candidates of a round of the D-optimal design, and copies of their vectors.
_CANDIDATES, _COPIES = 1024, 4


@dataclasses.dataclass(frozen=True)
class ChoiceSize:
    """What is chosen from, and by what.

    Attributes:
        n_rows: Responses.
        n_pairs: Their pairs.
        dim: Numbers of a sketch.
        config: Uses ``max_memory``, ``n_clusters``, ``threads`` and ``trust``.
        strategy: What chooses; that of a strategy of the user's own is not known.
        budget: Pairs to choose; all if None.
        n_processes: How many share the pairs; the bytes are those of each.
        audited: Whether their labels are audited, and nothing is chosen; ``config.trust`` says whether beside a choice.
    """

    n_rows: int
    n_pairs: int
    dim: int
    config: SelectConfig
    strategy: str = "bpo"
    budget: int | None = None
    n_processes: int = 1
    audited: bool = False

    @classmethod
    def of(
        cls,
        gradients: PairGradients,
        config: SelectConfig,
        shares: Shares | None = None,
        *,
        strategy: str = "bpo",
        budget: int | None = None,
    ) -> ChoiceSize:
        """Returns that of a choice among these pairs."""
        rows, pairs, _ = gradients
        n_processes = 1 if shares is None else shares.size
        return cls(len(rows), len(pairs), rows.shape[1], config, strategy, budget, n_processes)

    @property
    def needed_bytes(self) -> int:
        """What choosing takes, beside the data and whatever is kept from pass to pass."""
        threads = self.config.threads or os.cpu_count() or 1
        clusters = n_clusters(self.n_pairs, self.config)
        shared = self.n_processes > 1
        of_centroid = _BYTES_A_CENTROID + _BYTES_A_SHARED_CENTROID * shared
        clustering = (of_centroid * clusters + _BYTES_A_THREAD * threads) * self.dim
        agreement = _BYTES_A_PROMPT * min(self.n_pairs, 1000) * self.dim
        of_pair = _BYTES_A_PAIR + _BYTES_A_SHARED_PAIR * shared
        most = max(clustering, agreement, self._strategy_bytes(threads, clusters), self._audit_bytes)
        return _FIXED_BYTES + _BYTES_A_ROW * self.n_rows + of_pair * self.n_pairs + most

    @property
    def _audit_bytes(self) -> int:
        if not self.audited and self.config.trust != "audit":
            return 0
        return (_BYTES_OF_AUDIT * self.dim + _BYTES_OF_AUDITED * min(self.n_rows, _AUDITED_AT_ONCE)) * self.dim

    def _strategy_bytes(self, threads: int, clusters: int) -> int:
        dim, budget = self.dim, self.n_pairs if self.budget is None else self.budget
        if self.strategy == "coreset":
            # float64 vectors of the pairs with weight, and their products; about twice as many as a sketch has numbers
            # span all that a cluster's mean can be made of.
            of_cluster = min(2 * dim, budget)
            return 8 * min(of_cluster * min(threads, clusters), budget) * (dim + of_cluster)
        if self.strategy in ("d_optimal", "bald"):
            return 16 * dim**2 + 8 * _COPIES * _CANDIDATES * (dim + _CANDIDATES)
        if self.strategy == "epig":
            # Once as they are computed and once as they are kept; and a vector for each pair that is taken.
            return 2 * INFORMATION_BYTES + 8 * dim * budget
        return 0

    @property
    def cache_bytes(self) -> int:
        """What may be kept from pass to pass: what is left of ``SelectConfig.max_memory``."""
        limit = self.config.memory_limit
        return _CACHE_BYTES if limit is None else max(0, limit - self.needed_bytes)

    @property
    def fits(self) -> bool:
        """Whether ``SelectConfig.max_memory`` suffices."""
        limit = self.config.memory_limit
        return limit is None or self.needed_bytes <= limit

    def check(self) -> None:
        """Checks that ``SelectConfig.max_memory`` suffices.

        Raises:
            ValueError: It does not; the message says what would.
        """
        limit = self.config.memory_limit
        if limit is not None and not self.fits:
            least = (
                f"{self.n_pairs} pairs of {self.n_rows} responses takes {math.ceil(self.needed_bytes / 2**20):,} MiB"
            )
            trust = " and trust='audit'" if self.config.trust == "audit" else ""
            what = (
                f"auditing {least}"
                if self.audited
                else f"choosing among {least} with strategy={self.strategy!r}{trust}"
            )
            raise ValueError(
                f"SelectConfig.max_memory is {limit / 2**20:,.0f} MiB, and {what}. "
                "Allow as much, or keep fewer prompts (breadth), pairs (max_pairs_per_prompt), clusters (n_clusters) "
                "or numbers of a sketch (sketch_dim)."
            )


def n_clusters(n_pairs: int, config: SelectConfig) -> int:
    """Returns how many clusters there will be: ``SelectConfig.n_clusters``, else the default."""
    return default_n_clusters(n_pairs) if config.n_clusters is None else max(1, min(config.n_clusters, n_pairs))


def default_n_clusters(n_pairs: int) -> int:
    """Returns √(pairs), at most 256: about as many clusters as pairs in each *(ours)*."""
    return max(1, min(256, math.isqrt(n_pairs)))


def matching_steps(n_picks: int) -> int:
    """Returns how many steps a matching takes: one a pick at first, then a 64th of the picks at once, 256 at most.

    Example:
        >>> matching_steps(128), matching_steps(10_000), matching_steps(1_000_000)
        (128, 427, 4301)
    """
    steps, picked = 0, 0
    while picked < n_picks:
        picked += min(max(1, picked // 64), 256)
        steps += 1
    return steps
