//! What the writer asks of a file. Tests put a file here that forgets what was not synced, as a loss of power does.

use std::fs::File;
use std::io::{Result, Seek, SeekFrom, Write};

/// A file that is written at places.
pub trait Disk: Send {
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
