//! Where a run's time goes.
//!
//! [`Profile::wrap`] puts a backend between a model and its own: it hands every call on and notes how long it took, how
//! much arithmetic and how many bytes it was. [`Profile::layer`] is a layer of `tracing`, whose spans say where in the
//! model a call was made. After the run [`Profile::report`] holds the times against what the machine can do, and
//! [`Profile::trace`] is, as JSON, a file that Perfetto shows. A run that is not profiled has neither and pays
//! for neither.
//!
//! In reading order:
//! - `work`: operations and bytes of a call; `products`: of products with a weight, and of attention;
//! - `profiled`: the backend; `fence`: when a call of it is done;
//! - `profile`: what is noted; `layer`: where the model is, from its spans;
//! - [`Roof`]: what the machine can do, measured; [`Report`]: the two together;
//! - `trace`: [`Event`]s in Chrome's format.
#![forbid(unsafe_code)]

mod fence;
mod layer;
mod products;
mod profile;
mod profiled;
mod report;
mod roof;
mod trace;
mod work;

pub use profile::Profile;
pub use report::{Bound, Report, Row};
pub use roof::Roof;
pub use trace::{Event, MOST_EVENTS, TRACED_STEPS};
