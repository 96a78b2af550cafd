//! The kernels of `kernels/` on a GPU, beside what the device can do: how fast it copies its memory, and how fast
//! cuBLASLt multiplies dense matrices there.
//!
//!     cargo bench -p rankfold-cuda --bench cuda -- --out FILE.json
//!
//! Each row is the median of several rounds, each of many calls between two events of the device; `spread` is how far
//! the rounds lie apart, as a fraction of it. What the host does to start a kernel is in it, where that takes longer
//! than the kernel: the row `launch` says how long. `bytes` counts every input once and every output once, `flops` a
//! multiply-add as two: the least that there is to do, whatever a kernel does. The fractions are of the copy, in bytes
//! read and written a second, and of the dense product in the row's own type.
//!
//! `--host` runs small sizes on the host's driver, to see that everything runs; its times mean nothing. `--device` says
//! which device there is, and ends. Where there is none, the reason is all that is printed. `benches/gpu` runs this.
//!
//! In reading order: `sizes`, `meter`; then what is measured: `limits`, `quantise`, `stream`, `products`.

#[path = "cuda/limits.rs"]
mod limits;
#[path = "cuda/meter.rs"]
mod meter;
#[path = "cuda/products.rs"]
mod products;
#[path = "cuda/quantise.rs"]
mod quantise;
#[path = "cuda/sizes.rs"]
mod sizes;
#[path = "cuda/stream.rs"]
mod stream;

use meter::Meter;
use rankfold_backend::Result;
use rankfold_cuda::{CudaBackend, Error};
use serde_json::json;
use sizes::{Numbers, Sizes};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

/// The command line.
#[derive(Default)]
struct Options {
    out: Option<PathBuf>,
    host: bool,
    device: bool,
}

impl Options {
    fn parse() -> Result<Self, String> {
        let (mut options, mut arguments) = (Self::default(), env::args().skip(1));
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--out" => options.out = Some(arguments.next().ok_or("--out: expected a file")?.into()),
                "--host" => options.host = true,
                "--device" => options.device = true,
                // cargo's own.
                "--bench" => {}
                _ => return Err(format!("'{argument}': expected --out FILE.json, --host or --device")),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let backend = if options.host { CudaBackend::on_host(None) } else { CudaBackend::on_gpu() };
    let backend = match backend {
        Ok(backend) => backend,
        Err(Error::Missing(why)) if !options.host => {
            println!("skipped: {why}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}", backend.driver().name());
    if options.device {
        return ExitCode::SUCCESS;
    }
    if run(backend, &options) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

type Group = fn(&CudaBackend, &mut Meter, &Sizes, &Numbers) -> Result<()>;

/// Measures everything, a failure of one group or call being no reason to leave out the others; whether there was none.
fn run(backend: CudaBackend, options: &Options) -> bool {
    let sizes = if options.host { Sizes::host() } else { Sizes::gpu() };
    let (mut meter, numbers, device) = (Meter::new(&sizes), Numbers::new(), backend.driver().name());
    let groups: [(&str, Group); 4] = [
        ("limits", limits::measure),
        ("quantisation", quantise::measure),
        ("streams", stream::measure),
        ("attention", stream::attention),
    ];
    let mut whole = true;
    let mut ended = |name: &str, outcome: Result<()>, meter: &Meter| {
        let outcome = outcome.map_err(|error| error.to_string());
        let kept = options.out.as_ref().map_or(Ok(()), |path| save(meter, &device, options.host, path));
        for why in [outcome, kept.map_err(|error| error.to_string())].into_iter().filter_map(Result::err) {
            eprintln!("{name}: {why}");
            whole = false;
        }
    };
    for (name, group) in groups {
        let outcome = group(&backend, &mut meter, &sizes, &numbers);
        ended(name, outcome, &meter);
    }
    let outcome = products::measure(backend, &mut meter, &sizes, &numbers);
    ended("products", outcome, &meter);
    whole && meter.whole()
}

/// All rows so far: after every group, should one of them take the program with it.
fn save(meter: &Meter, device: &str, host: bool, path: &Path) -> io::Result<()> {
    // "NVIDIA H100 80GB HBM3, sm_90a", and between the two that cuBLASLt is missing, where it is.
    let cublaslt = !host && !device.contains("without cuBLASLt");
    let (_, architecture) = device.rsplit_once(", ").unwrap_or(("", "none"));
    let (device, _) = device.split_once(", ").unwrap_or((device, ""));
    let record = json!({
        "device": device,
        "architecture": architecture,
        "host": host,
        "cublaslt": cublaslt,
        "date": date(),
        "copy_bytes_per_s": meter.limits.copy,
        "dense_bf16_flops_per_s": meter.limits.bf16,
        "dense_f32_flops_per_s": meter.limits.f32,
        "rows": meter.rows,
    });
    fs::write(path, format!("{record}\n"))
}

/// Today, in UTC: the civil calendar from a count of days, in years from March, so that a leap day is a year's last.
fn date() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Days since 1 March of year 0; an era is 400 years.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    format!("{:04}-{month:02}-{day:02}", 400 * era + year)
}
