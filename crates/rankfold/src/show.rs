//! Numbers as people read them, and the progress of a run.

use crate::error::{Error, Result};
use crate::ranks::Rank;
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use rankfold_trainer::metrics::EvalMetrics;
use rankfold_trainer::run::Progress;
use rankfold_trainer::step::StepMetrics;

/// [`println!`], but standard output that cannot be written is an error and not a panic; one that nobody reads any
/// more (`| head`) is neither.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::show::print(format_args!($($text)*))
    };
}
pub(crate) use say;

/// What [`say!`] calls.
pub fn print(text: std::fmt::Arguments) -> Result<()> {
    use std::io::{ErrorKind, Write};
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(Error::io("standard output")),
    }
}

/// Text from a file with its control characters escaped: a terminal would obey them.
pub fn printable(text: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// 1536 → "1.50 KiB".
pub fn bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

/// Whole MiB of an amount that is such, as `--memory-limit` takes it: 3 · 2³⁰ → "3072 MiB".
pub fn mib(n: u64) -> String {
    format!("{} MiB", n.div_ceil(1 << 20))
}

/// 1234567 → "1,234,567".
pub fn count(n: usize) -> String {
    HumanCount(n as u64).to_string()
}

/// Rows of cells in columns, the first one aligned to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) -> Result<()> {
    let cells = |column: usize| rows.iter().filter_map(move |row| row.get(column));
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        (0..columns).map(|column| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:width$}"),
            _ => format!("  {cell:>width$}"),
        });
        say!("{}", cells.collect::<String>().trim_end())?;
    }
    Ok(())
}

/// The progress bar of a run, on standard error; remembers the held-out losses.
pub struct Bar {
    bar: ProgressBar,
    /// The first evaluation and the last.
    pub evals: Option<(EvalMetrics, EvalMetrics)>,
    /// The process's peak resident memory, as the last step saw it.
    pub peak_rss: Option<u64>,
    /// AdaLoRA's ranks, as the last step left them.
    pub ranks: Vec<Rank>,
}

impl Bar {
    /// A bar of `steps`.
    pub fn new(steps: usize) -> Self {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { bar: ProgressBar::new(steps as u64).with_style(style), evals: None, peak_rss: None, ranks: Vec::new() }
    }

    /// Leave the bar as it is.
    pub fn finish(&self) {
        self.bar.abandon();
    }
}

impl Progress for Bar {
    fn step(&mut self, m: &StepMetrics) {
        self.peak_rss = m.peak_rss;
        self.ranks = m.spent.as_ref().map_or_else(Vec::new, |spent| spent.ranks.clone());
        self.bar.set_message(format!("loss {:.3}  {:.0} tokens/s", m.loss, m.tokens_per_second));
        self.bar.set_position(m.step as u64);
        // Where standard error is no terminal the bar is hidden: a line now and then instead.
        if self.bar.is_hidden() && (m.step.is_multiple_of(20) || m.step == 1) {
            eprintln!("step {}  loss {:.4}  {:.0} tokens/s", m.step, m.loss, m.tokens_per_second);
        }
    }

    fn eval(&mut self, m: &EvalMetrics) {
        let first = self.evals.map_or(*m, |(first, _)| first);
        self.evals = Some((first, *m));
        let line = format!("held-out loss {:.4} nat a token after step {}", m.eval_loss, m.step);
        self.bar.suspend(|| eprintln!("{line}"));
    }

    fn resumed(&mut self, step: usize) {
        self.bar.set_position(step as u64);
        self.bar.suspend(|| eprintln!("resuming after step {step}"));
    }
}
