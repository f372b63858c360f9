"""Which pairs are kept: one function a strategy, all of one signature, and the register of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from bpo import _core
from bpo.data.pairing import ranks_in_prompts
from bpo.pairs.clustering import cache_bytes
from bpo.pairs.linear import training_direction

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.pairs.clustering import PairClusters
    from bpo.pairs.pair_gradients import PairGradients

Need = Literal["scores", "gradients", "clusters", "differences", "target"]
"""What a strategy reads of a candidacy beyond prompts and budget; all but ``"scores"`` need the model or its store."""


@dataclasses.dataclass(frozen=True)
class Candidacy:
    """What a strategy chooses from: P candidate pairs.

    Attributes:
        prompt_of_pair: (P,) int64.
        score_gaps: (P,) float64, NaN where the data gives no scores.
        eligible: (P,) bool; the others must not be chosen.
        budget: Pairs to choose, at most the eligible ones.
        config: Settings.
        seed: Of random choices.
        clusters: Clusters and scores of the pairs, for strategies that need ``"gradients"``, ``"clusters"`` (else all
            pairs are one cluster) or a ``"target"`` (``alignment`` is then the influence on it).
        features: The gradients of the pairs at unit length, likewise; side by side where there are several checkpoints.
        target: Those of the pairs of the target, where there is one.
        differences: h_w − h_l of the pairs, for strategies that need ``"differences"``.
        margins: (P,) float64, likewise: Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)), the implicit margins.
    """

    prompt_of_pair: npt.NDArray[np.int64]
    score_gaps: npt.NDArray[np.float64]
    eligible: npt.NDArray[np.bool_]
    budget: int
    config: SelectConfig
    seed: int
    clusters: PairClusters | None = None
    features: PairGradients | None = None
    target: PairGradients | None = None
    differences: PairGradients | None = None
    margins: npt.NDArray[np.float64] | None = None


Choice = tuple[Any, Any]
"""What a strategy returns: which pairs are chosen, (P,) bool, and what they were ranked by, (P,) float64."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A strategy and what it needs.

    Attributes:
        choose: From a :class:`Candidacy` to a :data:`Choice`.
        needs: What it reads.
        keeps_every_prompt: Whether each prompt gets ``SelectConfig.min_depth`` pairs at least, so that the budget must
            be that many times the number of prompts.
    """

    choose: Callable[[Candidacy], Choice]
    needs: frozenset[Need] = frozenset()
    keeps_every_prompt: bool = False

    def needs_of(self, config: SelectConfig) -> frozenset[Need]:
        """What it reads under some settings: usefulness may weigh score gaps."""
        if self.choose is bpo and "score_gap" in config.usefulness:
            return self.needs | {"scores"}
        return self.needs


def bpo(candidacy: Candidacy) -> Choice:
    """Depth by gradient clusters: step 8 of the method (arXiv 2411.10914; the allocation is ours).

    With ``min_depth=1`` each prompt's best pair first; the rest of the budget is shared among the clusters, the most
    useful pairs of each first. ``SelectConfig.usefulness`` says what is useful, ``ranking`` in which order it is taken.
    """
    assert candidacy.clusters is not None
    clusters, config = candidacy.clusters, candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    labels = clusters.labels[index]
    keys = _core.ranking_keys(
        usefulness(candidacy, index), config.ranking, temperature=config.temperature, seed=candidacy.seed
    )
    weights = None
    if config.cluster_weighting != "size":
        values = getattr(clusters, config.cluster_weighting)[index].astype(np.float64)
        counts = np.bincount(labels, minlength=len(clusters.centroids))
        sums = np.bincount(labels, weights=values, minlength=len(clusters.centroids))
        weights = np.maximum(sums / np.maximum(counts, 1), 0)
    mask = _core.allocate_depth(
        candidacy.prompt_of_pair[index],
        labels,
        keys,
        candidacy.budget,
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        cluster_weights=weights,
    )
    return _spread(candidacy, index, mask, keys)


def usefulness(candidacy: Candidacy, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns the usefulness of the pairs in ``index``: the weighted sum of the terms of ``SelectConfig.usefulness``.

    Each term has mean 0 and standard deviation 1 over these pairs, so that the weights compare; of informativeness it
    is the logarithm that counts *(ours)*.
    """
    assert candidacy.clusters is not None
    total = np.zeros(len(index))
    for name, weight in candidacy.config.usefulness.items():
        values = candidacy.score_gaps if name == "score_gap" else getattr(candidacy.clusters, name)
        term = values[index].astype(np.float64)
        if name == "informativeness":
            term = np.log(term)
        spread = term.std()
        total += weight * (term - term.mean()) / (spread if spread > 0 else 1.0)
    return total


