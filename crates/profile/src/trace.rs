//! Chrome's trace event format (Google, "Trace Event Format", the JSON array form): complete events (`"ph": "X"`) with
//! their begin and duration in microseconds, which <https://ui.perfetto.dev> shows as nested bars.
//!
//! A step is some hundred events. So that a long run writes no gigabytes, only its first steps are traced, and of those
//! no more than a number of events.

use crate::work::Work;
use rankfold_backend::Compute;
use serde::Serialize;
use std::borrow::Cow;
use std::time::Duration;

/// Steps that are traced: one that warms up, and some that do not.
pub const TRACED_STEPS: usize = 5;
/// Events that are traced, of about 150 bytes each.
pub const MOST_EVENTS: usize = 100_000;

/// What kind of thing an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Category {
    Step,
    Part,
    Layer,
    Kernel,
}

/// Something that began and ended. As JSON it is an event of the format.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    name: Cow<'static, str>,
    cat: Category,
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: u32,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Arguments>,
}

/// What a kernel's event says of it.
#[derive(Clone, Copy, Debug, Serialize)]
struct Arguments {
    flops: f64,
    bytes: f64,
    compute: &'static str,
}

impl Event {
    /// `begun` is counted from the profile's own begin.
    pub(crate) fn new(
        name: impl Into<Cow<'static, str>>,
        cat: Category,
        begun: Duration,
        took: Duration,
        work: Option<Work>,
    ) -> Self {
        let microseconds = |time: Duration| time.as_nanos() as f64 / 1e3;
        let arguments = |Work { flops, bytes, compute }| {
            let compute = if compute == Compute::Bf16 { "bf16" } else { "f32" };
            Arguments { flops, bytes, compute }
        };
        let (ts, dur) = (microseconds(begun), microseconds(took));
        Self { name: name.into(), cat, ph: "X", ts, dur, pid: 1, tid: 1, args: work.map(arguments) }
    }
}

/// The events of the first steps.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    steps: usize,
    /// Events that were promised a place, and are pushed when they end.
    begun: usize,
    events: Vec<Event>,
}

impl Trace {
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Whether an event that begins now is to be pushed when it ends: so whatever is in the trace, what holds it is.
    pub fn takes_another(&mut self) -> bool {
        let takes = self.steps <= TRACED_STEPS && self.begun < MOST_EVENTS;
        self.begun += usize::from(takes);
        takes
    }

    pub fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// What holds comes before what is held.
    pub fn sorted(&self) -> Vec<Event> {
        let mut events = self.events.clone();
        events.sort_by(|a, b| a.ts.total_cmp(&b.ts).then(b.dur.total_cmp(&a.dur)));
        events
    }
}
