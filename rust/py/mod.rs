//! The Python module `bpo._core`. Only the files of this folder name pyo3 or numpy; each function converts its
//! arguments, runs the algorithm detached from the interpreter, and converts the result back.

mod convert;
mod coreset;
mod d_optimal;
mod depth;
mod errors;
mod kmeans;
mod limits;
mod linear;
mod matching;
mod pickle;
mod processes;
mod ranking;
mod run;
mod sketch;
mod store;
mod usefulness;

/// The compiled core of `bpo`: sketches, k-means over pairs, scores, depth and the gradient store.
// Nothing here relies on the global interpreter lock: every class is frozen and `Sync`, the writer of a store is behind a
// lock of its own, NumPy's borrows are counted under one, and the algorithms run without the interpreter as it is. So a
// build for free-threaded CPython leaves the lock off; the abi3 wheel is none, and is not installed there.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::coreset::coreset;
    #[pymodule_export]
    use super::d_optimal::d_optimal;
    #[pymodule_export]
    use super::depth::allocate_depth;
    #[pymodule_export]
    use super::errors::{
        NoDirectionError, NotDefiniteError, NotFiniteError, OutOfRangeError, StoreDamagedError, StoreError,
        StoreLockedError, StoreVersionError,
    };
    #[pymodule_export]
    use super::kmeans::{KMeansResult, assign, kmeans, pair_kmeans};
    #[pymodule_export]
    use super::linear::{row_products, row_sum};
    #[pymodule_export]
    use super::matching::matching;
    #[pymodule_export]
    use super::ranking::ranking_keys;
    #[pymodule_export]
    use super::sketch::Sketcher;
    #[pymodule_export]
    use super::store::{StoreReader, StoreRepair, StoreWriter, repair_store};
    #[pymodule_export]
    use super::usefulness::{PairScores, pair_norms, score_pairs};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// What was asked of the kernels is not turned into something else in silence.
    #[pymodule_init]
    fn init(_module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        match crate::simd::unknown_level() {
            None => Ok(()),
            Some((given, names)) => Err(pyo3::exceptions::PyValueError::new_err(format!(
                "BPO_SIMD={given} names no instruction set; it may be one of {names}, or unset."
            ))),
        }
    }

    /// The instruction set whose kernels run on this processor.
    #[pyo3::pyfunction]
    fn simd() -> &'static str {
        crate::simd::level_of_bytes().name()
    }
}
