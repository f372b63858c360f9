from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "KMeansResult",
    "NoDirectionError",
    "NotDefiniteError",
    "NotFiniteError",
    "OutOfRangeError",
    "PairScores",
    "Sketcher",
    "StoreDamagedError",
    "StoreError",
    "StoreLockedError",
    "StoreReader",
    "StoreRepair",
    "StoreVersionError",
    "StoreWriter",
    "__version__",
    "allocate_depth",
    "assign",
    "coreset",
    "d_optimal",
    "kmeans",
    "matching",
    "pair_kmeans",
    "pair_norms",
    "ranking_keys",
    "repair_store",
    "row_products",
    "row_sum",
    "score_pairs",
    "simd",
]

__version__: str

# float32, float16, or uint16 for the bits of bfloat16.
_Rows = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]
# The same, or int8 that goes with scales, of its own or in the coefficients of pairs.
_ScaledRows = _Rows | NDArray[np.int8]
_DType = Literal["float32", "float16", "bfloat16", "int8"]
# Called with (done, total).
_Progress = Callable[[int, int], object]

# Who shares the pairs, each with the rows of its own.
class _Processes(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, own: bytes) -> list[bytes]: ...
    def receive(self, state: bytes) -> bytes: ...
    def hand_on(self, state: bytes | None) -> bytes: ...

class NotFiniteError(ValueError):
    array: str
    index: int
    column: int | None
    value: float

class NoDirectionError(ValueError):
    array: str
    index: int | None

class OutOfRangeError(ValueError):
    array: str
    index: int
    value: int | float

class NotDefiniteError(ValueError): ...
class StoreError(ValueError): ...
class StoreDamagedError(StoreError): ...
class StoreLockedError(StoreError): ...
class StoreVersionError(StoreError): ...

