"""Weights of pairs by how fast the policy learns their prompts, from one round of selection to the next."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import datasets
    import numpy.typing as npt

    from bpo.selection.selection import Selection

# What of a row makes the prompt, beside its text.
_OF_PROMPT = ("prompt", "tools", "chat_template_kwargs")


def learning_progress(selections: Sequence[Selection], decay: float) -> npt.NDArray[np.float64]:
    """Returns by how much the policy learned the prompt of each pair of the last of some rounds.

    LPPO (arXiv 2507.06573) follows the share of a prompt's rollouts that pass a verifier, by an exponential moving
    average p̄, and takes its last change Δ for progress. Here the share is that of the prompt's candidate pairs that the
    policy ranks as they are labelled, its implicit margin against the reference being above 0, and a tie one half
    *(ours)*: those of the data, or of the responses that were sampled for the round. A round that trains on no pair of
    a prompt leaves its average as it was.

    Args:
        selections: Those of all rounds so far, of strategies that read gradients.
        decay: β of p̄ ← β p̄ + (1 − β) p.

    Returns:
        (n,) float64 for the rows of the last data set: Δ, and 0 for a prompt that no earlier round trained on.
    """
    averages: dict[str, float] = {}
    changes: dict[str, float] = {}
    for selection in selections:
        before = dict(averages)
        for prompt, rate in _rates(selection).items():
            averages[prompt] = rate if prompt not in before else decay * before[prompt] + (1 - decay) * rate
        changes = {prompt: averages[prompt] - before.get(prompt, averages[prompt]) for prompt in averages}
    return np.array([changes[prompt] for prompt in _prompts(selections[-1].dataset)])


def by_progress(dataset: datasets.Dataset, progress: npt.NDArray[np.float64], sharpness: float, column: str) -> Any:
    """Weighs each pair by σ(κΔ) + ½, LPPO's weight as others' code has it, times the weight that the data gives it.

    Args:
        dataset: The pairs of a round.
        progress: (n,) Δ of each.
        sharpness: κ.
        column: Where weights are, or will be.

    Returns:
        The data set with weights from ½ to 1½ times what they were; a Δ of 0 leaves them.
    """
    weights = 1 + np.tanh(sharpness * progress / 2) / 2  # the same, without overflow
    if column in dataset.column_names:
        weights = weights * np.array(dataset[column])
        dataset = dataset.remove_columns(column)
    return dataset.add_column(column, weights.tolist())


def _rates(selection: Selection) -> dict[str, float]:
    """Share of the pairs of each prompt that the policy ranks rightly, of the prompts that are trained on."""
    pairs = selection.pairs
    policy, reference = (
        pairs[f"{kind}_chosen"].to_numpy().astype(np.float64) - pairs[f"{kind}_rejected"].to_numpy().astype(np.float64)
        for kind in ("logp", "ref_logp")
    )
    right = (np.sign(policy - reference) + 1) / 2
    known = ~np.isnan(right)
    prompts = pairs["prompt"].to_numpy()[known]
    total, count = np.bincount(prompts, right[known]), np.bincount(prompts)
    names = dict(zip(selection.dataset["bpo_prompt"], _prompts(selection.dataset), strict=True))
    return {name: float(total[prompt] / count[prompt]) for prompt, name in names.items()}


def _prompts(dataset: datasets.Dataset) -> list[str]:
    """What tells the prompts of rows apart, whatever round they are of."""
    columns = [dataset[name] for name in _OF_PROMPT if name in dataset.column_names]
    return [json.dumps(values, sort_keys=True) for values in zip(*columns, strict=True)]
