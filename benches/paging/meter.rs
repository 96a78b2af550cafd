//! Times of steps at each limit, beside those without a pager and beside the disk.
//!
//! A machine's speed changes from one second to the next, and its disk's more so. So everything is measured in rounds:
//! some steps without a pager, then a look at the disk, then as many steps on the pager, then steps without it while
//! the disk moves the same bytes; what is compared comes of one round, and what is kept is the median over the rounds.

use crate::disk::{Disk, Rates};
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
    /// Without a pager.
    pub compute: f64,
    /// The first over the second.
    pub ratio: f64,
    /// Bytes to the file and from it.
    pub stored: f64,
    pub loaded: f64,
    /// The part of those from it that came before they were asked for.
    pub ahead: f64,
    /// Seconds that kernels waited for pages.
    pub stall: f64,
    /// Seconds that the disk alone would need.
    pub disk: f64,
    /// Its time over the greater of what it computes and what the disk needs, and the least and the most of that.
    pub bound: f64,
    pub spread: [f64; 2],
    /// Of the step without a pager while the disk moves the same bytes, and its time over that.
    pub beside: f64,
    pub over: f64,
}

impl Series {
    pub fn json(&self) -> Value {
        let row = |row: &Row| {
            let Some(figures) = &row.figures else { return json!({ "share": row.share, "refused": true }) };
            json!({
                "share": row.share,
                "seconds": figures.seconds,
                "compute": figures.compute,
                "ratio": figures.ratio,
                "stored": figures.stored,
                "loaded": figures.loaded,
                "ahead": figures.ahead,
                "stall": figures.stall,
                "disk": figures.disk,
                "bound": figures.bound,
                "spread": figures.spread,
                "beside": figures.beside,
                "over": figures.over,
            })
        };
        let rows = self.rows.iter().map(row).collect::<Vec<_>>();
        json!({ "name": self.name, "bytes": self.bytes, "rows": rows })
    }
}

/// A phase of a step: its seconds, and what the pager moved meanwhile.
#[derive(Clone, Copy, Default)]
pub struct Phase {
    pub seconds: f64,
    pub stored: f64,
    pub loaded: f64,
}

/// The means of the steps of a round, phase by phase.
struct Means {
    phases: Vec<Phase>,
    stall: f64,
    prefetched: f64,
}

impl Means {
    fn all(&self) -> Phase {
        let add = |a: Phase, b: &Phase| Phase {
            seconds: a.seconds + b.seconds,
            stored: a.stored + b.stored,
            loaded: a.loaded + b.loaded,
        };
        self.phases.iter().fold(Phase::default(), add)
    }
}

/// How everything is measured.
pub struct Meter<'a> {
    pub file: &'a FileOptions,
    pub page: usize,
    pub sizes: &'a Sizes,
}

