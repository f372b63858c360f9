//! How far a long computation has come, and the wish to stop it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Shared by the thread that computes, which advances it, and the one that waits, which reads and cancels.
///
/// Algorithms call [`Progress::advance`] or [`Progress::check`] between blocks of their work, such as tiles; how long a
/// block takes depends on the data. The counters carry no data between threads, so relaxed ordering is enough.
///
/// ```
/// use bpo::progress::Progress;
/// use bpo::ranking::{Ranking, ranking_keys};
///
/// let progress = Progress::default();
/// ranking_keys(&[0.5; 40_000], Ranking::Nearest, 0, &progress)?;
/// assert_eq!(progress.steps(), (3, 3));
/// progress.cancel(); // from whatever thread
/// let refused = ranking_keys(&[0.5; 40_000], Ranking::Nearest, 0, &progress);
/// assert!(matches!(refused, Err(bpo::Error::Cancelled)));
/// # Ok::<(), bpo::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// States how many steps there will be at most.
    pub fn start(&self, total: usize) {
        self.total.store(total as u64, Ordering::Relaxed);
    }

    /// Counts `steps` as done.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once [`Progress::cancel`] was called.
    pub fn advance(&self, steps: usize) -> Result<()> {
        self.done.fetch_add(steps as u64, Ordering::Relaxed);
        self.check()
    }

    /// # Errors
    /// [`Error::Cancelled`] once [`Progress::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Counts everything as done: an iteration may converge before its last step.
    pub fn finish(&self) {
        self.done.store(self.total.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Asks the computation to stop at its next check.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Steps done and steps in total.
    pub fn steps(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}
