"""What a cluster of texts is about: the words that are commoner in it than elsewhere."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[^\W\d_]{2,}")
_CHARACTERS = 2000  # of a text: what it is about stands at its beginning
_TERMS = 5
_TELLING = 1.0


def characteristic_terms(texts: Mapping[int, str], groups: Mapping[int, Iterable[int]]) -> dict[int, list[str]]:
    """Returns the words that tell each group of texts from the others, the most telling first; at most five.

    A word's weight is the log-odds ratio of a text having it, in the group against the others, in units of its standard
    error (Monroe, Colaresi & Quinn 2008, with ½ added to each count for a prior); a text counts a word once *(ours)*,
    so that one long text does not speak for all.

    Example:
        >>> texts = {0: "sum of two", 1: "sum of three", 2: "name of a city", 3: "name of a river"}
        >>> characteristic_terms(texts, {0: [0, 1], 1: [2, 3]})
        {0: ['sum'], 1: ['name']}
    """
    counted: dict[int, Counter[str]] = {}
    sizes: dict[int, int] = {}
    every: Counter[str] = Counter()
    words = {key: sorted(set(_WORD.findall(text[:_CHARACTERS].casefold()))) for key, text in texts.items()}
    for group, keys in groups.items():
        members = list(keys)
        sizes[group] = len(members)
        counted[group] = Counter(word for key in members for word in words[key])
        every.update(counted[group])
    n_texts = sum(sizes.values())
    found = {}
    for group, counts in counted.items():
        size, others = sizes[group], n_texts - sizes[group]
        weights = {word: _weight(count, size, every[word] - count, others) for word, count in counts.items()}
        telling = sorted(((-weight, word) for word, weight in weights.items() if weight > _TELLING))
        # Where there are no others, nothing tells a group from them.
        found[group] = [] if others == 0 else [word for _, word in telling[:_TERMS]]
    return found


def _weight(inside: int, size: int, outside: int, others: int) -> float:
    """Log-odds ratio of so many of the group's texts against so many of the others, in standard errors."""
    counts = [inside + 0.5, size - inside + 0.5, outside + 0.5, others - outside + 0.5]
    ratio = math.log(counts[0] / counts[1]) - math.log(counts[2] / counts[3])
    return ratio / math.sqrt(sum(1 / count for count in counts))