@final
class Sketcher:
    def __new__(
        cls, dim: int, *, seed: int = 0, kind: Literal["sparse", "rademacher", "normal"] = "sparse", nnz: int = 1
    ) -> Sketcher: ...
    @property
    def dim(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def kind(self) -> Literal["sparse", "rademacher", "normal"]: ...
    @property
    def nnz(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    def sketch(
        self, gradients: _Rows, offset: int = 0, out: NDArray[np.float32] | None = None, *, threads: int | None = None
    ) -> NDArray[np.float32]: ...

@final
class KMeansResult:
    def __new__(
        cls,
        *,
        centroids: NDArray[np.float32],
        labels: NDArray[np.int32],
        distances: NDArray[np.float32],
        inertia: NDArray[np.float64],
        n_iter: int,
        converged: bool,
    ) -> KMeansResult: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def centroids(self) -> NDArray[np.float32]: ...
    @property
    def labels(self) -> NDArray[np.int32]: ...
    @property
    def distances(self) -> NDArray[np.float32]: ...
    @property
    def inertia(self) -> NDArray[np.float64]: ...
    @property
    def n_iter(self) -> int: ...
    @property
    def converged(self) -> bool: ...

def kmeans(
    rows: _ScaledRows,
    k: int,
    *,
    sample_weight: NDArray[np.float32] | None = None,
    scales: NDArray[np.float32] | None = None,
    init: Literal["k-means++"] | NDArray[np.float32] = "k-means++",
    metric: Literal["euclidean", "cosine"] = "euclidean",
    max_iter: int = 100,
    tol: float = 0.0001,
    seed: int = 0,
    batch_size: int | None = None,
    cache_bytes: int = 1073741824,
    threads: int | None = None,
    progress: _Progress | None = None,
) -> KMeansResult: ...
def assign(
    rows: _ScaledRows,
    centroids: NDArray[np.float32],
    *,
    scales: NDArray[np.float32] | None = None,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    threads: int | None = None,
    progress: _Progress | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def pair_kmeans(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    k: int,
    *,
    scales: NDArray[np.float32] | None = None,
    init: Literal["k-means++"] | NDArray[np.float32] = "k-means++",
    metric: Literal["euclidean", "cosine"] = "euclidean",
    max_iter: int = 100,
    tol: float = 0.0001,
    seed: int = 0,
    cache_bytes: int = 1073741824,
    threads: int | None = None,
    progress: _Progress | None = None,
    processes: _Processes | None = None,
) -> KMeansResult: ...
def pair_norms(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    *,
    finite: bool = True,
    threads: int | None = None,
    progress: _Progress | None = None,
    processes: _Processes | None = None,
) -> NDArray[np.float32]: ...

@final
class PairScores:
    def __new__(
        cls,
        *,
        centrality: NDArray[np.float32],
        distance: NDArray[np.float32],
        alignment: NDArray[np.float32],
        direction: NDArray[np.float32],
    ) -> PairScores: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def centrality(self) -> NDArray[np.float32]: ...
    @property
    def distance(self) -> NDArray[np.float32]: ...
    @property
    def alignment(self) -> NDArray[np.float32]: ...
    @property
    def direction(self) -> NDArray[np.float32]: ...

def simd() -> Literal["plain", "neon", "avx2", "avxvnni", "avx512", "avx512vnni"]: ...
def score_pairs(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    centroids: NDArray[np.float32],
    labels: NDArray[np.int32],
    *,
    direction: NDArray[np.float32] | None = None,
    threads: int | None = None,
    progress: _Progress | None = None,
    processes: _Processes | None = None,
) -> PairScores: ...
def ranking_keys(
    scores: NDArray[np.float64] | NDArray[np.float32],
    ranking: Literal["nearest", "farthest", "softmax", "random"] = "nearest",
    *,
    temperature: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    progress: _Progress | None = None,
) -> NDArray[np.float64]: ...
def allocate_depth(
    prompts: NDArray[np.int64],
    clusters: NDArray[np.int32],
    usefulness: NDArray[np.float64],
    budget: int,
    *,
    min_depth: int = 1,
    max_depth: int | None = None,
    cluster_weights: NDArray[np.float64] | None = None,
    threads: int | None = None,
    progress: _Progress | None = None,
) -> NDArray[np.bool_]: ...
def d_optimal(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    budget: int,
    *,
    regularization: float = 1.0,
    eligible: NDArray[np.bool_] | None = None,
    prompts: NDArray[np.int64] | None = None,
    max_depth: int | None = None,
    threads: int | None = None,
    progress: _Progress | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
def row_products(
    rows: _ScaledRows,
    index: NDArray[np.int64],
    vector: NDArray[np.float64],
    *,
    threads: int | None = None,
) -> NDArray[np.float64]: ...
def row_sum(
    rows: _ScaledRows,
    index: NDArray[np.int64],
    weights: NDArray[np.float64],
    *,
    threads: int | None = None,
) -> NDArray[np.float64]: ...
def matching(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    target: NDArray[np.float32],
    budget: int,
    *,
    eligible: NDArray[np.bool_] | None = None,
    prompts: NDArray[np.int64] | None = None,
    min_depth: int = 0,
    max_depth: int | None = None,
    clusters: NDArray[np.int32] | None = None,
    cluster_weights: NDArray[np.float64] | None = None,
    cache_bytes: int = 1073741824,
    threads: int | None = None,
    progress: _Progress | None = None,
    processes: _Processes | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
def coreset(
    rows: _ScaledRows,
    pairs: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    clusters: NDArray[np.int32],
    budget: int,
    *,
    eligible: NDArray[np.bool_] | None = None,
    prompts: NDArray[np.int64] | None = None,
    max_depth: int | None = None,
    cache_bytes: int = 1073741824,
    threads: int | None = None,
    progress: _Progress | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...

@final
class StoreWriter:
    @staticmethod
    def create(
        path: str | PathLike[str], dim: int, fingerprint_json: str, *, dtype: _DType = "float32"
    ) -> StoreWriter: ...
    @staticmethod
    def append_to(path: str | PathLike[str]) -> StoreWriter: ...
    @property
    def path(self) -> Path: ...
    @property
    def dim(self) -> int: ...
    @property
    def dtype(self) -> _DType: ...
    @property
    def committed(self) -> int: ...
    def append(self, sketches: NDArray[np.float32], records: NDArray[Any]) -> None: ...
    def copy_from(
        self, reader: StoreReader, wanted: NDArray[np.bool_], *, progress: _Progress | None = None
    ) -> None: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> StoreWriter: ...
    def __exit__(
        self,
        _exception_type: type[BaseException] | None,
        _exception: BaseException | None,
        _traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class StoreReader:
    def __new__(cls, path: str | PathLike[str], *, skip_damaged: bool = False) -> StoreReader: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def skip_damaged(self) -> bool: ...
    @property
    def path(self) -> Path: ...
    @property
    def rows_path(self) -> Path: ...
    @property
    def dim(self) -> int: ...
    @property
    def dtype(self) -> _DType: ...
    @property
    def fingerprint_json(self) -> str: ...
    @property
    def tail_bytes(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def __len__(self) -> int: ...
    def records(self) -> NDArray[np.uint8]: ...
    def verify(
        self,
        wanted: NDArray[np.bool_] | None = None,
        *,
        threads: int | None = None,
        progress: _Progress | None = None,
    ) -> NDArray[np.int64]: ...
    def check(
        self, wanted: NDArray[np.bool_], *, threads: int | None = None, progress: _Progress | None = None
    ) -> None: ...

@final
class StoreRepair:
    def __new__(
        cls, *, mended: list[str], set_aside: NDArray[np.int64], lost: int, cut_bytes: int, count: int
    ) -> StoreRepair: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...
    @property
    def mended(self) -> list[str]: ...
    @property
    def set_aside(self) -> NDArray[np.int64]: ...
    @property
    def lost(self) -> int: ...
    @property
    def cut_bytes(self) -> int: ...
    @property
    def count(self) -> int: ...

def repair_store(
    path: str | PathLike[str], *, threads: int | None = None, progress: _Progress | None = None
) -> StoreRepair: ...
