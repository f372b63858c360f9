"""Margins of pairs from which their own labels are left out: what the rest of the data says about each label."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bpo.store.gradient_store import widened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from bpo.pairs.pair_gradients import PairGradients

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

# Ridge penalties in units of the mean squared difference of two responses of a pair, the largest first.
_PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)
# Variance of what of a response no gradient tells, in units of that of the noise of a label.
_WORTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
# Share of circles from which on the labels of a prompt are taken to be given each by itself.
_CIRCLES = 0.01
_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What the rest of the data says of each pair.

    Attributes:
        margins: (P,) float64, positive where the label is as the rest would have it.
        one_by_one: Whether labels of one prompt contradict each other, so that each testifies for all the others.
        circles: Share of triples of responses, all compared with each other, whose labels go round in a circle.
        circles_error: Its standard error over prompts; infinite where no prompt has such a triple.
        penalty: λ of the ridge regression.
        worth: Variance of what gradients do not tell of a response, 0 unless ``one_by_one``.
    """

    margins: Floats
    one_by_one: bool
    circles: float
    circles_error: float
    penalty: float
    worth: float = 0.0


def left_out_margins(gradients: Sequence[PairGradients], prompt_of_pair: Ints) -> LeftOut:
    """Returns by how much each pair would be ranked as it is labelled, by labels other than its own *(ours)*.

    Each response has a worth ⟨w, ĥ⟩, ĥ being its gradient at unit length (of several models side by side), and w the
    ridge regression of the labels, 1 for every pair, on the differences ĥ_w − ĥ_l. Near the starting policy that is
    what DPO learns. Long responses have long gradients; at unit length none counts for more than another. What of the
    labels is left out is exact, by Woodbury's identity within a prompt, so nothing is drawn and no fold is needed:

    - All labels of the prompt, as a rule: where pairs come from scores, one wrong score turns several of them together.
    - The label alone, where those of one prompt contradict each other (from one in a hundred circles on), so that each
      was given by itself. Responses then have a worth that is not in their gradients (Bradley & Terry's, with a
      variance), and a > b and b > c testify for a > c.

    Penalty and variance are those that rank most of the pairs as they are labelled.

    Args:
        gradients: Of P usable pairs, the preferred response first; an entry a model. Only their rows count.
        prompt_of_pair: (P,) int64, of two prompts or more.

    Raises:
        ValueError: All pairs are of one prompt.
    """
    if len(np.unique(prompt_of_pair)) < 2:
        raise ValueError("What the rest of the data says of a label needs pairs of two prompts at least.")
    layout = _Layout.of(gradients, prompt_of_pair)
    circles, error = layout.circles()
    shared = _Shared.of(layout)
    one_by_one = circles >= _CIRCLES
    worths = _WORTHS if one_by_one else _WORTHS[:1]
    margins = np.empty((len(worths), len(prompt_of_pair)))
    for pairs, graph, mean, covariance in shared.prompts():
        if one_by_one:
            margins[:, pairs] = _without_each(graph, mean, covariance, worths)
        else:
            margins[0, pairs] = mean[graph.pairs[:, 0]] - mean[graph.pairs[:, 1]]
    # Of equals the first, which is the least.
    best = int(np.argmax((margins > 0).sum(axis=1)))
    return LeftOut(margins[best], one_by_one, circles, error, shared.penalty, worths[best])


