//! Prints `kernels/registers.txt`: the registers that each kernel takes on each architecture that the project names.

use rankfold_cuda::SOURCES;
use rankfold_cuda::gpu::nvrtc::Nvrtc;

fn main() -> rankfold_cuda::Result<()> {
    print!("{}", Nvrtc::load()?.registers(SOURCES)?);
    Ok(())
}