def uniform(candidacy: Candidacy) -> Choice:
    """The same depth for every prompt: the paper's simple method (arXiv 2411.10914). Pairs are drawn at random.

    Prompts with fewer pairs leave their share to the others; a remainder goes to prompts drawn at random.
    """
    index = np.flatnonzero(candidacy.eligible)
    prompts = candidacy.prompt_of_pair[index]
    generator = np.random.default_rng(candidacy.seed)
    order_of_pair = generator.random(len(index))
    order_of_prompt = generator.random(int(prompts.max()) + 1)
    rank = ranks_in_prompts(prompts, order_of_pair)
    if candidacy.config.max_depth is not None:
        allowed = rank < candidacy.config.max_depth
        index, rank, prompts = index[allowed], rank[allowed], prompts[allowed]
    # Every prompt's first pair, then every prompt's second, and so on.
    taken = np.lexsort((order_of_prompt[prompts], rank))[: candidacy.budget]
    return _spread(candidacy, index, taken, -rank.astype(np.float64))


def random(candidacy: Candidacy) -> Choice:
    """Pairs drawn at random from all candidates: the control."""
    index = np.flatnonzero(candidacy.eligible)
    keys = np.random.default_rng(candidacy.seed).random(len(index))
    return _largest(candidacy, index, keys)


def best_worst(candidacy: Candidacy) -> Choice:
    """One pair a prompt, that of the largest score gap: the best response against the worst, as most pipelines do.

    With fewer pairs than prompts, of prompts drawn at random; a budget above the number of prompts is not used up. Ties
    go to the earlier pair.
    """
    index = np.flatnonzero(candidacy.eligible)
    prompts = candidacy.prompt_of_pair[index]
    best = np.flatnonzero(ranks_in_prompts(prompts, -candidacy.score_gaps[index]) == 0)
    order = np.random.default_rng(candidacy.seed).permutation(len(best))
    return _spread(candidacy, index, best[order[: candidacy.budget]], candidacy.score_gaps[index])


def margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps overall (the external margin of arXiv 2502.14560); ties go to the earlier pair."""
    index = np.flatnonzero(candidacy.eligible)
    return _largest(candidacy, index, candidacy.score_gaps[index])


def fused_margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps and implicit margins together (arXiv 2502.14560).

    The probabilities p of the preference by the scores and q by the policy are fused to pq / (pq + (1−p)(1−q)), that is
    σ(logit p + logit q). Ours is p = σ(gap / standard deviation of the gaps); q = σ(Δ), so a policy that is its own
    reference, with Δ = 0, adds nothing to ``"margin"``.
    """
    assert candidacy.margins is not None
    index = np.flatnonzero(candidacy.eligible)
    gaps = candidacy.score_gaps[index]
    spread = gaps.std()
    return _largest(candidacy, index, gaps / (spread if spread > 0 else 1.0) + candidacy.margins[index])


def less(candidacy: Candidacy) -> Choice:
    """The largest influence on a target set (LESS, arXiv 2402.04333), with gradients of pairs in place of SFT losses.

    The influence of a pair on a subtask of the target is the mean of the cosines between its gradient and those of the
    subtask's pairs, averaged over the checkpoints with their learning rates as weights; that on the target is the
    largest over its subtasks.
    """
    assert candidacy.clusters is not None
    index = np.flatnonzero(candidacy.eligible)
    return _largest(candidacy, index, candidacy.clusters.alignment[index].astype(np.float64))


def matching(candidacy: Candidacy) -> Choice:
    """The pairs whose sum points where training on all candidates leads, taken one after another *(ours)*.

    A pair is worth what it adds to those that are there: at each turn the one comes that most raises the cosine between
    the sum of unit gradients and the direction of training (:func:`bpo.pairs.linear.training_direction`); with a
    target, that of training on the target's pairs. Pairs are ranked by their turn: 0, −1, −2 and so on.
    """
    assert candidacy.features is not None
    config = candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    features, prompts = candidacy.features.take(index), candidacy.prompt_of_pair[index]
    if candidacy.target is None:
        direction = training_direction(features, prompts, candidacy.seed)
    else:
        wanted = candidacy.target
        direction = training_direction(wanted, np.arange(len(wanted.pairs)), candidacy.seed)
    picks, _ = _core.matching(
        *features,
        (-direction).astype(np.float32),
        candidacy.budget,
        prompts=prompts,
        max_depth=config.max_depth,
        cache_bytes=cache_bytes(
            len(features.rows), len(candidacy.eligible), features.rows.shape[1], config, strategy="matching"
        ),
        threads=config.threads,
    )
    return _picked(candidacy, index[picks], -np.arange(len(picks), dtype=np.float64))


