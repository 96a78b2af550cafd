//! Times of steps at each limit.

use crate::disk::Disk;
use crate::work::{Failure, Sizes, Step, Work};
use rankfold_cpu::CpuBackend;
use rankfold_pager::{FileOptions, Limit, Options, Pager};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// A piece of work at all limits.
pub struct Series {
    pub name: &'static str,
    /// Of all its buffers, when they are most.
    pub bytes: usize,
    /// Seconds of a step without a pager.
    pub compute: f64,
    pub rows: Vec<Row>,
}

/// A step at one limit.
pub struct Row {
    /// What may be in memory, over all bytes.
    pub share: f64,
    /// None where a kernel needs more than may be in memory.
    pub figures: Option<Figures>,
}

/// All of a step.
pub struct Figures {
    pub seconds: f64,
    /// Bytes to the file and from it.
    pub stored: f64,
    pub loaded: f64,
    /// The part of those from it that came before they were asked for.
    pub ahead: f64,
    /// Seconds that kernels waited for pages.
    pub stall: f64,
    /// Seconds that the disk alone would need.
    pub disk: f64,
}

impl Figures {
    /// Its time over the greater of what it computes and what the disk needs.
    pub fn bound(&self, compute: f64) -> f64 {
        self.seconds / compute.max(self.disk)
    }
}

impl Series {
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            let Some(figures) = &row.figures else { return json!({ "share": row.share, "refused": true }) };
            json!({
                "share": row.share,
                "seconds": figures.seconds,
                "ratio": figures.seconds / self.compute,
                "stored": figures.stored,
                "loaded": figures.loaded,
                "ahead": figures.ahead,
                "stall": figures.stall,
                "disk": figures.disk,
                "bound": figures.bound(self.compute),
            })
        };
        let rows = self.rows.iter().map(row).collect::<Vec<_>>();
        json!({ "name": self.name, "bytes": self.bytes, "compute": self.compute, "rows": rows })
    }
}

/// How everything is measured.
pub struct Meter<'a> {
    pub file: &'a FileOptions,
    pub page: usize,
    pub disk: &'a Disk,
    pub sizes: &'a Sizes,
}

impl Meter<'_> {
    /// A piece of work at every limit, from the highest.
    pub fn measure(&self, work: &Work) -> Result<Series, Failure> {
        let mut plain = (work.make)(Arc::new(CpuBackend::new(None)))?;
        let limit = Limit::Pages(usize::MAX);
        let pager = Pager::new(Options { page: self.page, ..Options::new(limit, Some(self.file.clone())) })?;
        let backend = Arc::new(CpuBackend::new(None).on_pager(pager.clone()));
        let mut paged = (work.make)(backend.clone())?;
        plain()?;
        paged()?;
        let bytes = backend.memory().peak;
        let mut series = Series { name: work.name, bytes, compute: 0.0, rows: Vec::new() };
        for &share in self.sizes.shares {
            pager.set_limit(Limit::Pages((share * bytes as f64) as usize))?;
            // Without pressure the two are compared closely, so they take turns. Under it the pager would have the other's
            // turn to move pages in.
            let beside = (share > 1.0).then_some(&mut plain);
            let figures = match self.at_limit(&pager, &mut paged, beside) {
                Ok((figures, compute)) => {
                    series.compute = compute.unwrap_or(series.compute);
                    Some(figures)
                }
                Err(why) => {
                    println!("{}, {:.0} %: {why}", work.name, 100.0 * share);
                    None
                }
            };
            series.rows.push(Row { share, figures });
        }
        Ok(series)
    }

    /// A step at the limit that is set, and the seconds of one without a pager, where there is one to compare with.
    fn at_limit(
        &self,
        pager: &Pager,
        paged: &mut Step,
        mut beside: Option<&mut Step>,
    ) -> Result<(Figures, Option<f64>), Failure> {
        for _ in 0..self.sizes.warm_up {
            paged()?;
        }
        let (mut times, mut others) = (Vec::new(), Vec::new());
        let (before, begun) = (pager.stats(), Instant::now());
        let (least, most, enough) = self.sizes.steps;
        while times.len() < least || (times.len() < most && begun.elapsed().as_secs_f64() < enough) {
            if let Some(plain) = &mut beside {
                others.push(timed(plain)?);
            }
            times.push(timed(paged)?);
        }
        let after = pager.stats();
        let steps = times.len() as f64;
        let each = |before: u64, after: u64| (after - before) as f64 / steps;
        let (stored, loaded) = (each(before.stored, after.stored), each(before.loaded, after.loaded));
        let stall = (after.stall - before.stall).as_secs_f64() / steps;
        let prefetched = each(before.prefetched, after.prefetched) * self.page as f64;
        let ahead = if loaded > 0.0 { prefetched / loaded } else { 0.0 };
        let disk = self.disk.seconds(stored, loaded);
        let figures = Figures { seconds: median(&mut times), stored, loaded, ahead, stall, disk };
        Ok((figures, beside.is_some().then(|| median(&mut others))))
    }
}

fn timed(step: &mut Step) -> Result<f64, Failure> {
    let begun = Instant::now();
    step()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The middle of some numbers, of which there is one at least.
pub fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
