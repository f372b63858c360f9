"""The page of an audit: what was found, and the pairs whose labels look worst, to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.report.page import first_places, write_page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pyarrow as pa

_MOST_PROMPTS = 20


def write_audit_page(
    path: Path, pairs: pa.Table, prompts: pa.Table, *, skipped: Mapping[str, list[str]], **values: Any
) -> Path:
    """Writes the page: numbers, probabilities, groups, prompts, and the worst pairs with both responses.

    Args:
        path: File to write; replaced whole or not at all.
        pairs: One row a pair, as :attr:`bpo.Audit.pairs`.
        prompts: One row a prompt, as :attr:`bpo.Audit.prompts`.
        skipped: What of the data could not be used: reason → places.
        values: What else the template names.

    Returns:
        The path.
    """
    counts = np.histogram(pairs["wrong"].to_numpy(), bins=10, range=(0, 1))[0]
    order = np.lexsort((prompts["prompt"].to_numpy(), -prompts["wrong"].to_numpy()))[:_MOST_PROMPTS]
    return write_page(
        "audit.html",
        path,
        n_pairs=pairs.num_rows,
        n_prompts=prompts.num_rows,
        bars=[
            {"low": 10 * place, "count": int(count), "share": count / max(counts.max(), 1)}
            for place, count in enumerate(counts)
        ],
        prompts=prompts.take(order).to_pylist(),
        skipped=first_places(skipped),
        **values,
    )
