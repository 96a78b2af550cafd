//! Working memory of a task: one buffer a thread, kept from call to call, so that no kernel allocates in the steady
//! state.

use std::cell::Cell;

/// A cache line, so that the whole is aligned to one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// `f` on `len` elements of unspecified value, aligned to 64 bytes.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out while in use: a task that runs on this thread meanwhile gets a buffer of its own.
    let mut lines = LINES.take();
    let needed = len.div_ceil(16);
    if lines.len() < needed {
        // Fresh zeroed pages, not a copy of the old ones.
        lines = vec![bytemuck::Zeroable::zeroed(); needed];
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    LINES.set(lines);
    result
}

#[cfg(test)]
mod tests {
    #[test]
    fn nested_use_does_not_overlap() {
        super::with(100, |outer| {
            outer.fill(1.0);
            super::with(50, |inner| inner.fill(2.0));
            assert!(outer.iter().all(|x| *x == 1.0));
            assert_eq!(outer.as_ptr() as usize % 64, 0);
        });
    }
}
