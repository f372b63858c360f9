"""The pairs of a preview: measured once from every store, and chosen from anew for each split."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import TYPE_CHECKING

import numpy as np

from bpo.data.pairing import largest_gaps
from bpo.pairs.length import fit_length_effect
from bpo.pairs.linear import linear_margins, pulls
from bpo.pairs.pair_gradients import pair_norms
from bpo.selection.choice import choose, unsuited
from bpo.selection.request import Request, count_of
from bpo.selection.scored import ScoredPairs, score
from bpo.system.warn import warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.evidence.preview.arms import PreviewArm
    from bpo.pairs.measured import MeasuredPairs
    from bpo.selection.inputs import Inputs
    from bpo.selection.sources import StoreAlone


@dataclasses.dataclass(frozen=True)
class PreviewData:
    """Candidate pairs with their gradients, of one store or of several.

    Attributes:
        sources: Each store; that of the preview by the name None, those of single arms by their path.
        inputs: The pairs, which every store holds, and their rows there, by the same names.
        pairs: What the stores hold of them, likewise.
        usable: (P,) bool, whether the gradient is, in every store.
    """

    sources: Mapping[str | None, StoreAlone]
    inputs: Mapping[str | None, Inputs]
    pairs: Mapping[str | None, MeasuredPairs]
    usable: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, candidates: Candidates, sources: Mapping[str | None, StoreAlone], progress: bool) -> PreviewData:
        """Reads the pairs that every store holds."""
        for source in sources.values():
            candidates = source.find(candidates).candidates
        return cls._measured(sources, {name: source.find(candidates) for name, source in sources.items()}, progress)

    @classmethod
    def _measured(
        cls, sources: Mapping[str | None, StoreAlone], inputs: Mapping[str | None, Inputs], progress: bool = False
    ) -> PreviewData:
        parts = {name: [inputs[name]] for name in sources}
        pairs = {
            name: source.read(source.fill(parts[name], progress), parts[name], progress)[0]
            for name, source in sources.items()
        }
        usable = np.ones(len(inputs[None].candidates.pairs), dtype=bool)
        for name, source in sources.items():
            norms = pair_norms(pairs[name].gradients[0], source.config.threads)
            usable &= np.isfinite(norms) & (norms > 0)
        return cls(sources, inputs, pairs, usable)

    def without_length(self, train: npt.NDArray[np.bool_]) -> PreviewData:
        """The same pairs by scores whose length effect, as some prompts ((n,) bool) show it, is taken out."""
        part, index, _ = self.candidates.keep_prompts(train)
        slope = fit_length_effect(part, self.lengths[index], "tokens").slope
        own, turned = self.inputs[None].without_length(slope)
        others = {name: inputs.turned(own.candidates, turned) for name, inputs in self.inputs.items()}
        return self._measured(self.sources, others)

    @property
    def candidates(self) -> Candidates:
        """Prompts, responses and pairs."""
        return self.inputs[None].candidates

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(P, 2) int64, tokens of the two responses, at least 1."""
        return self.inputs[None].pair_lengths

    @property
    def longer(self) -> npt.NDArray[np.int64]:
        """(P,), 1 where the preferred response is longer than the other, −1 where it is shorter, else 0."""
        signs: npt.NDArray[np.int64] = np.sign(self.lengths[:, 0] - self.lengths[:, 1])
        return signs

    def weights(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """What the loss of some pairs is multiplied with; None for 1."""
        return None if self.candidates.weights is None else self.candidates.weights[index]

    def features(self, index: npt.NDArray[np.int64], normalize: bool) -> npt.NDArray[np.float32]:
        """What training on some pairs pulls towards, (n, d): −ẑ, or −z in units of the mean length of these pairs."""
        gradients = self.pairs[None].gradients[0].take(index)
        norms = pair_norms(gradients, self.sources[None].config.threads)
        return pulls(gradients, norms if normalize else norms.mean())

    def margins(self, weights: npt.NDArray[np.float64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """⟨w, −z⟩ of some pairs for each of several weights (W, d): (W, n)."""
        return linear_margins(weights, self.pairs[None].gradients[0].take(index))


@dataclasses.dataclass(frozen=True)
class ArmChoice:
    """The pairs that an arm chooses at a budget.

    Attributes:
        arm: Position of the arm.
        budget: Position of the budget; None for all.
        pairs: (n,) int64, indices of pairs of ``data``.
        data: Whose pairs; with the length effect taken out, some are turned round.
    """

    arm: int
    budget: int | None
    pairs: npt.NDArray[np.int64]
    data: PreviewData


def choices(
    data: PreviewData,
    without_length: PreviewData | None,
    among: npt.NDArray[np.int64],
    arms: Sequence[PreviewArm],
    budgets: Sequence[int],
    seed: int,
) -> Iterator[ArmChoice]:
    """Yields what each arm chooses at each budget, of some pairs; what falls short of the budget is left out."""
    for position, (arm, view, index, scored, request) in enumerate(_of_arms(data, without_length, among, arms, seed)):
        for at, budget in enumerate(budgets):
            mask = _chosen(scored, budget, request)
            if mask.sum() == budget:
                yield ArmChoice(position, at, index[mask], view)
            elif seed == 0:
                warn(f"The arm {arm.name!r} chooses {mask.sum()} pairs of a budget of {budget} and is left out there.")


def reasons(
    data: PreviewData,
    without_length: PreviewData | None,
    among: npt.NDArray[np.int64],
    arms: Sequence[PreviewArm],
    seed: int,
) -> dict[str, str]:
    """Returns why some arms have nothing to choose by among some pairs: name → reason."""
    found = {
        arm.name: unsuited(scored, request)
        for arm, _, _, scored, request in _of_arms(data, without_length, among, arms, seed)
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _of_arms(
    data: PreviewData,
    without_length: PreviewData | None,
    among: npt.NDArray[np.int64],
    arms: Sequence[PreviewArm],
    seed: int,
) -> Iterator[tuple[PreviewArm, PreviewData, npt.NDArray[np.int64], ScoredPairs, Request]]:
    """Yields what each arm chooses from: whose pairs, which of them, how they score, and what is asked."""
    shared: dict[str, tuple[npt.NDArray[np.int64], ScoredPairs]] = {}
    for arm in arms:
        request = Request(arm.strategy, arm.config, seed)
        view = data
        if arm.config.length_control == "residual":
            assert without_length is not None
            view = without_length
        # Arms that cluster alike share the clusters of the seed, and margins of left-out prompts.
        key = json.dumps([_clustering(request), arm.breadth, arm.config.max_pairs_per_prompt, arm.store, view is data])
        if key not in shared:
            index = _candidates_of(view, among, arm, seed)
            shared[key] = index, _scored(view, index, arm.store, request)
        yield arm, view, *shared[key], request


def _clustering(request: Request) -> list[object]:
    """What the clusters of some pairs depend on, beside the seed."""
    config = request.clustering
    return ["gradients" in request.needs, config.n_clusters, config.metric, config.max_iter]


def _candidates_of(
    data: PreviewData, among: npt.NDArray[np.int64], arm: PreviewArm, seed: int
) -> npt.NDArray[np.int64]:
    """The pairs that an arm chooses from: of the prompts of its breadth, at most so many of each."""
    prompts = data.candidates.prompt_of_pair[among]
    if arm.breadth is not None:
        there = np.unique(prompts)
        count = count_of(arm.breadth, len(there))
        if count > len(there):
            raise ValueError(f"The arm {arm.name!r} has breadth={arm.breadth}, and there are {len(there)} prompts.")
        kept = np.random.default_rng([seed, 2]).permutation(there)[:count]
        among = among[np.isin(prompts, kept)]
    most = arm.config.max_pairs_per_prompt
    if most is None:
        return among
    candidates = data.candidates
    return among[largest_gaps(candidates.prompt_of_pair[among], candidates.score_gaps[among], most)]


def _scored(data: PreviewData, index: npt.NDArray[np.int64], store: str | None, request: Request) -> ScoredPairs:
    """Clusters and scores some pairs by what a store holds of them."""
    measured = data.pairs[store].take(index) if "gradients" in request.needs else None
    return score(data.candidates, data.lengths[index], measured, request, index)


def _chosen(scored: ScoredPairs, budget: int, request: Request) -> npt.NDArray[np.bool_]:
    """Which pairs are chosen; that too few can be exchanged to balance length is said for one seed."""
    with warnings.catch_warnings():
        if request.config.length_control == "balance" and request.seed > 0:
            warnings.simplefilter("ignore", UserWarning)
        return choose(scored, budget, request)[0]
