"""What a selection is worth, before training: the comparison of strategies in the linearised regime."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.config import SelectConfig
from bpo.data.length import fit_length_effect, take_out_length, turn
from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.evidence.preview_results import ALL, Preview
from bpo.pairs.linear import fit_direction, linear_margins, pulls
from bpo.pairs.measured import MeasuredPairs, in_store, measured
from bpo.pairs.pair_gradients import pair_norms
from bpo.pairs.ranks import ranks_in_prompts
from bpo.selection.balance import balance_lengths
from bpo.selection.budgets import count_of
from bpo.selection.scored import clustered
from bpo.selection.strategies import STRATEGIES, Candidacy, choose
from bpo.store.gradient_store import GradientStore, with_settings_of
from bpo.system.optional import import_scipy
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.pairs.clustering import PairClusters
    from bpo.pairs.pair_gradients import PairGradients

_FIELDS = {"name", "strategy", "breadth", "select", "store"}

# What a store is made with: an arm with a store of its own has these from there.
_OF_STORES = (
    "features",
    "parameters",
    "factor_dim",
    "lora_rank",
    "preconditioner",
    "sketch_seed",
    "sketch_dim",
    "sketch_kind",
    "sketch_nnz",
    "sketch_dtype",
    "max_length",
    "truncation_mode",
)


@dataclasses.dataclass(frozen=True)
class PreviewArm:
    """One way to choose the pairs.

    Attributes:
        name: Its name in the results.
        strategy: Of :func:`bpo.select`, but ``"less"``.
        breadth: Prompts to keep, a count or a fraction, drawn at random (no encoder runs here); None for all.
        config: Settings of the selection.
        store: Gradient store whose rows it chooses by; None for that of the preview.
    """

    name: str
    strategy: str
    breadth: int | float | None
    config: SelectConfig
    store: str | None = None


def preview(
    store: str | os.PathLike[str],
    dataset: Any,
    *,
    budget: int | Sequence[int],
    arms: Sequence[str | Mapping[str, Any]] = ("bpo", "uniform", "random", "best_worst", "margin"),
    baseline: str = "random",
    heldout: Any = 0.25,
    seeds: int = 100,
    config: SelectConfig | Mapping[str, Any] | None = None,
    regularization: float = 1.0,
    normalize: bool = True,
    progress: bool = True,
) -> Preview:
    """Compares strategies on held-out pairs without training, straight from a gradient store.

    Near the starting policy the implicit-reward margin of a pair is linear in what training changes,
    β⟨θ, h_w − h_l⟩, so DPO with the sigmoid loss is logistic regression on the pairs' gradients (cf. the neural tangent
    kernel, arXiv 1806.07572). For each seed the prompts are split, each arm chooses among the training prompts' pairs,
    a logistic regression without intercept is fitted to what it chose, and it ranks the held-out pairs *(ours)*.

    It says whether, and how much, the choice of pairs matters on this data as far as the linear regime tells;
    ``docs/results.md`` shows how its order of the arms agrees with that of real training.

    Args:
        store: Gradient store of the data (:func:`bpo.collect_gradients`, or the ``store`` of :func:`bpo.select`).
        dataset: The data it was made with, or a part of it, in any format of :func:`bpo.select`.
        budget: Pairs to train on, one number or several.
        arms: Names of strategies, or mappings with ``name`` and any of ``strategy`` (by default that of the name),
            ``breadth`` (prompts, drawn at random here), ``select`` (fields of :class:`bpo.SelectConfig`) and ``store``:
            another gradient store of the data, by whose rows the arm chooses, such as one of
            ``features="embeddings"``; what it chose is fitted and judged as that of the others. The candidates of all
            arms are then the pairs that every store holds. ``min_depth`` is 0 unless given, so that any budget is
            possible. With ``length_control="residual"`` an arm chooses by scores whose length effect, as the training
            prompts show it, is taken out, and pairs that turn round are trained on the other way round; what is held
            out stays as the data has it.
        baseline: The arm that the others are compared with; added if it is not among them.
        heldout: Share of the prompts that each seed holds out, or a data set of its own whose gradients are in the
            store.
        seeds: Splits.
        config: Settings of all arms.
        regularization: λ of the L2 penalty λ/2 ‖w‖²; larger is closer to a single small step of training.
        normalize: Whether pairs are fitted at unit length, as they are clustered; else at their own.
        progress: Whether to show a progress bar.

    Returns:
        The accuracies.

    Raises:
        ValueError: An arm or strategy that is unknown, a strategy that needs what a store does not hold, budgets above
            the candidates, or too few prompts to split.
        ImportError: SciPy is missing.
        FileNotFoundError: No store where one is named.
        bpo.StoreError: As :func:`bpo.select`.

    Example:
        .. code-block:: python

            print(bpo.preview("gradients", "responses.jsonl", budget=[60, 150]).summary())
    """
    start = time.perf_counter()
    minimize = import_scipy("optimize").minimize
    present = GradientStore.open(store)
    given = dict(config) if isinstance(config, Mapping) else config
    config = with_settings_of(present, SelectConfig.of(given))
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(f"seeds must be a whole number of at least 1, got {seeds!r}")
    if not isinstance(regularization, (int, float)) or not 0 < regularization < math.inf:
        raise ValueError(f"regularization must be above 0, got {regularization!r}")
    budgets = _budgets(budget)
    known = _arms(arms, baseline, config)

    reading = dataclasses.replace(config, token_weights=None, ref_model=None)
    others = {arm.store: GradientStore.open(arm.store) for arm in known if arm.store is not None}
    data = _Data.of(read_configured(load_rows(dataset), reading), present, config, progress, others)
    other = None
    share: float | None = None
    if isinstance(heldout, float):
        if not 0 < heldout < 1:
            raise ValueError(f"heldout must be a share above 0 and below 1 or a data set, got {heldout!r}")
        n_prompts = len(data.candidates.prompts)
        n_heldout = round(heldout * n_prompts)
        if not 1 <= n_heldout < n_prompts:
            raise ValueError(f"{n_prompts} prompts cannot be split with heldout={heldout!r}.")
        share = n_heldout / n_prompts
    else:
        other = _Data.of(read_configured(load_rows(heldout), reading), present, config, progress)
    needs_scores = [arm.name for arm in known if "scores" in STRATEGIES[arm.strategy].needs_of(arm.config)]
    residual = [arm.name for arm in known if arm.config.length_control == "residual"]
    if (needs_scores or residual) and np.isnan(data.candidates.score_gaps).any():
        raise ValueError(f"The arm {[*needs_scores, *residual][0]!r} needs scores, and some pairs have none.")

    shape = (len(known) + 1, len(budgets), seeds)
    accuracy, controlled, depth = (np.full(shape, np.nan) for _ in range(3))
    sizes = np.zeros((2, seeds))
    for seed in tqdm(range(seeds), desc="Preview", unit="seed", disable=not progress):
        train = np.ones(len(data.candidates.prompts), dtype=bool)
        if share is not None:
            train[np.random.default_rng([seed, 1]).permutation(len(train))[:n_heldout]] = False
        among = np.flatnonzero(data.usable & train[data.candidates.prompt_of_pair])
        if max(budgets) > len(among):
            raise ValueError(
                f"budget={max(budgets)} is above the {len(among)} candidates of the training prompts (seed {seed})."
            )
        if other is None:
            test, wanted = data, np.flatnonzero(data.usable & ~train[data.candidates.prompt_of_pair])
        else:
            test, wanted = other, np.flatnonzero(other.usable)
        sizes[:, seed] = len(among), len(wanted)
        without_length = data.without_length(train) if residual else None
        fitted = []
        for arm, position, chosen, view in [
            *_choices(data, without_length, among, known, budgets, seed),
            (len(known), None, among, data),
        ]:
            weights = fit_direction(view.features(chosen, normalize), regularization, minimize, view.weights(chosen))
            fitted.append((arm, position, weights, chosen))
        margins = test.margins(np.stack([weights for _, _, weights, _ in fitted]), wanted)
        longer = test.longer[wanted]
        for (arm, position, _, chosen), row in zip(fitted, margins, strict=True):
            right = (np.sign(row) + 1) / 2
            place = (arm, slice(None) if position is None else position, seed)
            accuracy[place] = right.mean()
            controlled[place] = np.mean(
                [right[longer == side].mean() if (longer == side).any() else np.nan for side in (1, -1)]
            )
            depth[place] = len(chosen) / len(np.unique(data.candidates.prompt_of_pair[chosen]))
    return Preview(
        arms=[arm.name for arm in known] + [ALL],
        budgets=budgets,
        accuracy=accuracy,
        length_controlled=controlled,
        mean_depth=depth,
        baseline=baseline,
        heldout_share=share,
        n_pairs=float(sizes[0].mean()),
        n_heldout=float(sizes[1].mean()),
        seconds=time.perf_counter() - start,
        settings={
            "store": str(store),
            "seeds": seeds,
            "regularization": regularization,
            "normalize": normalize,
            "arms": {
                arm.name: {
                    "strategy": arm.strategy,
                    "breadth": arm.breadth,
                    "store": arm.store,
                    "select": _changed(arm.config),
                }
                for arm in known
            },
        },
    )


@dataclasses.dataclass(frozen=True)
class _Data:
    """Candidate pairs with their gradients.

    Attributes:
        candidates: Prompts, responses and pairs.
        config: What the loss, and so the gradients of pairs, depend on.
        stores: Each store, and its row of each response; that of the preview by the name None, those of single arms by
            their path.
        pairs: What the stores hold of the pairs, likewise.
        lengths: (P, 2) int64, tokens of the two responses.
        usable: (P,) bool, whether the gradient is, in every store.
    """

    candidates: Candidates
    config: SelectConfig
    stores: dict[str | None, tuple[GradientStore, npt.NDArray[np.int64]]]
    pairs: dict[str | None, MeasuredPairs]
    lengths: npt.NDArray[np.int64]
    usable: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        present: GradientStore,
        config: SelectConfig,
        progress: bool,
        others: Mapping[str, GradientStore] | None = None,
    ) -> _Data:
        """Reads pairs that every store holds: the one that is fitted, and those by which single arms choose."""
        opened: dict[str | None, GradientStore] = {None: present}
        opened.update(others or {})
        for store in opened.values():
            candidates, _ = in_store(candidates, store, config)
        stores = {name: (store, store.rows_of_responses(candidates.response_ids)[0]) for name, store in opened.items()}
        rows = stores[None][1]
        lengths = np.maximum(present.records["length"][rows].astype(np.int64)[candidates.pairs], 1)
        data = cls(candidates, config, stores, {}, lengths, np.ones(len(candidates.pairs), dtype=bool))
        return data._measured(candidates, progress)

    def without_length(self, train: npt.NDArray[np.bool_]) -> _Data:
        """The same pairs by scores whose length effect, as some prompts ((n,) bool) show it, is taken out."""
        part, index, _ = self.candidates.keep_prompts(train)
        slope = fit_length_effect(part, self.lengths[index], "tokens").slope
        return self._measured(take_out_length(self.candidates, self.lengths, slope)[0])

    def _measured(self, candidates: Candidates, progress: bool = False) -> _Data:
        """With candidates that differ in scores, and in which response of a pair is preferred."""
        pairs, usable = {}, np.ones(len(candidates.pairs), dtype=bool)
        for name, (store, rows) in self.stores.items():
            pairs[name] = measured(
                [store], [rows[candidates.pairs]], self.config, weights=candidates.weights, progress=progress
            )
            norms = pair_norms(pairs[name].gradients[0], self.config.threads)
            usable &= np.isfinite(norms) & (norms > 0)
        lengths = turn(self.lengths, (candidates.pairs != self.candidates.pairs).any(axis=1))
        return dataclasses.replace(self, candidates=candidates, pairs=pairs, lengths=lengths, usable=usable)

    @property
    def longer(self) -> npt.NDArray[np.int64]:
        """(P,), 1 where the preferred response is longer than the other, −1 where it is shorter, else 0."""
        signs: npt.NDArray[np.int64] = np.sign(self.lengths[:, 0] - self.lengths[:, 1])
        return signs

    def weights(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """What the loss of some pairs is multiplied with; None for 1."""
        return None if self.candidates.weights is None else self.candidates.weights[index]

    def part(self, index: npt.NDArray[np.int64], store: str | None) -> MeasuredPairs:
        """What a store of ``others`` holds of some pairs, or, without a name, that of the preview."""
        pairs = self.pairs[store]
        assert pairs.logps is not None and pairs.differences is not None
        return MeasuredPairs(
            [pairs.gradients[0].take(index)],
            pairs.logps[index],
            pairs.ref_logps[index],
            pairs.differences.take(index),
        )

    def features(self, index: npt.NDArray[np.int64], normalize: bool) -> npt.NDArray[np.float32]:
        """What training on some pairs pulls towards, (n, d): −ẑ, or −z in units of the mean length of these pairs."""
        gradients = self.pairs[None].gradients[0].take(index)
        norms = pair_norms(gradients, self.config.threads)
        return pulls(gradients, norms if normalize else norms.mean())

    def margins(self, weights: npt.NDArray[np.float64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """⟨w, −z⟩ of some pairs for each of several weights (W, d): (W, n)."""
        return linear_margins(weights, self.pairs[None].gradients[0].take(index))


def _choices(
    data: _Data,
    without_length: _Data | None,
    among: npt.NDArray[np.int64],
    arms: list[PreviewArm],
    budgets: list[int],
    seed: int,
) -> list[tuple[int, int, npt.NDArray[np.int64], _Data]]:
    """The pairs that each arm chooses at each budget: positions of arm and budget, indices of pairs, and whose."""
    shared: dict[str, tuple[npt.NDArray[np.int64], MeasuredPairs, PairClusters | None, PairGradients | None]] = {}
    found = []
    for position, arm in enumerate(arms):
        needs = STRATEGIES[arm.strategy].needs_of(arm.config)
        view = data
        if arm.config.length_control == "residual":
            assert without_length is not None
            view = without_length
        clustering = {
            "k": arm.config.n_clusters if "clusters" in needs else 1,
            "gradients": "gradients" in needs,
            "breadth": arm.breadth,
            "metric": arm.config.metric,
            "max_iter": arm.config.max_iter,
            "max_pairs": arm.config.max_pairs_per_prompt,
            "store": arm.store,
            "without_length": view is not data,
        }
        # Arms that cluster alike share the clusters of the seed.
        key = json.dumps(clustering)
        if key not in shared:
            index = _candidates_of(view, among, arm, seed)
            part = view.part(index, arm.store)
            clusters = features = None
            if "clusters" in needs:
                clusters, features = clustered(part, arm.config, seed=seed)
            elif "gradients" in needs:
                clusters, features = clustered(part, dataclasses.replace(arm.config, n_clusters=1), seed=seed)
            shared[key] = index, part, clusters, features
        index, part, clusters, features = shared[key]
        for at, budget in enumerate(budgets):
            candidacy = Candidacy(
                prompt_of_pair=view.candidates.prompt_of_pair[index],
                score_gaps=view.candidates.score_gaps[index],
                eligible=np.ones(len(index), dtype=bool),
                budget=min(budget, len(index)),
                config=arm.config,
                seed=seed,
                clusters=clusters,
                features=features,
                differences=part.differences,
                margins=part.margins(arm.config),
            )
            mask, usefulness = choose(arm.strategy, candidacy)
            if arm.config.length_control == "balance":
                differences = view.lengths[index, 0] - view.lengths[index, 1]
                with warnings.catch_warnings():
                    if seed > 0:
                        warnings.simplefilter("ignore", UserWarning)  # that too few can be exchanged is said once
                    mask = balance_lengths(
                        mask,
                        usefulness,
                        candidacy.eligible,
                        candidacy.prompt_of_pair,
                        differences,
                        max_depth=arm.config.max_depth,
                    )
            chosen = index[mask]
            if len(chosen) == budget:
                found.append((position, at, chosen, view))
            elif seed == 0:
                warn(f"The arm {arm.name!r} chooses {len(chosen)} pairs of a budget of {budget} and is left out there.")
    return found


def _candidates_of(data: _Data, among: npt.NDArray[np.int64], arm: PreviewArm, seed: int) -> npt.NDArray[np.int64]:
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
    if most is not None:
        rank = ranks_in_prompts(data.candidates.prompt_of_pair[among], -data.candidates.score_gaps[among])
        among = among[rank < most]
    return among


def _budgets(budget: int | Sequence[int]) -> list[int]:
    budgets = [budget] if isinstance(budget, (int, np.integer)) else list(budget)
    for value in budgets:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"budget must be whole numbers of at least 1, got {value!r}")
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"budget must be one number or several different ones, got {budget!r}")
    return [int(value) for value in budgets]


def _arms(arms: Sequence[str | Mapping[str, Any]], baseline: str, config: SelectConfig) -> list[PreviewArm]:
    found: dict[str, PreviewArm] = {}
    for arm in arms:
        values: dict[str, Any] = {"name": arm} if isinstance(arm, str) else dict(arm)
        unknown = sorted(set(values) - _FIELDS)
        if unknown or "name" not in values:
            raise ValueError(f"An arm has a name and any of strategy, breadth, select and store; got {arm!r}.")
        name = values["name"]
        strategy = values.get("strategy", name)
        if strategy not in STRATEGIES:
            raise ValueError(f"The arm {name!r} has strategy {strategy!r}; it must be one of {sorted(STRATEGIES)}.")
        if "target" in STRATEGIES[strategy].needs:
            raise ValueError(f"The arm {name!r}: a preview has no target for strategy {strategy!r}.")
        if name in found or name == ALL:
            raise ValueError(f"Two arms are called {name!r}.")
        select = {"min_depth": 0, **values.get("select", {})}
        SelectConfig.from_dict(select)
        store = values.get("store")
        found[name] = PreviewArm(
            name,
            strategy,
            values.get("breadth"),
            dataclasses.replace(config, **select) if store is None else _settings_with(store, name, config, select),
            None if store is None else os.fspath(store),
        )
    if baseline not in found:
        if baseline not in STRATEGIES:
            raise ValueError(f"baseline must be the name of an arm, got {baseline!r}; there are {', '.join(found)}.")
        found = {**found, **{arm.name: arm for arm in _arms([baseline], baseline, config)}}
    return list(found.values())


def _settings_with(store: Any, arm: str, config: SelectConfig, select: Mapping[str, Any]) -> SelectConfig:
    """The settings of an arm with a store of its own: what those of all arms say of the gradients is of another store.

    Raises:
        ValueError: Something else than a path.
        FileNotFoundError: No store there.
        StoreMismatchError: ``select`` has another setting of the gradients than the store.
    """
    if not isinstance(store, (str, os.PathLike)):
        raise ValueError(f"The arm {arm!r}: store must be the directory of a gradient store, got {store!r}.")
    if not (Path(store) / "manifest.json").is_file():
        raise FileNotFoundError(f"The arm {arm!r}: {store} holds no gradient store (no manifest.json).")
    defaults = SelectConfig()
    neutral = dataclasses.replace(config, **{name: getattr(defaults, name) for name in _OF_STORES})
    return with_settings_of(GradientStore.open(store), dataclasses.replace(neutral, **select))


def _changed(config: SelectConfig) -> dict[str, Any]:
    """The settings of an arm that are not the defaults."""
    defaults = SelectConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}
