//! The kernels by name: their sources, and their entry points on the host. Written by `build.rs` from `kernels/`.

/// A source file of `kernels/`.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The file's name without `.cu`.
    pub file: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Its entry points.
    pub kernels: &'static [&'static str],
}

/// An entry point on the host, as `host/thunk.h` lays it out.
#[cfg(host_kernels)]
#[repr(C)]
#[derive(Debug)]
pub struct Entry {
    name: *const std::ffi::c_char,
    types: *const std::ffi::c_char,
    call: unsafe extern "C" fn(*mut *mut std::ffi::c_void),
}

// SAFETY: constants of the program.
#[cfg(host_kernels)]
unsafe impl Sync for Entry {}

#[cfg(host_kernels)]
impl Entry {
    /// The kernel's name.
    pub fn name(&self) -> &'static str {
        text(self.name)
    }

    /// Its parameters' types.
    pub fn types(&self) -> &'static str {
        text(self.types)
    }

    /// Calls it as one thread.
    ///
    /// # Safety
    /// `arguments` points to as many pointers as the kernel has parameters, each to a value of its type, and the
    /// calling fibre belongs to a running block.
    pub unsafe fn call(&self, arguments: *mut *mut std::ffi::c_void) {
        // SAFETY: the caller's to keep.
        unsafe { (self.call)(arguments) }
    }
}

#[cfg(host_kernels)]
fn text(c: *const std::ffi::c_char) -> &'static str {
    // SAFETY: a string literal of the generated unit.
    unsafe { std::ffi::CStr::from_ptr(c) }.to_str().unwrap_or("")
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