@dataclasses.dataclass(frozen=True)
class _Graph:
    """The pairs of one prompt.

    Attributes:
        pairs: (q, 2) int64 among its m responses, the preferred one first.
        counts: (m, m), how often two responses are compared.
        wins: (m,), pairs that each won less those that it lost.
    """

    pairs: Ints
    counts: Floats
    wins: Floats

    @classmethod
    def of(cls, pairs: Ints, size: int) -> _Graph:
        won = np.zeros((size, size))
        np.add.at(won, tuple(pairs.T), 1)
        return cls(pairs, won + won.T, won.sum(axis=1) - won.sum(axis=0))

    @property
    def laplacian(self) -> Floats:
        found: Floats = np.diag(self.counts.sum(axis=1)) - self.counts
        return found


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The responses of all pairs, by prompt.

    Attributes:
        gradients: Each model's.
        rows: (models, R) int64, the row of each response in each.
        starts: (n + 1,) int64, where the responses of each prompt start.
        pair_index: (P,) int64, the pairs by prompt.
        pair_starts: (n + 1,) int64, likewise.
        pairs: (P, 2) int64 among the R responses, in the order of ``pair_index``.
    """

    gradients: Sequence[PairGradients]
    rows: Ints
    starts: Ints
    pair_index: Ints
    pair_starts: Ints
    pairs: Ints

    @classmethod
    def of(cls, gradients: Sequence[PairGradients], prompt_of_pair: Ints) -> _Layout:
        _, prompts = np.unique(prompt_of_pair, return_inverse=True)
        n_prompts = int(prompts.max()) + 1
        stored = gradients[0].pairs.ravel()
        key = np.stack([np.repeat(prompts, 2), stored], axis=1)
        responses, first, places = np.unique(key, axis=0, return_index=True, return_inverse=True)
        pairs = places.reshape(-1, 2)
        order = np.lexsort((pairs[:, 1], pairs[:, 0], prompts))
        return cls(
            gradients,
            np.stack([each.pairs.ravel()[first] for each in gradients]),
            np.searchsorted(responses[:, 0], np.arange(n_prompts + 1)),
            order,
            np.searchsorted(prompts[order], np.arange(n_prompts + 1)),
            pairs[order],
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def graph(self, prompt: int) -> _Graph:
        """The pairs of a prompt."""
        pairs = self.pairs[self.pair_starts[prompt] : self.pair_starts[prompt + 1]] - self.starts[prompt]
        return _Graph.of(pairs, int(self.starts[prompt + 1] - self.starts[prompt]))

    def parts(self) -> Iterator[tuple[range, Floats]]:
        """Some prompts at a time, with the gradients of their responses at unit length."""
        first = 0
        while first < len(self):
            last = max(first + 1, int(np.searchsorted(self.starts, self.starts[first] + _ROWS_AT_ONCE, "right")) - 1)
            part = slice(int(self.starts[first]), int(self.starts[last]))
            yield range(first, last), np.hstack([self._unit(model, part) for model in range(len(self.gradients))])
            first = last

    def _unit(self, model: int, part: slice) -> Floats:
        rows = widened(self.gradients[model].rows[self.rows[model, part]]).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        # A response of zero gradient is worth nothing; its pairs still have one.
        unit: Floats = rows / np.where(norms > 0, norms, 1) / np.sqrt(len(self.gradients))
        return unit

    def circles(self) -> tuple[float, float]:
        """The share of compared triples whose labels go round in a circle, and its standard error."""
        found = np.zeros((len(self), 2))
        for prompt in range(len(self)):
            graph = self.graph(prompt)
            if len(graph.counts) > 2:
                won = np.zeros_like(graph.counts)
                won[tuple(graph.pairs.T)] = 1
                compared = (graph.counts > 0).astype(np.float64)
                found[prompt, 0] = np.einsum("ij,ji->", won @ won, won) / 3
                found[prompt, 1] = np.einsum("ij,ji->", compared @ compared, compared) / 6
        circles, triples = found.sum(axis=0)
        if not triples:
            return 0.0, np.inf
        residuals = found[:, 0] - circles / triples * found[:, 1]
        return float(circles / triples), float(np.sqrt((residuals**2).sum()) / triples)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The regression on all labels, in the basis in which its matrix is diagonal.

    Attributes:
        layout: The responses.
        basis: (d, d), a direction a column.
        spectrum: (d,) what the pairs have along each.
        total: (d,) the sum of the differences along each.
        unit: The mean squared difference, which penalties are in units of.
        penalty: The one that ranks most pairs as they are labelled when their prompt is left out.
    """

    layout: _Layout
    basis: Floats
    spectrum: Floats
    total: Floats
    unit: float
    penalty: float = 0.0

    @classmethod
    def of(cls, layout: _Layout) -> _Shared:
        dim = sum(each.rows.shape[1] for each in layout.gradients)
        matrix, total = np.zeros((dim, dim)), np.zeros(dim)
        for prompts, rows in layout.parts():
            start, weighted, wins = layout.starts[prompts[0]], np.empty_like(rows), np.empty(len(rows))
            for prompt in prompts:
                own = slice(int(layout.starts[prompt] - start), int(layout.starts[prompt + 1] - start))
                graph = layout.graph(prompt)
                weighted[own], wins[own] = graph.laplacian @ rows[own], graph.wins
            matrix += rows.T @ weighted
            total += wins @ rows
        spectrum, basis = np.linalg.eigh(matrix)
        unit = max(float(np.trace(matrix)) / len(layout.pairs), np.finfo(np.float64).tiny)
        shared = cls(layout, basis, np.maximum(spectrum, 0), total @ basis, unit)
        right = np.zeros(len(_PENALTIES), dtype=np.int64)
        for graph, rows in shared._rows():
            for at, penalty in enumerate(_PENALTIES):
                worth = shared._without(graph, rows, penalty)[0]
                right[at] += int((worth[graph.pairs[:, 0]] > worth[graph.pairs[:, 1]]).sum())
        return dataclasses.replace(shared, penalty=_PENALTIES[int(np.argmax(right))])

    def prompts(self) -> Iterator[tuple[Ints, _Graph, Floats, Floats]]:
        """Each prompt's pairs, and what the labels of the others say of its responses: mean and covariance."""
        layout = self.layout
        for prompt, (graph, rows) in enumerate(self._rows()):
            pairs = layout.pair_index[layout.pair_starts[prompt] : layout.pair_starts[prompt + 1]]
            yield (pairs, graph, *self._without(graph, rows, self.penalty))

    def _rows(self) -> Iterator[tuple[_Graph, Floats]]:
        for prompts, rows in self.layout.parts():
            turned, start = rows @ self.basis, self.layout.starts[prompts[0]]
            for prompt in prompts:
                own = slice(int(self.layout.starts[prompt] - start), int(self.layout.starts[prompt + 1] - start))
                yield self.layout.graph(prompt), turned[own]

    def _without(self, graph: _Graph, rows: Floats, penalty: float) -> tuple[Floats, Floats]:
        """The worth of the responses of a prompt whose labels are left out, and its covariance."""
        scaled = rows / (self.spectrum + penalty * self.unit)
        products = scaled @ rows.T
        left = np.linalg.inv(np.eye(len(rows)) - products @ graph.laplacian)
        covariance = left @ products
        return left @ (scaled @ self.total - products @ graph.wins), (covariance + covariance.T) / 2


def _without_each(graph: _Graph, known: Floats, covariance: Floats, worths: Sequence[float]) -> Floats:
    """Margins of the pairs of a prompt by all labels but that of the pair itself, for each variance of a worth.

    Args:
        graph: The pairs.
        known: (m,) worth of the responses by the labels of other prompts.
        covariance: (m, m) of what is not known of it, in units of the noise of a label.
        worths: Variances.
    """
    first, second = graph.pairs.T
    margins = np.empty((len(worths), len(graph.pairs)))
    for at, worth in enumerate(worths):
        prior = covariance + worth * np.eye(len(known))
        after = np.linalg.solve(np.eye(len(prior)) + prior @ graph.laplacian, prior)
        mean = known + after @ (graph.wins - graph.laplacian @ known)
        leverage = after[first, first] + after[second, second] - after[first, second] - after[second, first]
        margins[at] = 1 - (1 - mean[first] + mean[second]) / np.maximum(1 - leverage, 1e-9)
    return margins
