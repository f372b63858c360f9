//! How every long function runs: detached from the interpreter, on a thread pool, with Ctrl-C and progress.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::progress::Progress;

/// How often the calling thread looks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// Time between two calls of the progress callback at least.
const REPORT: Duration = Duration::from_millis(100);

/// Pools by process and number of threads.
type Pools = HashMap<(u32, usize), Arc<ThreadPool>>;

/// Runs `work` on `threads` threads (all cores if none are given) while the calling thread answers signals and calls
/// `callback(done, total)`.
///
/// # Errors
/// What `work`, a signal handler or the callback raised; in the latter two cases `work` is cancelled first.
pub fn run<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce(&Progress) -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(threads)?;
    let progress = Progress::default();
    let report = |py: Python<'_>| match callback {
        Some(callback) => callback.call1(py, progress.steps()).map(|_| ()),
        None => Ok(()),
    };
    let wait = || {
        pool.in_place_scope(|scope| {
            let (sender, receiver) = channel();
            let progress = &progress;
            scope.spawn(move |_| {
                // The receiver outlives the scope's work, so a failure to send cannot happen.
                let _ = sender.send(work(progress));
            });
            let mut reported = Instant::now();
            loop {
                match receiver.recv_timeout(POLL) {
                    Ok(result) => return result.map_err(PyErr::from),
                    // The work panicked; leaving the scope resumes the panic here.
                    Err(RecvTimeoutError::Disconnected) => return Err(Error::Cancelled.into()),
                    Err(RecvTimeoutError::Timeout) => {
                        let due = reported.elapsed() >= REPORT;
                        let answer = Python::attach(|py| {
                            py.check_signals()?;
                            if due { report(py) } else { Ok(()) }
                        });
                        if due {
                            reported = Instant::now();
                        }
                        if let Err(raised) = answer {
                            progress.cancel();
                            return Err(raised);
                        }
                    }
                }
            }
        })
    };
    let result = py.detach(wait)?;
    report(py)?;
    Ok(result)
}

/// The pool of `threads` threads, made when first needed. A forked child has none of its parent's threads, so pools
/// belong to a process.
fn pool(threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
    static POOLS: Mutex<Option<Pools>> = Mutex::new(None);
    let threads = match threads {
        Some(0) => return Err(Error::argument("threads", "at least 1, or None for all cores", 0).into()),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, NonZero::get),
    };
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pools = pools.get_or_insert_default();
    if let Some(pool) = pools.get(&(std::process::id(), threads)) {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("bpo-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start {threads} threads: {error}")))?;
    let pool = Arc::new(pool);
    pools.insert((std::process::id(), threads), Arc::clone(&pool));
    Ok(pool)
}
