"""``preview``: splits, choices, fits, and how well they rank the pairs that are held out."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from bpo.config import SelectConfig
from bpo.data.read import read_configured
from bpo.data.rows import load_alike, load_rows
from bpo.evidence.preview.arms import EVERY, every_strategy, read_arms, read_budgets, without_store_settings
from bpo.evidence.preview.data import ArmChoice, PreviewData, choices, reasons
from bpo.evidence.preview.results import ALL, Preview
from bpo.pairs.linear import fit_direction
from bpo.selection.sources import StoreAlone
from bpo.selection.strategies.register import STRATEGIES
from bpo.store.gradient_store import GradientStore
from bpo.world.world import by_main

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.evidence.preview.arms import PreviewArm


@by_main
def preview(
    store: str | os.PathLike[str],
    dataset: Any,
    *,
    budget: int | Sequence[int],
    arms: Literal["all"] | Sequence[str | Mapping[str, Any]] = ("bpo", "uniform", "random", "best_worst", "margin"),
    baseline: str = "random",
    heldout: Any = 0.25,
    seeds: int = 100,
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
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
            out stays as the data has it. ``"all"`` is every strategy that there is; those that the data has nothing for
            are left out, and named in ``left_out`` with the reason.
        baseline: The arm that the others are compared with; added if it is not among them.
        heldout: Share of the prompts that each seed holds out, or a data set of its own whose gradients are in the
            store.
        seeds: Splits.
        processing_class: The tokenizer that the stores were made with, or the path of a model that has it; only asked
            for where responses begin at different tokens in different pairs, as where the end of a prompt merges with
            some of them.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``; where
            ``heldout`` is data that has them, too, they are called so there.
        config: Settings of all arms.
        regularization: λ of the L2 penalty λ/2 ‖w‖²; larger is closer to a single small step of training.
        normalize: Whether pairs are fitted at unit length, as they are clustered; else at their own.
        progress: Whether to show a progress bar.

    Returns:
        The accuracies.

    Raises:
        ValueError: An arm or strategy that is unknown, a strategy that needs what a store does not hold, budgets above
            the candidates, or too few prompts to split.
        FileNotFoundError: No store where one is named.
        bpo.StoreError: As :func:`bpo.select`.

    Example:
        .. code-block:: python

            print(bpo.preview("gradients", "responses.jsonl", budget=[60, 150]).summary())
    """
    start = time.perf_counter()
    source = StoreAlone(GradientStore.open(store), SelectConfig.of(config), processing_class)
    _check_numbers(seeds, regularization)
    budgets = read_budgets(budget)
    names, left_out = every_strategy() if arms == EVERY else (arms, {})
    known = read_arms(names, baseline, source.config)
    heldout = heldout if isinstance(heldout, float) else load_alike(heldout, columns)
    rows = load_rows(dataset, split=split, columns=columns)
    splits = _Splits.read(rows, heldout, source, known, processing_class, progress)
    if arms == EVERY:
        left_out |= _nothing_for(known, baseline, splits)
        known = [arm for arm in known if arm.name not in left_out]
    residual = _check_scores(known, splits.data)

    shape = (len(known) + 1, len(budgets), seeds)
    accuracy, controlled, depth = (np.full(shape, np.nan) for _ in range(3))
    sizes = np.zeros((2, seeds))
    for seed in tqdm(range(seeds), desc="Preview", unit="seed", disable=not progress):
        data, train, among, wanted = splits.data, *splits.split(seed)
        if max(budgets) > len(among):
            raise ValueError(
                f"budget={max(budgets)} is above the {len(among)} candidates of the training prompts (seed {seed})."
            )
        sizes[:, seed] = len(among), len(wanted)
        without_length = data.without_length(train) if residual else None
        chosen = [
            *choices(data, without_length, among, known, budgets, seed),
            ArmChoice(len(known), None, among, data),
        ]
        fitted = [
            fit_direction(
                choice.data.features(choice.pairs, normalize), regularization, choice.data.weights(choice.pairs)
            )
            for choice in chosen
        ]
        ranked, longer = splits.test.margins(np.stack(fitted), wanted), splits.test.longer[wanted]
        for choice, margins in zip(chosen, ranked, strict=True):
            place = (choice.arm, slice(None) if choice.budget is None else choice.budget, seed)
            accuracy[place], controlled[place] = _accuracies(margins, longer)
            depth[place] = len(choice.pairs) / len(np.unique(data.candidates.prompt_of_pair[choice.pairs]))
    return Preview(
        arms=[arm.name for arm in known] + [ALL],
        budgets=budgets,
        accuracy=accuracy,
        length_controlled=controlled,
        mean_depth=depth,
        baseline=baseline,
        heldout_share=splits.share,
        n_pairs=float(sizes[0].mean()),
        n_heldout=float(sizes[1].mean()),
        seconds=time.perf_counter() - start,
        settings={
            "store": str(store),
            "seeds": seeds,
            "regularization": regularization,
            "normalize": normalize,
            "arms": {arm.name: arm.describe() for arm in known},
        },
        left_out=left_out,
    )


