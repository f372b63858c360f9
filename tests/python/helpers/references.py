"""Plain versions of what the core does fast."""

import numpy as np
from scipy.optimize import nnls


def pursuit(vectors, quota):
    """Picks and weights of one cluster."""
    vectors = vectors.astype(np.float64)
    mean = vectors.mean(axis=0)
    picks, weights = [], np.zeros(0)
    while len(picks) < quota:
        products = vectors @ (mean - weights @ vectors[picks])
        products[picks] = -np.inf
        if products.max() <= 1e-10 * np.linalg.norm(mean):
            break
        picks.append(int(products.argmax()))
        weights, _ = nnls(vectors[picks].T, mean)
    rest = np.setdiff1d(np.arange(len(vectors)), picks)
    rest = rest[np.argsort(-(vectors[rest] @ mean), kind="stable")][: quota - len(picks)]
    return np.concatenate([picks, rest]).astype(int), np.concatenate([weights, np.zeros(len(rest))])


def greedy_design(vectors, budget, regularization, prompts, max_depth, eligible):
    """Every determinant of every step, from scratch."""
    vectors = vectors.astype(np.float64)
    matrix = regularization * np.eye(vectors.shape[1])
    picks, gains = [], []
    while len(picks) < budget:
        full = [p for p in set(prompts) if sum(prompts[q] == p for q in picks) >= max_depth]
        allowed = [p for p in np.flatnonzero(eligible) if p not in picks and prompts[p] not in full]
        if not allowed:
            break
        base = np.linalg.slogdet(matrix)[1]
        growth = [np.linalg.slogdet(matrix + np.outer(vectors[p], vectors[p]))[1] - base for p in allowed]
        picks.append(allowed[int(np.argmax(growth))])
        gains.append(max(growth))
        matrix += np.outer(vectors[picks[-1]], vectors[picks[-1]])
    return picks, gains


def greedy_matching(
    vectors,
    target,
    budget,
    eligible=None,
    prompts=None,
    min_depth=0,
    max_depth=None,
    clusters=None,
    cluster_weights=None,
):
    """The cosine of every sum of every step, from the vectors."""
    vectors, target = vectors.astype(np.float64), target / np.linalg.norm(target.astype(np.float64))
    open_ = np.ones(len(vectors), dtype=bool) if eligible is None else eligible.copy()
    prompts = np.arange(len(vectors)) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    clusters = np.zeros(len(vectors), dtype=int) if clusters is None else clusters
    depth, total = np.zeros(len(vectors), dtype=int), np.zeros(vectors.shape[1])
    quotas, picks, cosines = np.zeros(clusters.max(initial=0) + 1, dtype=int), [], []
    without = len(set(prompts[open_])) if min_depth else 0
    budget = min(budget, len(vectors))

    def allowed():
        if len(picks) < without:
            return open_ & (depth[prompts] == 0)
        return open_ & (depth[prompts] < (max_depth or len(vectors))) & (quotas[clusters] > 0)

    while len(picks) < budget:
        left = budget - len(picks)
        if not allowed().any():
            usable = open_ & (depth[prompts] < (max_depth or len(vectors)))
            if not usable.any():
                break
            quotas = shares(np.bincount(clusters[usable], minlength=len(quotas)), cluster_weights, left)
            continue
        sums = total + vectors
        norms = np.linalg.norm(sums, axis=1)
        values = np.where(norms > 0, sums @ target / np.where(norms > 0, norms, 1), -np.inf)
        order = np.argsort(-values, kind="stable")
        for pair in order[allowed()[order]][: min(max(1, len(picks) // 64), 256, left)]:
            if not allowed()[pair]:
                continue
            if len(picks) >= without:
                quotas[clusters[pair]] -= 1
            picks.append(pair)
            depth[prompts[pair]] += 1
            open_[pair] = False
            total = total + vectors[pair]
            norm = np.linalg.norm(total)
            cosines.append(total @ target / norm if norm > 0 else 0.0)
    return picks, cosines


def shares(sizes, weights, total):
    """Shares of a total in proportion to sizes times weights, by the method of the largest remainder."""
    masses = sizes if weights is None else sizes * weights[: len(sizes)]
    masses = masses if masses.any() else sizes
    exact = total * (masses / masses.sum())
    quotas = np.floor(exact).astype(int)
    order = [index for index in np.argsort(-(exact - quotas), kind="stable") if masses[index] > 0]
    quotas[order[: total - quotas.sum()]] += 1
    return quotas


def most_informative(vectors, slopes, targets, prior, budget, prompts, most):
    """EPIG, one pair after another: the posterior anew at every turn, the determinant for every pair and target."""
    vectors, targets = vectors.astype(np.float64), targets.astype(np.float64)
    picks, gains = [], []
    while len(picks) < budget:
        taken = vectors[picks] * np.sqrt(slopes[picks])[:, None]
        covariance = np.linalg.inv(prior * np.eye(vectors.shape[1]) + taken.T @ taken)
        open_ = [p for p in range(len(vectors)) if p not in picks]
        open_ = [p for p in open_ if sum(prompts[q] == prompts[p] for q in picks) < most]
        found = []
        for pair in open_:
            alone = vectors[pair] @ covariance @ vectors[pair] + 1 / slopes[pair]
            shared = targets @ covariance @ vectors[pair]
            theirs = np.einsum("td,de,te->t", targets, covariance, targets)
            # The determinant of the covariance of both, for each target.
            found.append(0.5 * np.mean(np.log(alone * theirs) - np.log(alone * theirs - shared**2)))
        picks.append(open_[int(np.argmax(found))])
        gains.append(max(found))
    return picks, gains
