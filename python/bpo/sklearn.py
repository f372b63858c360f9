"""The clustering and the sketch of the core as scikit-learn estimators."""

from __future__ import annotations

import numbers
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bpo import _core

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics.pairwise import cosine_distances, euclidean_distances
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data
except ImportError as error:
    raise ImportError(
        "bpo.sklearn needs scikit-learn 1.6 or newer: pip install 'balanced-preference-optimization[sklearn]'"
    ) from error

if TYPE_CHECKING:
    import numpy.typing as npt

    Float = npt.NDArray[np.float32] | npt.NDArray[np.float64]

__all__ = ["KMeans", "SparseSketch"]

# What is kept as it comes; anything else becomes the first.
_DTYPES = [np.float64, np.float32, np.float16]
_SEEDS = np.iinfo(np.int32).max


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """k-means with the words of :class:`sklearn.cluster.KMeans`, on the core.

    The core computes in float32. float64 samples are first centred in float64, so those far from the origin lose no
    digits; float16 samples stay narrow in memory. The result does not depend on the number of threads.

    Args:
        n_clusters: Number of clusters, at most that of the samples.
        metric: ``"euclidean"``, or ``"cosine"`` for spherical k-means, where a sample counts by its direction alone.
        init: ``"k-means++"`` (greedy: Arthur and Vassilvitskii, 2007, with 2 + ln k trials for each centre), or the
            first centres, (n_clusters, n_features).
        n_init: Runs from different seeds, of which the one of lowest inertia is kept. ``"auto"`` is 1; so is any number
            if ``init`` is an array.
        max_iter: Most updates of the centres in one run.
        tol: A run ends when the squared shift of the centres is at most this times the mean variance of a feature, or
            when no label changes.
        batch_size: Samples of the first of the nested mini-batches (Newling and Fleuret, 2016); ``None`` uses all
            samples in every iteration (Lloyd).
        random_state: Of the seeding: a number, a :class:`numpy.random.RandomState`, or ``None`` for NumPy's global one.
        threads: Threads of the core; ``None`` is all cores.

    Attributes:
        cluster_centers_: (n_clusters, n_features), float64 after a fit of float64, else float32; of unit length with
            ``metric="cosine"``.
        labels_: (n_samples,) int32, the cluster of each sample.
        inertia_: Weighted sum of squared distances from the centres; of 1 − cosine with ``metric="cosine"``.
        n_iter_: Updates of the centres in the best run.
        n_features_in_: Number of features seen by ``fit``.
        feature_names_in_: (n_features,) names of the features, if all are text.

    Example:
        >>> X = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
        >>> kmeans = KMeans(n_clusters=2, random_state=0).fit(X)
        >>> kmeans.cluster_centers_[kmeans.predict([[0, 0], [12, 3]])]
        array([[ 1., 2.],
               [10., 2.]])
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        init: Any = "k-means++",
        n_init: int | Literal["auto"] = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        batch_size: int | None = None,
        random_state: Any = None,
        threads: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.random_state = random_state
        self.threads = threads

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KMeans:
        """Finds the clusters of the samples.

        Args:
            X: (n_samples, n_features).
            y: Ignored.
            sample_weight: (n_samples,), how often each sample counts; ``None`` is once.

        Returns:
            This estimator.

        Raises:
            ValueError: A parameter out of its range, fewer samples than clusters, a value that is NaN, infinite or too
                large for float32, weights that are negative or all zero, or, with ``metric="cosine"``, a sample of
                length zero.
            TypeError: A sparse matrix.
        """
        X = validate_data(self, X, dtype=_DTYPES, order="C")
        _check_count("n_clusters", self.n_clusters)
        if len(X) < self.n_clusters:
            raise ValueError(f"n_samples={len(X)} should be >= n_clusters={self.n_clusters}.")
        weights = _weights(sample_weight, len(X))
        self._origin = _mean(X, weights) if X.dtype == np.float64 and self.metric == "euclidean" else None
        init = self._first_centers(X.shape[1])
        rows = self._rows(X)
        generator = check_random_state(self.random_state)
        best: _core.KMeansResult | None = None
        for _ in range(self._runs()):
            result = _core.kmeans(
                rows,
                int(self.n_clusters),
                sample_weight=weights,
                init=init,
                metric=self.metric,
                max_iter=self.max_iter,
                tol=self.tol,
                seed=int(generator.randint(_SEEDS)),
                batch_size=self.batch_size,
                threads=self.threads,
            )
            if best is None or result.inertia[-1] < best.inertia[-1]:
                best = result
        assert best is not None
        centers = best.centroids if self._origin is None else best.centroids + self._origin
        self.cluster_centers_ = centers.astype(np.promote_types(X.dtype, np.float32), copy=False)
        self.labels_ = best.labels
        self.inertia_ = float(best.inertia[-1])
        self.n_iter_ = best.n_iter
        found = len(np.unique(best.labels))
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({self.n_clusters}). Possibly "
                "due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: Any) -> npt.NDArray[np.int32]:
        """Returns the cluster of the centre nearest to each sample.

        Args:
            X: (n_samples, n_features).

        Returns:
            (n_samples,) int32; of equally near centres the first.

        Raises:
            ValueError: As for :meth:`fit`.
        """
        return self._assign(X)[0]

    def transform(self, X: Any) -> Float:
        """Returns the distance of each sample from every centre; with ``metric="cosine"``, 1 − cosine.

        Args:
            X: (n_samples, n_features).

        Returns:
            (n_samples, n_clusters) float32, or float64 if the samples or the centres are.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_DTYPES)
        X = X.astype(np.promote_types(X.dtype, np.float32), copy=False)
        distances = cosine_distances if self.metric == "cosine" else euclidean_distances
        return distances(X, self.cluster_centers_)  # type: ignore[no-any-return]

    def score(self, X: Any, y: None = None, sample_weight: Any = None) -> float:
        """Returns minus the inertia of the samples with the centres found.

        Args:
            X: (n_samples, n_features).
            y: Ignored.
            sample_weight: (n_samples,), how often each sample counts; ``None`` is once.
        """
        distances = self._assign(X)[1].astype(np.float64)
        weights = _weights(sample_weight, len(distances))
        terms = distances if self.metric == "cosine" else distances**2
        return -float(terms.sum() if weights is None else weights @ terms)

    def _assign(self, X: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        check_is_fitted(self)
        rows = self._rows(validate_data(self, X, reset=False, dtype=_DTYPES, order="C"))
        centers = self._rows(np.ascontiguousarray(self.cluster_centers_))
        return _core.assign(rows, centers, metric=self.metric, threads=self.threads)

    def _rows(self, X: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns samples or centres as the core takes them: from the origin of the fit, float32 or float16."""
        if self._origin is None:
            return X.astype(np.float32) if X.dtype == np.float64 else X
        # Cast as it is written, without a copy in float64.
        rows = np.empty(X.shape, dtype=np.float32)
        np.subtract(X, self._origin, out=rows, casting="same_kind")
        return rows

    def _first_centers(self, n_features: int) -> Any:
        if isinstance(self.init, str):
            return self.init
        centers = check_array(self.init, dtype=[np.float64, np.float32], order="C", input_name="init")
        if centers.shape != (self.n_clusters, n_features):
            raise ValueError(
                f"init must have the shape (n_clusters, n_features) = ({self.n_clusters}, {n_features}), got "
                f"{centers.shape}."
            )
        return self._rows(centers)

    def _runs(self) -> int:
        if isinstance(self.n_init, str) and self.n_init == "auto":
            return 1
        _check_count("n_init", self.n_init)
        if isinstance(self.init, str) or self.n_init == 1:
            return self.n_init
        warnings.warn(
            f"Explicit initial center position passed: performing only one init instead of n_init={self.n_init}.",
            RuntimeWarning,
            stacklevel=3,
        )
        return 1

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class SparseSketch(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Random projection by a sparse sketch that keeps inner products, at about the speed of memory.

    Each feature is added, with a random sign, to ``nnz`` of the components: a count sketch (Weinberger et al., 2009;
    nnz > 1: Kane and Nelson, 2014) whose components are rotated blocks of the features, so that it reads and writes in
    order. The map is never stored. The cosine of two samples is kept to about 1/√n_components.

    Args:
        n_components: Length of a sketch.
        nnz: Components to which each feature is added; divides ``n_components``.
        random_state: A number is the seed of :class:`bpo._core.Sketcher`, for the same map as there; a
            :class:`numpy.random.RandomState`, or ``None`` for NumPy's global one, draws it.
        threads: Threads of the core; ``None`` is all cores. Results do not depend on it.

    Attributes:
        seed_: Seed of the map.
        n_features_in_: Number of features seen by ``fit``.
        feature_names_in_: (n_features,) names of the features, if all are text.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(2, 100_000)).astype(np.float16)
        >>> sketch = SparseSketch(n_components=1024, random_state=0).fit_transform(X)
        >>> sketch.shape, sketch.dtype
        ((2, 1024), dtype('float32'))
    """

    def __init__(
        self, n_components: int = 1024, *, nnz: int = 1, random_state: Any = None, threads: int | None = None
    ) -> None:
        self.n_components = n_components
        self.nnz = nnz
        self.random_state = random_state
        self.threads = threads

    def fit(self, X: Any, y: None = None) -> SparseSketch:
        """Draws the map; of the samples only the number of features matters.

        Args:
            X: (n_samples, n_features).
            y: Ignored.

        Returns:
            This estimator.

        Raises:
            ValueError: A parameter out of its range, or a value that is NaN or infinite.
            TypeError: A sparse matrix.
        """
        validate_data(self, X, dtype=_DTYPES)
        _check_count("n_components", self.n_components)
        _check_count("nnz", self.nnz)
        if self.n_components % self.nnz:
            raise ValueError(f"nnz must divide n_components={self.n_components}, got {self.nnz}.")
        if isinstance(self.random_state, numbers.Integral):
            self.seed_ = int(self.random_state)
            if not 0 <= self.seed_ < 2**64:
                raise ValueError(f"random_state must be from 0 to 2**64 - 1, got {self.random_state}.")
        else:
            self.seed_ = int(check_random_state(self.random_state).randint(_SEEDS))
        self._n_features_out = int(self.n_components)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """Returns the sketch of each sample.

        Args:
            X: (n_samples, n_features); float16 and float32 are read as they are, anything else is converted to float32.

        Returns:
            (n_samples, n_components) float32.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_DTYPES, order="C")
        rows = X.astype(np.float32) if X.dtype == np.float64 else X
        sketcher = _core.Sketcher(self._n_features_out, seed=self.seed_, nnz=int(self.nnz))
        return sketcher.sketch(rows, threads=self.threads)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _weights(sample_weight: Any, n_samples: int) -> npt.NDArray[np.float32] | None:
    if sample_weight is None:
        return None
    if isinstance(sample_weight, numbers.Real):
        sample_weight = np.full(n_samples, sample_weight)
    weights: npt.NDArray[np.float32] = check_array(
        sample_weight, dtype=np.float32, order="C", ensure_2d=False, input_name="sample_weight"
    )
    if weights.shape != (n_samples,):
        raise ValueError(f"sample_weight must have the shape ({n_samples},), got {weights.shape}.")
    check_non_negative(weights, "`sample_weight`")
    if not weights.any():
        raise ValueError("sample_weight must contain at least one weight that is not zero.")
    return weights


def _mean(X: npt.NDArray[np.float64], weights: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float64]:
    """Returns the (n_features,) mean of the samples."""
    share = np.full(len(X), 1 / len(X)) if weights is None else weights / weights.sum(dtype=np.float64)
    mean: npt.NDArray[np.float64] = share @ X
    return mean
