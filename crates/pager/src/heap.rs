//! The heap beside the pages, as the C library keeps it.

/// Pieces of this size and more are the system's own again as soon as they are freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GIVEN_BACK: libc::c_int = 128 << 10;

/// From now on, give the large pieces of the heap that are freed back to the system at once.
///
/// glibc starts so, from 128 KiB, but raises that bound with every larger piece that it sees freed, to 32 MiB: one
/// decomposition of a matrix, and a program holds tens of MiB that it will not use again. A program whose memory is to
/// be what was planned asks for the constant bound, before it allocates. Other C libraries are left as they are.
pub fn give_back_what_is_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it sets a number of the allocator's, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVEN_BACK);
    }
}
