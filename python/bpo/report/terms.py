"""What a cluster of texts is about: the words that are commoner in it than elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[^\W\d_]{2,}")
_CHARACTERS = 2000  # of a text: what it is about stands at its beginning
_TERMS = 5


def characteristic_terms(groups: Mapping[int, Iterable[str]]) -> dict[int, list[str]]:
    """Returns the words that tell each group of texts from the others, the most telling first.

    A word's weight in a group is tf · log(1 + A/f), c-TF-IDF (Grootendorst, arXiv 2203.05794): tf is the share of the
    group's texts that have it, f the sum of that over groups and A the mean number of words of a group; a text counts a
    word once *(ours)*, so that one long text does not speak for all.

    Example:
        >>> characteristic_terms({0: ["sum of two", "sum of three"], 1: ["name of a city", "name of a river"]})[0][0]
        'sum'
    """
    counted, sizes = {}, {}
    for group, texts in groups.items():
        found: Counter[str] = Counter()
        sizes[group] = 0
        for text in texts:
            sizes[group] += 1
            found.update(sorted(set(_WORD.findall(text[:_CHARACTERS].casefold()))))
        counted[group] = found
    shares = {
        group: {word: count / sizes[group] for word, count in found.items()} for group, found in counted.items()
    }
    every: Counter[str] = Counter()
    for found in shares.values():
        every.update(found)
    mean = float(np.mean([sum(found.values()) for found in shares.values()])) if shares else 0.0
    return {
        group: [
            word
            for word, _ in sorted(
                ((word, share * np.log1p(mean / every[word])) for word, share in found.items()),
                key=lambda item: (-item[1], item[0]),
            )[:_TERMS]
            # Of a group of several texts a word of one of them says nothing.
            if sizes[group] < 3 or counted[group][word] > 1
        ]
        for group, found in shares.items()
    }
