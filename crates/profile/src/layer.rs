//! Where the model is, from the spans of `tracing` that it enters and leaves.
//!
//! The model says it once, in forward. The tape keeps the span with each operation and enters it again for the
//! operation's backward pass, so that a layer's gradients are the layer's, too.

use crate::profile::{Profile, Where};
use std::fmt::Debug;
use std::sync::Arc;
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Tells a profile.
pub(crate) struct SpanLayer(pub Profile);

/// What is remembered of a span.
struct Mark {
    place: Where,
    name: Arc<str>,
}

/// The fields that mean anything here.
#[derive(Default)]
struct Fields {
    kind: Option<String>,
    number: Option<u64>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "number" {
            self.number = Some(value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "kind" {
            self.kind = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let mark = match (attributes.metadata().name(), fields) {
            ("layer", Fields { kind: Some(kind), .. }) => {
                Mark { place: Where::Layer(self.0.layer_number(&kind)), name: kind.into() }
            }
            (name, Fields { number: Some(number), .. }) => {
                let place = if name == "step" { Where::Step(number) } else { Where::Part };
                Mark { place, name: format!("{name} {number}").into() }
            }
            (name, _) => Mark { place: Where::Part, name: name.into() },
        };
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(mark);
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(Mark { place, name }) = span.extensions().get() {
            self.0.enter(id, *place, name);
        }
    }

    fn on_exit(&self, id: &Id, _: Context<'_, S>) {
        self.0.exit(id);
    }
}
