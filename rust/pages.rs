//! Pages of mapped files, which may leave memory.

/// Lets the pages that hold a part of `values` leave the memory of this process until they are read again.
///
/// # Safety
/// They are pages of a file, mapped so that all who map it see one another's changes: what such pages hold in memory alone
/// is thrown away, and they are read from the file again.
#[cfg(target_os = "linux")]
pub unsafe fn forget_pages<T>(values: &[T]) {
    // SAFETY: asks for a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let first = values.as_ptr().addr() / page * page;
    let end = (values.as_ptr().addr() + size_of_val(values)).next_multiple_of(page);
    // SAFETY: all these pages hold a part of `values`, so they belong to its map, for which the caller vouches. That
    // advice may be refused is of no consequence.
    unsafe { libc::madvise(values.as_ptr().with_addr(first).cast_mut().cast(), end - first, libc::MADV_DONTNEED) };
}

/// Does nothing: elsewhere than on Linux, pages stay until the system wants them.
///
/// # Safety
/// As on Linux, so that callers are alike.
#[cfg(not(target_os = "linux"))]
pub unsafe fn forget_pages<T>(_values: &[T]) {}