impl Meter<'_> {
    /// A piece of work at every limit, from the highest.
    pub fn measure(&self, work: &Work, disk: &mut Disk) -> Result<Series, Failure> {
        let mut plain = (work.make)(Arc::new(CpuBackend::new(None)))?;
        let limit = Limit::Pages(usize::MAX);
        let pager = Pager::new(Options { page: self.page, ..Options::new(limit, Some(self.file.clone())) })?;
        let backend = Arc::new(CpuBackend::new(None).on_pager(pager.clone()));
        let mut paged = (work.make)(backend.clone())?;
        plain(&mut || ())?;
        paged(&mut || ())?;
        let bytes = backend.memory().peak;
        // All that ever leaves was in the file once: where a file still grows, it is slow.
        pager.vacate()?;
        let mut series = Series { name: work.name, bytes, rows: Vec::new() };
        for &share in self.sizes.shares {
            pager.set_limit(Limit::Pages((share * bytes as f64) as usize))?;
            let figures = match self.at_limit(&pager, disk, &mut plain, &mut paged) {
                Ok(figures) => Some(figures),
                Err(why) => {
                    println!("{}, {:.0} %: {why}", work.name, 100.0 * share);
                    None
                }
            };
            series.rows.push(Row { share, figures });
        }
        Ok(series)
    }

    /// A step at the limit that is set.
    fn at_limit(&self, pager: &Pager, disk: &mut Disk, plain: &mut Step, paged: &mut Step) -> Result<Figures, Failure> {
        for _ in 0..self.sizes.warm_up {
            paged(&mut || ())?;
        }
        let (mut rounds, begun) = (Vec::new(), Instant::now());
        while wants_more(self.sizes.rounds, rounds.len(), begun) {
            let without = self.steps(pager, plain)?;
            let rates = disk.probe.rates()?;
            // The pager had the time of the others to bring pages in.
            paged(&mut || ())?;
            let on_pager = self.steps(pager, paged)?;
            let beside = match on_pager.all() {
                Phase { stored: 0.0, loaded: 0.0, .. } => without.all().seconds,
                // A step before those that count: the pager may still bring in what no step will ask for.
                _ => {
                    plain(&mut || ())?;
                    self.mean(|| disk.probe.beside(plain, &on_pager.phases))?
                }
            };
            rounds.push(figures(&without, &rates, beside, &on_pager, self.page as f64));
        }
        let of = |value: fn(&Figures) -> f64| median(&mut rounds.iter().map(value).collect::<Vec<_>>());
        let bounds = rounds.iter().map(|round| round.bound);
        Ok(Figures {
            seconds: of(|round| round.seconds),
            compute: of(|round| round.compute),
            ratio: of(|round| round.ratio),
            stored: of(|round| round.stored),
            loaded: of(|round| round.loaded),
            ahead: of(|round| round.ahead),
            stall: of(|round| round.stall),
            disk: of(|round| round.disk),
            bound: of(|round| round.bound),
            spread: [bounds.clone().fold(f64::INFINITY, f64::min), bounds.fold(0.0, f64::max)],
            beside: of(|round| round.beside),
            over: of(|round| round.over),
        })
    }

    /// The mean of some steps' seconds.
    fn mean(&self, mut step: impl FnMut() -> Result<f64, Failure>) -> Result<f64, Failure> {
        let (mut sum, mut count, begun) = (0.0, 0, Instant::now());
        while wants_more(self.sizes.steps, count, begun) {
            sum += step()?;
            count += 1;
        }
        Ok(sum / count as f64)
    }

    /// Some steps, one right after the other.
    fn steps(&self, pager: &Pager, step: &mut Step) -> Result<Means, Failure> {
        let (mut sums, mut count, begun) = (Vec::<Phase>::new(), 0, Instant::now());
        let first = pager.stats();
        while wants_more(self.sizes.steps, count, begun) {
            let (mut before, mut since, mut phase) = (pager.stats(), Instant::now(), 0);
            let mut ends = || {
                let (after, now) = (pager.stats(), Instant::now());
                if sums.len() == phase {
                    sums.push(Phase::default());
                }
                sums[phase].seconds += (now - since).as_secs_f64();
                sums[phase].stored += (after.stored - before.stored) as f64;
                sums[phase].loaded += (after.loaded - before.loaded) as f64;
                (before, since, phase) = (after, now, phase + 1);
            };
            step(&mut ends)?;
            ends();
            count += 1;
        }
        let (last, count) = (pager.stats(), count as f64);
        let mean = |sum: &Phase| Phase {
            seconds: sum.seconds / count,
            stored: sum.stored / count,
            loaded: sum.loaded / count,
        };
        Ok(Means {
            phases: sums.iter().map(mean).collect(),
            stall: (last.stall - first.stall).as_secs_f64() / count,
            prefetched: (last.prefetched - first.prefetched) as f64 / count,
        })
    }
}

/// Whether there are to be more than `count`: fewest and most of them, and the seconds after which there are enough.
fn wants_more((least, most, enough): (usize, usize, f64), count: usize, begun: Instant) -> bool {
    count < least || (count < most && begun.elapsed().as_secs_f64() < enough)
}

/// What a round found.
fn figures(without: &Means, rates: &Rates, beside: f64, on_pager: &Means, page: f64) -> Figures {
    let (all, compute) = (on_pager.all(), without.all().seconds);
    let disk = rates.seconds(all.stored, all.loaded);
    let bound = all.seconds / compute.max(disk);
    Figures {
        seconds: all.seconds,
        compute,
        ratio: all.seconds / compute,
        stored: all.stored,
        loaded: all.loaded,
        ahead: if all.loaded > 0.0 { on_pager.prefetched * page / all.loaded } else { 0.0 },
        stall: on_pager.stall,
        disk,
        bound,
        spread: [bound; 2],
        beside,
        over: all.seconds / beside,
    }
}

/// The middle of some numbers, of which there is one at least.
pub fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
