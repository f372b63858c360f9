//! How every long function runs: detached from the interpreter, on a thread pool, with Ctrl-C and progress.

use std::any::Any;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::memory::{WORK, room};
use crate::progress::Progress;

/// How often the calling thread looks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// Time between two calls of the progress callback at least.
const REPORT: Duration = Duration::from_millis(100);

/// Threads of one call at most.
const MAX_THREADS: usize = 1024;

/// Pools that are kept for the next call, the last used last.
const KEPT_POOLS: usize = 4;

struct Kept {
    /// The process and the number of threads.
    key: (u32, usize),
    pool: Arc<ThreadPool>,
}

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
    let wait = |progress: &Progress| {
        pool(threads)?.in_place_scope(|scope| {
            let (sender, receiver) = channel();
            scope.spawn(move |_| send(&sender, work, progress));
            answer(callback, progress, &receiver)
        })
    };
    detached(py, callback, wait)
}

/// As [`run`], on a thread of its own: for work that waits for files or for other threads, which no pool should wait for.
///
/// # Errors
/// As [`run`].
pub fn run_alone<T: Send>(
    py: Python<'_>,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce(&Progress) -> Result<T> + Send,
) -> PyResult<T> {
    let wait = |progress: &Progress| {
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            Builder::new()
                .name("bpo".to_owned())
                .spawn_scoped(scope, move || send(&sender, work, progress))
                .map_err(|error| PyRuntimeError::new_err(format!("cannot start a thread: {error}")))?;
            answer(callback, progress, &receiver)
        })
    };
    detached(py, callback, wait)
}

/// Detaches from the interpreter and says in the end how far the work has come.
fn detached<T: Send>(
    py: Python<'_>,
    callback: Option<&Py<PyAny>>,
    wait: impl FnOnce(&Progress) -> PyResult<T> + Send,
) -> PyResult<T> {
    let progress = Progress::default();
    let result = py.detach(|| wait(&progress))?;
    report(py, callback, &progress)?;
    Ok(result)
}

fn report(py: Python<'_>, callback: Option<&Py<PyAny>>, progress: &Progress) -> PyResult<()> {
    callback.map_or(Ok(()), |callback| callback.call1(py, progress.steps()).map(|_| ()))
}

/// Does the work and sends what comes of it.
fn send<T>(sender: &Sender<Result<T>>, work: impl FnOnce(&Progress) -> Result<T>, progress: &Progress) {
    // A panic would leave as an exception that `except Exception` does not catch.
    let work = || room(0, WORK).and_then(|()| work(progress));
    let result = catch_unwind(AssertUnwindSafe(work));
    // The receiver outlives the scope's work, so a failure to send cannot happen.
    let _ = sender.send(result.unwrap_or_else(|panic| Err(Error::Fault { message: message(&*panic) })));
}

/// Waits for the result; meanwhile answers signals and calls `callback`.
fn answer<T>(callback: Option<&Py<PyAny>>, progress: &Progress, receiver: &Receiver<Result<T>>) -> PyResult<T> {
    let mut reported = Instant::now();
    loop {
        match receiver.recv_timeout(POLL) {
            Ok(result) => return result.map_err(PyErr::from),
            Err(RecvTimeoutError::Disconnected) => unreachable!("the work always sends a result"),
            Err(RecvTimeoutError::Timeout) => {
                let due = reported.elapsed() >= REPORT;
                let answer = Python::attach(|py| {
                    py.check_signals()?;
                    if due { report(py, callback, progress) } else { Ok(()) }
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
}

/// What a panic says.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}

/// The pool of `threads` threads, made when it is not among the last few. A forked child has none of its parent's
/// threads, so pools belong to a process.
fn pool(threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
    static POOLS: Mutex<Vec<Kept>> = Mutex::new(Vec::new());
    let threads = match threads {
        Some(threads @ 1..=MAX_THREADS) => threads,
        Some(threads) => {
            let requirement = format!("at least 1 and at most {MAX_THREADS}, or None for all cores");
            return Err(Error::argument("threads", requirement, threads).into());
        }
        None => std::thread::available_parallelism().map_or(1, NonZero::get),
    };
    let key = (std::process::id(), threads);
    let pools = || POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let known = |pools: &mut Vec<Kept>| {
        let place = pools.iter().position(|kept| kept.key == key)?;
        let kept = pools.remove(place);
        let pool = Arc::clone(&kept.pool);
        pools.push(kept);
        Some(pool)
    };
    if let Some(pool) = known(&mut pools()) {
        return Ok(pool);
    }
    // Without the lock, which nobody holds for long.
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("bpo-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start {threads} threads: {error}")))?;
    let pool = Arc::new(pool);
    let mut pools = pools();
    if let Some(pool) = known(&mut pools) {
        return Ok(pool); // another thread was faster
    }
    // Those of a parent have no threads here to end, and would be waited for in vain.
    pools.extract_if(.., |kept| kept.key.0 != key.0).for_each(std::mem::forget);
    if pools.len() == KEPT_POOLS {
        // Its threads end once the last call that runs on it has.
        pools.remove(0);
    }
    pools.push(Kept { key, pool: Arc::clone(&pool) });
    Ok(pool)
}
