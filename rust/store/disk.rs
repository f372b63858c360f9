//! What the writer asks of a file. Tests put a file here that forgets what was not synced, as a loss of power does.

use std::fs::File;
use std::io::{Result, Seek, SeekFrom, Write};

/// A file that is written at places.
pub trait Disk: Send {
    /// Bytes from which on what was written is waited for: nothing can interrupt that, so it must not take long.
    const AT_ONCE: u64 = 16 << 20;

    /// # Errors
    /// If not all bytes could be written; some may have been.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()>;

    /// Cuts or extends the file to a size.
    ///
    /// # Errors
    /// If the file could not be changed.
    fn set_len(&mut self, size: u64) -> Result<()>;

    /// Waits until everything written is on disk.
    ///
    /// # Errors
    /// If something could not be written; then nothing is known of what was not synced before.
    fn sync(&mut self) -> Result<()>;
}

impl Disk for File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.seek(SeekFrom::Start(offset))?;
        self.write_all(bytes)
    }

    fn set_len(&mut self, size: u64) -> Result<()> {
        // Windows changes the size of no file that a reader has mapped, be it to what it is.
        if self.metadata()?.len() == size { Ok(()) } else { Self::set_len(self, size) }
    }

    fn sync(&mut self) -> Result<()> {
        self.sync_data()
    }
}

/// A file of which little is left to wait for at any time.
#[derive(Debug)]
pub struct Paced<D> {
    disk: D,
    /// Bytes that were written since the last sync.
    unsynced: u64,
}

impl<D: Disk> Paced<D> {
    pub fn new(disk: D) -> Self {
        Self { disk, unsynced: 0 }
    }

    /// # Errors
    /// As [`Disk::write_at`].
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.unsynced += bytes.len() as u64;
        self.disk.write_at(bytes, offset)
    }

    /// # Errors
    /// As [`Disk::set_len`].
    pub fn set_len(&mut self, size: u64) -> Result<()> {
        self.disk.set_len(size)
    }

    /// # Errors
    /// As [`Disk::sync`].
    pub fn sync(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.disk.sync()
    }

    /// Syncs once much was written.
    ///
    /// # Errors
    /// As [`Disk::sync`].
    pub fn keep_up(&mut self) -> Result<()> {
        if self.unsynced < D::AT_ONCE { Ok(()) } else { self.sync() }
    }
}
