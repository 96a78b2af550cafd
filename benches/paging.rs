//! What paging costs: the time of a step, and the bytes that it moves, against how much may be in memory; beside the
//! same step without a pager, and beside the limit of the disk.
//!
//!     cargo bench -p rankfold-trainer --bench paging -- [--quick] [--folder DIR] [--buffered] [--page KIB]
//!                                                       [--only NAME] [--out FILE.json]
//!
//! First the disk is measured by itself, in runs as the pager moves them. Then each piece of work, on a pager whose
//! limit goes from half as much again as all its buffers down to a tenth of them. At every limit some steps pass first,
//! until the forecast knows the work. Then it takes turns with the same work without a pager (its compute) and with the
//! disk alone, so that a machine that others slow down slows all three. `disk` is what the disk alone needs for the
//! bytes that a step moved, and `bound` the time over max(compute, disk): the work cannot take less than either.
//! `beside` is the step without a pager while the disk moves the same bytes, phase by phase of the step (a training
//! step's gradients, and its update): more than that maximum where moving bytes takes processors from the work, or a
//! disk that idles in one phase cannot help in the next. `over` is the time over it: what is the pager's own.
//!
//! `--folder` says where the file is ($TMPDIR), `--buffered` that the system's cache is not bypassed, `--page` how
//! large a page is (256), `--only` which piece of work is measured: those whose name begins so. `--out` keeps the rows,
//! and beside them a table (.md) and a plot (.svg). `--quick` runs small sizes, to see that everything runs; its
//! times mean nothing.
//!
//! In reading order: `disk`, the limit, and `beside` work; `work`, `optimiser`, `weights`, `model`, which is `llama`'s:
//! what is measured; `meter`: how; `table`, `plot`: what is kept.

#[path = "paging/beside.rs"]
mod beside;
#[path = "paging/disk.rs"]
mod disk;
mod llama;
#[path = "paging/meter.rs"]
mod meter;
#[path = "paging/model.rs"]
mod model;
#[path = "paging/optimiser.rs"]
mod optimiser;
#[path = "paging/plot.rs"]
mod plot;
#[path = "paging/table.rs"]
mod table;
#[path = "paging/weights.rs"]
mod weights;
#[path = "paging/work.rs"]
mod work;

use disk::Disk;
use meter::{Meter, Series};
use rankfold_pager::FileOptions;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};
use work::{Failure, Sizes};

/// The command line.
struct Options {
    quick: bool,
    file: FileOptions,
    page: usize,
    only: String,
    out: Option<PathBuf>,
}

impl Options {
    fn parse() -> Result<Self, String> {
        let file = FileOptions { folder: env::temp_dir(), direct: true, capacity: u64::MAX };
        let mut options = Self { quick: false, file, page: 256 << 10, only: String::new(), out: None };
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = |what| arguments.next().ok_or_else(|| format!("{argument}: expected {what}"));
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--buffered" => options.file.direct = false,
                "--folder" => options.file.folder = value("a folder")?.into(),
                "--only" => options.only = value("a name")?,
                "--out" => options.out = Some(value("a file")?.into()),
                "--page" => {
                    let kib = value("KiB of a page")?.parse::<usize>().map_err(|why| format!("{argument}: {why}"))?;
                    options.page = kib << 10;
                }
                // cargo's own.
                "--bench" => {}
                _ => return Err(format!("'{argument}': not an option of this bench")),
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
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let sizes = if options.quick { Sizes::quick() } else { Sizes::whole() };
    let mut disk = Disk::measure(&options.file, options.page, sizes.disk)?;
    println!("{disk}");
    let meter = Meter { file: &options.file, page: options.page, sizes: &sizes };
    let mut series = Vec::new();
    for work in work::all(&sizes).into_iter().filter(|work| work.name.starts_with(&options.only)) {
        let measured = meter.measure(&work, &mut disk)?;
        print!("{}", table::text(&measured));
        series.push(measured);
    }
    options.out.as_ref().map_or(Ok(()), |path| save(options, &disk, &series, path))
}

/// The rows, a table and a plot.
fn save(options: &Options, disk: &Disk, series: &[Series], path: &Path) -> Result<(), Failure> {
    let record = json!({
        "quick": options.quick,
        "direct": options.file.direct,
        "page": options.page,
        "disk": disk.json(),
        "series": series.iter().map(Series::json).collect::<Vec<_>>(),
    });
    fs::write(path, format!("{record:#}\n"))?;
    fs::write(path.with_extension("md"), table::markdown(disk, series))?;
    fs::write(path.with_extension("svg"), plot::plot(series))?;
    Ok(())
}