def coreset(candidacy: Candidacy) -> Choice:
    """The pairs of each cluster whose weighted sum comes closest to its mean (TAGCOS, arXiv 2407.15235).

    Orthogonal matching pursuit with non-negative weights over unit gradients; the budget is shared among the clusters
    in proportion to their sizes. Pairs are ranked by their weights.
    """
    assert candidacy.clusters is not None and candidacy.features is not None
    index = np.flatnonzero(candidacy.eligible)
    rows, pairs, coefficients = candidacy.features
    picks, weights = _core.coreset(
        rows,
        pairs[index],
        coefficients[index],
        candidacy.clusters.labels[index],
        candidacy.budget,
        prompts=candidacy.prompt_of_pair[index],
        max_depth=candidacy.config.max_depth,
        cache_bytes=cache_bytes(
            len(rows), len(pairs), rows.shape[1], candidacy.config, strategy="coreset", budget=candidacy.budget
        ),
        threads=candidacy.config.threads,
    )
    return _picked(candidacy, index[picks], weights)


def d_optimal(candidacy: Candidacy) -> Choice:
    """The pairs that most enlarge log det(λI + Σ v vᵀ), v = β√(μ(1−μ))·(h_w − h_l), one after another.

    The greedy choice of ADPO (arXiv 2503.01076) and ActiveDPO (arXiv 2505.19241), μ = σ(Δ) being the policy's own
    probability of the preference. λ is ``SelectConfig.regularization`` times mean ‖v‖² / d *(ours)*. Pairs are ranked
    by the growth at their turn.
    """
    assert candidacy.differences is not None and candidacy.margins is not None
    config = candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    rows, pairs, differences = candidacy.differences
    pairs = pairs[index]
    # μ(1−μ) = 1 / (2 cosh(Δ/2))²; cosh stays in float64 up to 700.
    spread = 0.5 / np.cosh(np.minimum(np.abs(candidacy.margins[index]) / 2, 700))
    coefficients = (differences[index] * (config.beta * spread)[:, None]).astype(np.float32)
    norms = _core.pair_norms(rows, pairs, coefficients, threads=config.threads).astype(np.float64)
    picks, gains = _core.d_optimal(
        rows,
        pairs,
        coefficients,
        candidacy.budget,
        regularization=config.regularization * float((norms**2).mean()) / rows.shape[1],
        prompts=candidacy.prompt_of_pair[index],
        max_depth=config.max_depth,
        threads=config.threads,
    )
    return _picked(candidacy, index[picks], gains)


_GRADIENTS: frozenset[Need] = frozenset({"gradients"})
STRATEGIES: dict[str, Strategy] = {
    "bpo": Strategy(bpo, _GRADIENTS | {"clusters"}, keeps_every_prompt=True),
    "uniform": Strategy(uniform, keeps_every_prompt=True),
    "random": Strategy(random),
    "best_worst": Strategy(best_worst, frozenset({"scores"})),
    "margin": Strategy(margin, frozenset({"scores"})),
    "fused_margin": Strategy(fused_margin, _GRADIENTS | {"scores", "differences"}),
    "less": Strategy(less, _GRADIENTS | {"target"}),
    "matching": Strategy(matching, _GRADIENTS),
    "coreset": Strategy(coreset, _GRADIENTS | {"clusters"}),
    "d_optimal": Strategy(d_optimal, _GRADIENTS | {"differences"}),
}
_OURS = frozenset(STRATEGIES)


