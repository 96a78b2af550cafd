//! Working memory of a kernel: a few buffers a thread, kept from call to call, so that no kernel allocates in the
//! steady state.
//!
//! The buffers of a thread form a stack: a nested use takes the next one, so a kernel that is called the same way
//! finds the same buffers again.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A cache line, so that the whole is aligned to one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Bytes of all threads' buffers.
static HELD: AtomicUsize = AtomicUsize::new(0);

#[derive(Default)]
struct Buffer(Vec<Line>);

impl Buffer {
    fn new(lines: usize) -> Self {
        HELD.fetch_add(lines * size_of::<Line>(), Ordering::Relaxed);
        Self(vec![bytemuck::Zeroable::zeroed(); lines])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0.len() * size_of::<Line>(), Ordering::Relaxed);
    }
}

thread_local! {
    static FREE: Cell<Vec<Buffer>> = const { Cell::new(Vec::new()) };
}

/// `f` on `len` elements of unspecified value, aligned to 64 bytes.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let lines = len.div_ceil(16);
    let mut free = FREE.take();
    let mut buffer = free.pop().unwrap_or_default();
    FREE.set(free);
    if buffer.0.len() < lines {
        // The old one first: fresh zeroed pages, not a copy.
        drop(buffer);
        buffer = Buffer::new(lines);
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut buffer.0)[..len]);
    let mut free = FREE.take();
    free.push(buffer);
    FREE.set(free);
    result
}

/// Bytes that the scratch buffers of all threads of the process hold.
pub(crate) fn held() -> usize {
    HELD.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_uses_get_buffers_of_their_own_and_find_them_again() {
        let starts = || {
            with(100, |outer| {
                outer.fill(1.0);
                let inner = with(50, |inner| {
                    inner.fill(2.0);
                    inner.as_ptr()
                });
                assert!(outer.iter().all(|x| *x == 1.0));
                assert_eq!(outer.as_ptr() as usize % 64, 0);
                (outer.as_ptr(), inner)
            })
        };
        assert_eq!(starts(), starts());
        assert!(held() >= 150 * 4);
    }
}
