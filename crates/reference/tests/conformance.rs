//! The oracle against itself: in f32, as any backend, judged by its own f64.

use rankfold_reference::ReferenceBackend;

rankfold_backend::conformance!(candidate: ReferenceBackend::new(), oracle: ReferenceBackend::new());
