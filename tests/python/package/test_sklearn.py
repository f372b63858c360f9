"""The estimators: scikit-learn's own checks, its results from the same start, and its ways of combining them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics.pairwise import cosine_distances
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import bpo.sklearn
from bpo import _core
from bpo.sklearn import KMeans, SparseSketch


def blobs(n=400, d=16, k=6, seed=0, spread=1.0, dtype=np.float64):
    """Samples of k clusters in turn: the first k are one of each."""
    generator = np.random.default_rng(seed)
    centres = 3 * generator.normal(size=(k, d))
    return (centres[np.arange(n) % k] + spread * generator.normal(size=(n, d))).astype(dtype)


def expected_failures(estimator):
    failures = {}
    if isinstance(estimator, KMeans) and estimator.n_clusters > 1:
        # scikit-learn declares the same for each of its own k-means. With given centres it holds: see below.
        failures["check_sample_weight_equivalence_on_dense_data"] = (
            "the check shuffles the samples, and so k-means++ draws other ones"
        )
    if isinstance(estimator, KMeans) and estimator.metric == "cosine":
        failures["check_estimators_dtypes"] = (
            "the check truncates samples to zeros, which have no direction and are refused"
        )
    return failures


@parametrize_with_checks(
    [KMeans(), KMeans(n_clusters=1), KMeans(n_clusters=2, n_init=3), KMeans(metric="cosine"), SparseSketch()],
    expected_failed_checks=expected_failures,
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_agrees_with_scikit_learn(dtype, weighted):
    points = blobs(dtype=dtype)
    weights = np.random.default_rng(1).uniform(0, 3, len(points)) if weighted else None
    ours = KMeans(6, init=points[:6], n_init=1).fit(points, sample_weight=weights)
    theirs = sklearn.cluster.KMeans(6, init=points[:6], n_init=1).fit(points, sample_weight=weights)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-5)
    assert ours.cluster_centers_.dtype == theirs.cluster_centers_.dtype == dtype
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    new = blobs(seed=2, dtype=dtype)
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
    np.testing.assert_allclose(ours.transform(new), theirs.transform(new), rtol=1e-4)
    assert ours.transform(new).dtype == dtype
    assert ours.score(new) == pytest.approx(theirs.score(new), rel=1e-5)
    assert ours.score(points, sample_weight=weights) == pytest.approx(-ours.inertia_, rel=1e-5)
    assert list(ours.get_feature_names_out()) == list(theirs.get_feature_names_out())


def test_kmeans_has_the_words_of_scikit_learn():
    ours, theirs = KMeans().get_params(), sklearn.cluster.KMeans().get_params()
    ours_alone = {"metric": "euclidean", "batch_size": None, "threads": None}
    assert ours == {**{name: theirs[name] for name in ours if name not in ours_alone}, **ours_alone}


def test_kmeans_resolves_float64_far_from_the_origin():
    near = blobs(k=3, spread=0.1)
    # Steps of float32 are 64 there.
    far = near + 1e9
    exact = far - 1e9
    ours = KMeans(3, init=far[:3], tol=0).fit(far)
    np.testing.assert_array_equal(ours.labels_, KMeans(3, init=exact[:3], tol=0).fit(exact).labels_)
    np.testing.assert_array_equal(ours.labels_, ours.predict(far))
    assert -ours.score(far) == pytest.approx(ours.inertia_, rel=1e-6)
    means = [far[ours.labels_ == label].mean(axis=0) for label in range(3)]
    np.testing.assert_allclose(ours.cluster_centers_, means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_whole_weights_repeat_samples(metric):
    points = blobs()
    weights = np.random.default_rng(3).integers(0, 4, len(points))
    weighted = KMeans(6, metric=metric, init=points[:6], tol=0).fit(points, sample_weight=weights)
    repeated = KMeans(6, metric=metric, init=points[:6], tol=0).fit(points.repeat(weights, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, atol=1e-5)
    np.testing.assert_array_equal(weighted.labels_.repeat(weights), repeated.labels_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_labels_are_those_of_predict(metric, dtype):
    points = blobs(dtype=dtype)
    kmeans = KMeans(6, metric=metric, random_state=0).fit(points)
    np.testing.assert_array_equal(kmeans.labels_, kmeans.predict(points))
    np.testing.assert_array_equal(kmeans.labels_, KMeans(6, metric=metric, random_state=0).fit_predict(points))
    np.testing.assert_array_equal(kmeans.labels_, kmeans.transform(points).argmin(axis=1))
    assert kmeans.score(points) == pytest.approx(-kmeans.inertia_, rel=1e-5)


def test_cosine_counts_directions():
    points = blobs()
    kmeans = KMeans(6, metric="cosine", random_state=0).fit(points)
    np.testing.assert_allclose(np.linalg.norm(kmeans.cluster_centers_, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(kmeans.transform(points), cosine_distances(points, kmeans.cluster_centers_))
    np.testing.assert_array_equal(kmeans.predict(3 * points), kmeans.labels_)
    points[7] = 0
    for refuse in (kmeans.fit, kmeans.predict):
        with pytest.raises(ValueError, match="7 has zero length"):
            refuse(points)


def test_random_state():
    points = blobs(k=40)
    fit = lambda state: KMeans(20, random_state=state, max_iter=1).fit(points).inertia_  # noqa: E731
    assert fit(0) == fit(0) == fit(np.random.RandomState(0)) != fit(1)
    state = np.random.RandomState(0)
    assert fit(state) != fit(state)
    np.random.seed(0)
    assert fit(None) == fit(0)


def test_several_runs_keep_the_lowest_inertia():
    points = blobs(k=40)
    state = np.random.RandomState(0)
    each = [KMeans(20, random_state=state).fit(points).inertia_ for _ in range(5)]
    assert KMeans(20, n_init=5, random_state=0).fit(points).inertia_ == min(each) < max(each)
    with pytest.warns(RuntimeWarning, match="only one init"):
        KMeans(5, init=points[:5], n_init=3).fit(points)


def test_mini_batches_come_near():
    points = blobs(n=4000)
    whole = KMeans(6, random_state=0).fit(points)
    batched = KMeans(6, batch_size=256, random_state=0).fit(points)
    assert batched.inertia_ <= 1.02 * whole.inertia_


def test_duplicates_warn():
    points = np.repeat(blobs(n=3), 10, axis=0)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(3\) found smaller than n_clusters \(5\)"):
        KMeans(5).fit(points)


def test_float16_stays_narrow(monkeypatch):
    seen = []
    points = blobs(dtype=np.float16)
    real = _core.kmeans

    def spy(rows, *args, **keywords):
        seen.append(rows)
        return real(rows, *args, **keywords)

    monkeypatch.setattr(bpo.sklearn._core, "kmeans", spy)
    narrow = KMeans(6, init=points[:6]).fit(points)
    assert np.shares_memory(seen[0], points)
    wide = KMeans(6, init=points[:6]).fit(points.astype(np.float32))
    np.testing.assert_array_equal(narrow.cluster_centers_, wide.cluster_centers_)
    assert narrow.cluster_centers_.dtype == narrow.transform(points).dtype == np.float32


def test_threads_change_nothing():
    points = blobs(n=5000)
    one, two = (KMeans(6, random_state=0, threads=threads).fit(points) for threads in (1, 2))
    np.testing.assert_array_equal(one.cluster_centers_, two.cluster_centers_)
    sketches = [SparseSketch(64, random_state=0, threads=threads).fit_transform(points) for threads in (1, 2)]
    np.testing.assert_array_equal(*sketches)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_sketch_is_that_of_the_core(dtype):
    points = blobs(d=3000, dtype=dtype)
    sketch = SparseSketch(256, nnz=2, random_state=5).fit(points)
    narrow = points if dtype is np.float16 else points.astype(np.float32)
    np.testing.assert_array_equal(sketch.transform(points), _core.Sketcher(256, seed=5, nnz=2).sketch(narrow))
    assert list(sketch.get_feature_names_out()[:2]) == ["sparsesketch0", "sparsesketch1"]
    state = np.random.RandomState(0)
    first, second = (SparseSketch(256, random_state=state).fit(points).seed_ for _ in range(2))
    assert first != second


def test_pipelines_searches_and_frames():
    points = blobs(d=500, k=3, spread=0.5)
    pipeline = make_pipeline(StandardScaler(), SparseSketch(128, random_state=0), KMeans(3, random_state=0))
    labels = pipeline.fit_predict(points)
    np.testing.assert_array_equal(labels, pipeline.predict(points))
    assert pipeline[:-1].transform(points).shape == (len(points), 128)
    search = GridSearchCV(pipeline, {"kmeans__n_clusters": [1, 3], "sparsesketch__n_components": [64]}, cv=2)
    assert search.fit(points).best_params_["kmeans__n_clusters"] == 3
    frame = KMeans(3, random_state=0).set_output(transform="pandas").fit_transform(points)
    assert list(frame.columns) == ["kmeans0", "kmeans1", "kmeans2"]


@pytest.mark.parametrize("estimator", [KMeans(3, metric="cosine", random_state=1), SparseSketch(32, random_state=1)])
def test_clones_and_pickles(estimator):
    points = blobs()
    fitted = clone(estimator).fit(points)
    assert clone(fitted).get_params() == estimator.get_params()
    with pytest.raises(NotFittedError):
        clone(fitted).transform(points)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(points), fitted.transform(points))
    np.testing.assert_array_equal(clone(fitted).fit_transform(points), fitted.transform(points))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (KMeans(0), "n_clusters must be a whole number of at least 1, got 0"),
        (KMeans(2.0), "n_clusters must be a whole number"),
        (KMeans(401), "n_samples=400 should be >= n_clusters=401"),
        (KMeans(n_init=0), "n_init must be a whole number"),
        (KMeans(init="random"), "`init` must be"),
        (KMeans(3, init=np.zeros((2, 16))), r"init must have the shape \(n_clusters, n_features\) = \(3, 16\)"),
        (KMeans(metric="manhattan"), "`metric` must be"),
        (KMeans(max_iter=0), "`max_iter` must be"),
        (KMeans(threads=0), "`threads` must be"),
        (SparseSketch(0), "n_components must be a whole number"),
        (SparseSketch(10, nnz=3), "nnz must divide n_components=10, got 3"),
        (SparseSketch(random_state=-1), "random_state must be from 0"),
    ],
)
def test_errors_name_the_parameter(estimator, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(blobs())


def test_errors_name_the_samples():
    points = blobs(n=20)
    for weights, message in (
        (np.ones(19), r"sample_weight must have the shape \(20,\)"),
        (np.zeros(20), "at least one weight that is not zero"),
        (np.full(20, -1.0), "Negative values"),
        (np.full(20, np.nan), "sample_weight contains NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            KMeans(2).fit(points, sample_weight=weights)
    for estimator in (KMeans(2), SparseSketch(8)):
        with pytest.raises(TypeError, match="Sparse data was passed"):
            estimator.fit(scipy.sparse.csr_array(points))


def test_advice_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import bpo; import bpo.sklearn"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stderr.splitlines()[-1].startswith("ImportError: bpo.sklearn needs scikit-learn 1.6 or newer: pip")
