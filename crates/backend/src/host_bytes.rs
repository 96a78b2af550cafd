//! A buffer's own bytes, lent to the host.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// A buffer's own bytes, for the host to read and write. Memory that could leave stays in place while this lives.
pub struct HostBytes<'a>(Box<dyn DerefMut<Target = [u8]> + Send + 'a>);

impl<'a> HostBytes<'a> {
    /// Bytes, or a guard of bytes. For backends.
    pub fn new(bytes: impl DerefMut<Target = [u8]> + Send + 'a) -> Self {
        Self(Box::new(bytes))
    }
}

impl Deref for HostBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for HostBytes<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl fmt::Debug for HostBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBytes").field("len", &self.len()).finish_non_exhaustive()
    }
}
