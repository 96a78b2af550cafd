//! What is noted while a run goes: how long each kind of call took, and, of the first steps, every one.
//!
//! Only what happens in a step counts. A call belongs to the innermost span that is a layer of the model; one thread
//! trains, so that there is one such span at a time.

use crate::layer::SpanLayer;
use crate::profiled::Profiled;
use crate::report::Report;
use crate::roof::Roof;
use crate::trace::{Category, Event, Trace};
use crate::work::Work;
use rankfold_backend::{Backend, Compute, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::span::Id;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

/// A profile in the making; clones share it.
#[derive(Clone, Debug)]
pub struct Profile {
    begun: Instant,
    noted: Arc<Mutex<Noted>>,
}

/// What a span says of where the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// In the step of this number.
    Step(u64),
    /// In the layer of this kind, by its number in [`Noted::layers`].
    Layer(usize),
    /// In something else, which is only shown.
    Part,
}

/// Calls of one kind: the kernel's name, the layer's number, whether products are in bf16.
pub(crate) type Key = (&'static str, usize, bool);

/// What calls of one kind came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub calls: u64,
    pub seconds: f64,
    pub flops: f64,
    pub bytes: f64,
}

/// Some steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    pub steps: u64,
    pub seconds: f64,
    pub sums: BTreeMap<Key, Sum>,
}

#[derive(Debug, Default)]
struct Noted {
    /// The kinds of layers that were met; the first is none.
    layers: Vec<String>,
    open: Vec<Open>,
    step: Option<u64>,
    first: Steps,
    others: Steps,
    trace: Trace,
}

/// A span that was entered and not left.
#[derive(Debug)]
struct Open {
    id: Id,
    place: Where,
    name: Arc<str>,
    begun: Instant,
    is_traced: bool,
}

impl Default for Profile {
    fn default() -> Self {
        let noted = Noted { layers: vec![String::new()], ..Noted::default() };
        Self { begun: Instant::now(), noted: Arc::new(Mutex::new(noted)) }
    }
}

impl Profile {
    /// A backend that does what `backend` does, with its buffers and to its bits, and notes it here.
    pub fn wrap(&self, backend: Arc<dyn Backend>) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Profiled::new(backend, self.clone())?))
    }

    /// The layer of `tracing` through which spans of this workspace say where the model is: `step` with its `number`,
    /// `layer` with its `kind`.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> {
        let is_ours = |of: &Metadata| of.is_span() && of.target().starts_with("rankfold");
        SpanLayer(self.clone()).with_filter(filter_fn(is_ours))
    }

    /// The times, held against what the machine can do. The first step, which meets cold caches and an empty pool, is
    /// left out where there are others.
    pub fn report(&self, roof: Roof) -> Report {
        let noted = self.noted();
        let steps = if noted.others.steps > 0 { &noted.others } else { &noted.first };
        Report::new(steps, &noted.layers, roof)
    }

    /// What happened in the first steps, outer events before those that they hold. As JSON it is a file of Chrome's
    /// trace format.
    pub fn trace(&self) -> Vec<Event> {
        self.noted().trace.sorted()
    }

    /// The number of a kind of layer.
    pub(crate) fn layer_number(&self, kind: &str) -> usize {
        let layers = &mut self.noted().layers;
        layers.iter().position(|known| known == kind).unwrap_or_else(|| {
            layers.push(kind.to_owned());
            layers.len() - 1
        })
    }

    pub(crate) fn enter(&self, id: &Id, place: Where, name: &Arc<str>) {
        let mut noted = self.noted();
        if let Where::Step(number) = place
            && noted.step.replace(number) != Some(number)
        {
            noted.begin_step();
        }
        let is_traced = (noted.is_in_step() || matches!(place, Where::Step(_))) && noted.trace.takes_another();
        let (id, name) = (id.clone(), name.clone());
        // The clock is read last here and first when the span is left: what is done here is in the outer span's time.
        noted.open.push(Open { id, place, name, begun: Instant::now(), is_traced });
    }

    pub(crate) fn exit(&self, id: &Id) {
        let ended = Instant::now();
        let mut noted = self.noted();
        let Some(place) = noted.open.iter().rposition(|open| open.id == *id) else { return };
        let Open { place, name, begun, is_traced, .. } = noted.open.remove(place);
        let category = match place {
            Where::Step(_) => Category::Step,
            Where::Layer(_) => Category::Layer,
            Where::Part => Category::Part,
        };
        if category == Category::Step {
            noted.steps().seconds += (ended - begun).as_secs_f64();
        }
        if is_traced {
            let (begun, took) = (begun - self.begun, ended - begun);
            noted.trace.push(Event::new(name.to_string(), category, begun, took, None));
        }
    }

    /// A call that is done.
    pub(crate) fn call(&self, kernel: &'static str, begun: Instant, took: Duration, work: Work) {
        let mut noted = self.noted();
        if !noted.is_in_step() {
            return;
        }
        let layer = noted.open.iter().rev().find_map(|open| match open.place {
            Where::Layer(layer) => Some(layer),
            _ => None,
        });
        let key = (kernel, layer.unwrap_or(0), work.compute == Compute::Bf16);
        let sum = noted.steps().sums.entry(key).or_default();
        sum.calls += 1;
        sum.seconds += took.as_secs_f64();
        sum.flops += work.flops;
        sum.bytes += work.bytes;
        if noted.trace.takes_another() {
            noted.trace.push(Event::new(kernel, Category::Kernel, begun - self.begun, took, Some(work)));
        }
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        // Sums and lists: a panic elsewhere leaves them as good as they were.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    fn is_in_step(&self) -> bool {
        self.open.iter().any(|open| matches!(open.place, Where::Step(_)))
    }

    fn begin_step(&mut self) {
        let steps = if self.first.steps == 0 { &mut self.first } else { &mut self.others };
        steps.steps += 1;
        self.trace.begin_step();
    }

    /// Where the step that goes on is counted.
    fn steps(&mut self) -> &mut Steps {
        if self.others.steps > 0 { &mut self.others } else { &mut self.first }
    }
}