@dataclasses.dataclass(frozen=True)
class _Splits:
    """Pairs to choose from and pairs to judge by.

    Attributes:
        data: Candidate pairs.
        test: Pairs of which some are held out: the same, or those of a data set of their own.
        n_heldout: Prompts that each seed holds out; 0 where ``test`` is a data set of its own.
    """

    data: PreviewData
    test: PreviewData
    n_heldout: int

    @classmethod
    def read(
        cls,
        dataset: Any,
        heldout: Any,
        source: StoreAlone,
        arms: Sequence[PreviewArm],
        processing_class: Any,
        progress: bool,
    ) -> _Splits:
        """Reads the data.

        Raises:
            ValueError: Unusable data, or too few prompts to split.
        """
        reading = dataclasses.replace(source.config, token_weights=None, ref_model=None)
        sources: dict[str | None, StoreAlone] = {None: source}
        for arm in arms:
            if arm.store is not None:
                other = GradientStore.open(arm.store)
                sources[arm.store] = StoreAlone(other, without_store_settings(source.config), processing_class)
        data = PreviewData.of(read_configured(dataset, reading), sources, progress)
        if not isinstance(heldout, float):
            test = PreviewData.of(read_configured(heldout, reading), {None: source}, progress)
            return cls(data, test, 0)
        if not 0 < heldout < 1:
            raise ValueError(f"heldout must be a share above 0 and below 1 or a data set, got {heldout!r}")
        n_prompts = len(data.candidates.prompts)
        n_heldout = round(heldout * n_prompts)
        if not 1 <= n_heldout < n_prompts:
            raise ValueError(f"{n_prompts} prompts cannot be split with heldout={heldout!r}.")
        return cls(data, data, n_heldout)

    @property
    def share(self) -> float | None:
        """Held-out prompts as a share of all; None if they are a data set of their own."""
        return self.n_heldout / len(self.data.candidates.prompts) if self.n_heldout else None

    def split(self, seed: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draws the prompts of a seed.

        Returns:
            Which prompts are trained on, (n,) bool; the usable pairs of these; and those of ``test`` that are held out.
        """
        data = self.data
        train = np.ones(len(data.candidates.prompts), dtype=bool)
        train[np.random.default_rng([seed, 1]).permutation(len(train))[: self.n_heldout]] = False
        trained = train[data.candidates.prompt_of_pair]
        wanted = self.test.usable & ~trained if self.n_heldout else self.test.usable
        return train, np.flatnonzero(data.usable & trained), np.flatnonzero(wanted)


def _check_numbers(seeds: Any, regularization: Any) -> None:
    """Checks how many splits there are to be, and the penalty."""
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(f"seeds must be a whole number of at least 1, got {seeds!r}")
    if not isinstance(regularization, (int, float)) or not 0 < regularization < math.inf:
        raise ValueError(f"regularization must be above 0, got {regularization!r}")


def _nothing_for(arms: Sequence[PreviewArm], baseline: str, splits: _Splits) -> dict[str, str]:
    """Returns the arms that the data has nothing for, with the reason.

    Raises:
        ValueError: The baseline is one of them.
    """
    data, (train, among, _) = splits.data, splits.split(0)
    unscored = int(np.isnan(data.candidates.score_gaps).sum())
    # All have the settings of the call.
    residual = arms[0].config.length_control == "residual"
    if unscored and residual:
        return {}  # which is refused for all of them
    by_scores = [arm for arm in arms if "scores" in STRATEGIES[arm.strategy].needs_of(arm.config)] if unscored else []
    found = {arm.name: f"it reads scores, and {unscored} pairs have none" for arm in by_scores}
    others = [arm for arm in arms if arm.name not in found]
    found |= reasons(data, data.without_length(train) if residual else None, among, others, 0)
    if baseline in found:
        raise ValueError(f"The baseline {baseline!r} cannot be had here: {found[baseline]}")
    return found


def _check_scores(arms: Sequence[PreviewArm], data: PreviewData) -> bool:
    """Checks that there are scores where an arm needs them; returns whether one takes the length effect out."""
    needs_scores = [arm.name for arm in arms if "scores" in STRATEGIES[arm.strategy].needs_of(arm.config)]
    residual = [arm.name for arm in arms if arm.config.length_control == "residual"]
    if (needs_scores or residual) and np.isnan(data.candidates.score_gaps).any():
        raise ValueError(f"The arm {[*needs_scores, *residual][0]!r} needs scores, and some pairs have none.")
    return bool(residual)


def _accuracies(margins: npt.NDArray[np.float32], longer: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Share of pairs ranked rightly, and the mean of that on pairs whose preferred response is longer and shorter."""
    right = (np.sign(margins) + 1) / 2
    sides = [right[longer == side].mean() if (longer == side).any() else np.nan for side in (1, -1)]
    return right.mean(), np.mean(sides)