def register_strategy(
    name: str,
    choose: Callable[[Candidacy], Choice],
    *,
    needs: Collection[Need] = (),
    keeps_every_prompt: bool = False,
) -> None:
    """Makes a strategy of your own known to :func:`bpo.select`, :class:`bpo.BPOTrainer` and :func:`bpo.compare`.

    Args:
        name: Its name; one that you registered before is replaced.
        choose: From a :class:`bpo.Candidacy` of P pairs to (P,) bool, which are chosen, at most its budget and eligible
            ones only; and (P,) floats, what they were ranked by, NaN where nothing ranked them.
        needs: What of the candidacy it reads: ``"scores"``, ``"gradients"``, ``"clusters"``, ``"differences"``,
            ``"target"``; all but the first are computed with the model, or come from its store.
        keeps_every_prompt: Whether it gives ``SelectConfig.min_depth`` pairs to each prompt; smaller budgets are then
            refused.

    Raises:
        ValueError: A name of bpo's own, or a need that is none.
        TypeError: A name that is no text, or a ``choose`` that cannot be called.

    Example:
        >>> import bpo, numpy as np
        >>> def smallest_gaps(candidacy):
        ...     order = np.argsort(np.where(candidacy.eligible, candidacy.score_gaps, np.inf), kind="stable")
        ...     chosen = np.zeros(len(order), dtype=bool)
        ...     chosen[order[:candidacy.budget]] = True
        ...     return chosen, -candidacy.score_gaps
        >>> bpo.register_strategy("smallest_gaps", smallest_gaps, needs={"scores"})
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.7]}]
        >>> bpo.select(None, rows, budget=1, strategy="smallest_gaps", progress=False).dataset["rejected"][:]
        ['four']
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"The name of a strategy must be text, got {name!r}")
    if name in _OURS:
        raise ValueError(f"{name!r} is a strategy of bpo's own; choose another name.")
    if not callable(choose):
        raise TypeError(f"choose must be a function of a bpo.Candidacy, got {choose!r}")
    unknown = sorted(set(needs) - set(get_args(Need)))
    if unknown:
        raise ValueError(f"needs has {', '.join(map(repr, unknown))}; it may have {', '.join(get_args(Need))}.")
    wanted = frozenset(needs)
    STRATEGIES[name] = Strategy(choose, wanted if wanted <= {"scores"} else wanted | _GRADIENTS, keeps_every_prompt)


def registered(names: Iterable[str]) -> dict[str, Strategy]:
    """Returns those of some strategies that :func:`register_strategy` made known, for a process of its own."""
    return {name: STRATEGIES[name] for name in names if name not in _OURS}


def run_strategy(name: str, candidacy: Candidacy) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Runs a strategy and checks what it returns.

    Raises:
        ValueError: A strategy that returned something else than :func:`register_strategy` asks for.
    """
    chosen, keys = STRATEGIES[name].choose(candidacy)
    chosen = np.asarray(chosen)
    shape = candidacy.eligible.shape
    if chosen.dtype != bool or chosen.shape != shape:
        raise ValueError(
            f"strategy={name!r} must return which pairs are chosen as bool of shape {shape}, got {chosen.dtype} of "
            f"shape {chosen.shape}"
        )
    keys = np.asarray(keys, dtype=np.float64)
    if keys.shape != shape:
        raise ValueError(f"strategy={name!r} must return what pairs are ranked by in shape {shape}, got {keys.shape}")
    if chosen.sum() > candidacy.budget:
        raise ValueError(f"strategy={name!r} chose {int(chosen.sum())} pairs of a budget of {candidacy.budget}.")
    wrong = np.flatnonzero(chosen & ~candidacy.eligible)
    if len(wrong):
        raise ValueError(f"strategy={name!r} chose pair {wrong[0]}, which is not eligible ({len(wrong)} such in all).")
    return chosen, keys


def _largest(candidacy: Candidacy, index: npt.NDArray[np.int64], keys: npt.NDArray[np.float64]) -> Choice:
    """Takes the pairs with the largest keys, at most ``max_depth`` of a prompt."""
    order = np.argsort(-keys, kind="stable")
    if candidacy.config.max_depth is not None:
        rank = ranks_in_prompts(candidacy.prompt_of_pair[index], -keys)
        order = order[rank[order] < candidacy.config.max_depth]
    return _spread(candidacy, index, order[: candidacy.budget], keys)


def _spread(
    candidacy: Candidacy,
    index: npt.NDArray[np.int64],
    taken: npt.NDArray[np.bool_] | npt.NDArray[np.int64],
    keys: npt.NDArray[np.float64],
) -> Choice:
    """Puts the keys of the pairs in ``index``, and which of them are taken, back among all pairs."""
    chosen = np.zeros(len(candidacy.eligible), dtype=bool)
    chosen[index[taken]] = True
    ranked_by = np.full(len(candidacy.eligible), np.nan)
    ranked_by[index] = keys
    return chosen, ranked_by


def _picked(candidacy: Candidacy, picks: npt.NDArray[np.int64], keys: npt.NDArray[np.float64]) -> Choice:
    """Picks of the core, with the key of each."""
    chosen = np.zeros(len(candidacy.eligible), dtype=bool)
    chosen[picks] = True
    ranked_by = np.full(len(candidacy.eligible), np.nan)
    ranked_by[picks] = keys
    return chosen, ranked_by
