"""The second stage: which prompts are kept, and whether the budget can be met with their pairs."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.breadth.compress import compress_breadth
from bpo.breadth.duplicates import near_duplicates
from bpo.breadth.embed import embed_prompts, embed_with_policy, given_embeddings
from bpo.data.candidates import Skipped
from bpo.data.tokenizers import padding_id
from bpo.data.tokens import tokenize_prompts
from bpo.selection.request import check_budget, counted
from bpo.system.warn import warn
from bpo.world.world import world

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.selection.inputs import Inputs, Pool
    from bpo.selection.request import Request
    from bpo.selection.selection import Selection
    from bpo.selection.sources import Source


@dataclasses.dataclass(frozen=True)
class Kept:
    """The pairs of the prompts that are kept.

    Attributes:
        inputs: P' pairs.
        pair_index: (P',) int64, the index of each in the pool.
        n_pairs: How many of them are asked for.
        noted: What of the prompts is worth a look.
    """

    inputs: Inputs
    pair_index: npt.NDArray[np.int64]
    n_pairs: int
    noted: Skipped


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many prompts are kept, or which, and how many of their pairs are asked for.

    Attributes:
        budget: Pairs: a count or a fraction.
        n_prompts: Prompts to keep.
        kept: (n,) bool, which these are, where that is known before any is compared with another.
        compresses: Whether a breadth was asked for.
        floor: Least number of pairs that gives each prompt its own, where that was asked for.
    """

    budget: int | float
    n_prompts: int
    kept: npt.NDArray[np.bool_] | None
    compresses: bool
    floor: int

    @classmethod
    def of(
        cls, breadth: Any, budget: Any, pool: Pool, request: Request, *, earlier: Selection | None, at_most: bool
    ) -> Limits:
        """Checks whether the budget can be met, as far as can be told before any work.

        Raises:
            ValueError: It cannot, or it is none.
        """
        candidates = pool.candidates
        every = len(candidates.prompts)
        kept = None if earlier is None else _kept_before(candidates, earlier)
        if kept is not None:
            n_prompts = int(kept.sum())
        else:
            n_prompts = every if breadth is None else counted("breadth", breadth, every)
        if n_prompts == every:
            kept = np.ones(every, dtype=bool)
        if at_most and budget > len(candidates.pairs):
            warn(f"There are {len(candidates.pairs)} candidate pairs, fewer than the {budget} of the rounds before.")
            budget = len(candidates.pairs)
        # No choice of prompts can have more pairs than the deepest ones, so most bad budgets are known by now.
        most_pairs = np.sort(np.bincount(candidates.prompt_of_pair))[::-1][:n_prompts].sum()
        floor = (request.config.min_depth or 0) * n_prompts if request.rule.keeps_every_prompt else 0
        check_budget(budget, counted("budget", budget, int(most_pairs)), floor, request.strategy)
        return cls(budget, n_prompts, kept, breadth is not None, floor)


def keep_prompts(pool: Pool, limits: Limits, dataset: Any, source: Source, request: Request) -> Kept:
    """Keeps representative prompts, with all their pairs: step 1 of the method (breadth compression).

    Raises:
        ValueError: Embeddings that do not fit the data, or too few pairs for the budget.
    """
    candidates, noted = pool.candidates, Skipped()
    kept, embeddings = limits.kept, None
    if limits.compresses and request.config.prompt_embeddings is not None:
        embeddings = given_embeddings(dataset, candidates, request.config.prompt_embeddings)
    if kept is None:
        compress = functools.partial(_compress, candidates, embeddings, limits.n_prompts, source, request)
        # Where gradients follow, the processes of a job are together.
        kept, noted = world().from_main(compress) if "gradients" in request.needs else compress()
    inputs, pair_index = pool.inputs.keep_pairs(kept[candidates.prompt_of_pair])
    n_pairs = counted("budget", limits.budget, len(pair_index))
    check_budget(limits.budget, n_pairs, limits.floor, request.strategy)
    return Kept(inputs, pair_index, n_pairs, noted)


def _compress(
    candidates: Candidates,
    embeddings: npt.NDArray[np.float32] | None,
    n_prompts: int,
    source: Source,
    request: Request,
) -> tuple[npt.NDArray[np.bool_], Skipped]:
    """Chooses prompts, embedded here unless they are already; returns also which are nearly the same."""
    if embeddings is None:
        embeddings = _embed(candidates, source, request)
    compressed = compress_breadth(
        embeddings,
        n_prompts,
        method=request.config.breadth_method,
        seed=request.seed,
        threads=request.config.threads,
        progress=request.progress,
    )
    return compressed.kept, _near_duplicates(candidates, embeddings, request.config, request.progress)


def _embed(candidates: Candidates, source: Source, request: Request) -> npt.NDArray[np.float32]:
    """Embeds the prompts, with the encoder if one is named and else with the policy: (n, e)."""
    config = request.config
    if config.embedder is not None:
        return embed_prompts(
            candidates.prompts, config.embedder, trust_remote_code=config.trust_remote_code, progress=request.progress
        )
    policy = source.policy
    assert policy is not None  # checked when the source was chosen
    return embed_with_policy(
        policy.load(),
        tokenize_prompts(candidates, policy.tokenizer, policy.window, truncation_mode=config.truncation_mode),
        padding_id(policy.tokenizer),
        tokens_per_batch=config.tokens_per_batch,
        progress=request.progress,
    )


def _kept_before(candidates: Candidates, earlier: Selection) -> npt.NDArray[np.bool_]:
    """(n,) bool, the prompts that the breadth compression of an earlier selection kept."""
    if not np.array_equal(candidates.pair_rows, earlier.pairs["row"].to_numpy()):
        raise ValueError(
            f"The data has {len(candidates.pairs)} candidate pairs, others than the {earlier.pairs.num_rows} of the "
            "earlier selection; select again from the same data with the same settings."
        )
    kept = np.zeros(len(candidates.prompts), dtype=bool)
    kept[candidates.prompt_of_pair[np.array(earlier.pairs["fate"]) != "breadth"]] = True
    return kept


def _near_duplicates(
    candidates: Candidates, embeddings: npt.NDArray[np.float32], config: SelectConfig, progress: bool
) -> Skipped:
    """Names the prompts that are nearly the same as an earlier one; breadth compression may keep both."""
    noted = Skipped()
    if config.duplicate_threshold is None:
        return noted
    found = near_duplicates(embeddings, config.duplicate_threshold, progress=progress)
    for prompt in np.flatnonzero(found.earlier >= 0):
        row, earlier = candidates.prompt_rows[[prompt, found.earlier[prompt]]]
        noted.add(
            f"prompt nearly the same as an earlier one (cosine ≥ {config.duplicate_threshold:g})",
            f"row {row}, like row {earlier}: {found.similarity[prompt]:.3f}",
        )
    return noted
