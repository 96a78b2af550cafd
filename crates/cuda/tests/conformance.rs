//! The conformance suite on the kernels of `kernels/`, run on the host: thread after thread, and to the same bits in
//! another order with two blocks at a time.

use rankfold_cuda::CudaBackend;
use rankfold_cuda::host::{HostDriver, Options, Schedule};
use rankfold_reference::ReferenceBackend;

/// Warps in an order that is redrawn at every barrier, on two OS threads.
fn shuffled() -> CudaBackend {
    let options = Options { schedule: Schedule::Warps(1), threads: Some(2), ..Options::default() };
    CudaBackend::new(HostDriver::new(options).unwrap()).unwrap()
}

rankfold_backend::conformance!(
    candidate: CudaBackend::on_host(Some(1)).unwrap(),
    oracle: ReferenceBackend::new(),
    twin: shuffled(),
);
