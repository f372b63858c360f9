"""The register of strategies: their names, what they need, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, get_args

import numpy as np

from bpo.selection.strategies import (
    controls,
    depth,
    designs,
    gaps,
    gradients,
    heldout,
    implicit,
    information,
    matching,
)
from bpo.selection.strategies.candidacy import Need, Strategy

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.selection.strategies.candidacy import Candidacy, Choice


_GRADIENTS: frozenset[Need] = frozenset({"gradients"})
_HELDOUT: frozenset[Need] = _GRADIENTS | {"heldout"}
_LOGPS: frozenset[Need] = _GRADIENTS | {"logps"}
STRATEGIES: dict[str, Strategy] = {
    "bpo": Strategy(
        depth.bpo,
        _GRADIENTS | {"clusters"},
        keeps_every_prompt=True,
        weighs_usefulness=True,
        shares_rows=True,
    ),
    "uniform": Strategy(depth.uniform, keeps_every_prompt=True),
    "random": Strategy(controls.random),
    "best_worst": Strategy(controls.best_worst, frozenset({"scores"})),
    "matching": Strategy(matching.matching, _GRADIENTS, shares_rows=True),
    "margin": Strategy(gaps.margin, frozenset({"scores"})),
    "two_sigma": Strategy(gaps.two_sigma, frozenset({"scores"})),
    "air": Strategy(gaps.air, frozenset({"scores"})),
    "fused_margin": Strategy(implicit.fused_margin, _LOGPS | {"scores"}),
    "alignment_potential": Strategy(implicit.alignment_potential, _LOGPS | {"scores"}),
    "irm": Strategy(implicit.irm, _LOGPS | {"reference"}),
    "lossdiff": Strategy(heldout.lossdiff, _HELDOUT | _LOGPS),
    "lossdiff_irm": Strategy(heldout.lossdiff_irm, _HELDOUT | _LOGPS | {"reference"}),
    "easiest": Strategy(heldout.easiest, _HELDOUT),
    "smallest_margin": Strategy(heldout.smallest_margin, _HELDOUT),
    "bees": Strategy(heldout.bees, _HELDOUT | {"scores"}),
    "less": Strategy(gradients.less, _GRADIENTS | {"target"}),
    "largest_norm": Strategy(gradients.largest_norm, _GRADIENTS),
    "smallest_norm": Strategy(gradients.smallest_norm, _GRADIENTS),
    "coreset": Strategy(designs.coreset, _GRADIENTS | {"clusters"}),
    "d_optimal": Strategy(designs.d_optimal, _GRADIENTS | {"differences"}),
    "bald": Strategy(information.bald, _HELDOUT),
    "epig": Strategy(information.epig, _HELDOUT),
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
        needs: What of the candidacy it reads: ``"scores"``, ``"gradients"``, ``"clusters"``, ``"heldout"`` (held-out
            margins), ``"logps"``, ``"reference"`` (of another model than the policy), ``"differences"``, ``"target"``;
            all but the first are computed with the model, or come from its store.
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


def is_ours(name: str) -> bool:
    """Whether a strategy is one of bpo's own."""
    return name in _OURS


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
