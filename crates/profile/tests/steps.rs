//! What a profile notes of a run: steps, the layers of their kernels, and a trace that is not too long.

mod common;

use common::{ROOF, layer, profile, step};
use proptest::prelude::*;
use rankfold_autograd::{Base, Gradients, Parameter, Tape, Tensor};
use rankfold_backend::{Backend, Compute, DType};
use rankfold_profile::{MOST_EVENTS, Profile, TRACED_STEPS};
use serde_json::Value;
use std::sync::Arc;

fn fill(backend: &Arc<dyn Backend>, times: usize) {
    let mut x = backend.alloc(DType::F32, 1).unwrap();
    (0..times).for_each(|_| backend.fill(0.0, x.view_mut()).unwrap());
}

/// (category, name, begin, end) of the events of a trace, in nanoseconds, in the file's order.
fn events(profile: &Profile) -> Vec<(String, String, u64, u64)> {
    let json: Vec<Value> = serde_json::from_str(&serde_json::to_string(&profile.trace()).unwrap()).unwrap();
    let of = |event: &Value| {
        assert_eq!(event["ph"], "X");
        let nanoseconds = |field: &str| (1e3 * event[field].as_f64().unwrap()).round() as u64;
        let text = |field: &str| event[field].as_str().unwrap().to_owned();
        (text("cat"), text("name"), nanoseconds("ts"), nanoseconds("ts") + nanoseconds("dur"))
    };
    json.iter().map(of).collect()
}

/// That each event lies within the last one before it that has not ended.
fn nest(events: &[(String, String, u64, u64)]) -> bool {
    let mut open: Vec<u64> = Vec::new();
    events.iter().all(|(_, _, begun, ended)| {
        while open.last().is_some_and(|end| end <= begun) {
            open.pop();
        }
        let is_within = open.last().is_none_or(|end| ended <= end);
        open.push(*ended);
        is_within
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Calls outside steps are not counted, nor are those of a first step that others follow. The shares are quotients
    /// of the same sums, a few roundings each.
    #[test]
    fn the_shares_add_up_to_the_kernels_part_and_the_means_to_the_steps(
        calls in prop::collection::vec(0usize..9, 1..7),
    ) {
        let profile = profile(|backend| {
            fill(backend, 3);
            for (n, calls) in calls.iter().enumerate() {
                step(n as u64 + 1, || layer("norm", || fill(backend, *calls)));
                fill(backend, 3);
                step(n as u64 + 1, || layer("optimiser", || fill(backend, 2)));
            }
        });
        let report = profile.report(ROOF);
        let counted = if calls.len() > 1 { &calls[1..] } else { &calls };
        prop_assert_eq!(report.steps, counted.len() as u64);
        let of = |kind: &str| report.rows.iter().find(|row| (row.kernel, &*row.layer) == ("fill", kind));
        let mean = counted.iter().sum::<usize>() as f64 / counted.len() as f64;
        prop_assert_eq!(of("norm").map_or(0.0, |row| row.calls), mean);
        prop_assert_eq!(of("optimiser").unwrap().calls, 2.0);
        let sum: f64 = report.rows.iter().map(|row| row.seconds).sum();
        prop_assert_eq!(report.in_kernels, sum);
        // A difference and a sum, each rounded once.
        prop_assert!((report.in_kernels + report.elsewhere() - report.seconds).abs() <= f64::EPSILON * report.seconds);
        prop_assert!(report.elsewhere() >= 0.0, "{:?}", report);
        let shares: f64 = report.rows.iter().map(|row| row.share).sum();
        prop_assert!((shares - report.in_kernels / report.seconds).abs() < 1e-12, "{}", shares);
        prop_assert!(report.rows.is_sorted_by(|a, b| a.seconds >= b.seconds));
    }
}

/// Where in the model a parameter's gradient is formed is where it was used, computed again or not.
#[test]
fn a_layers_gradients_are_the_layers_and_what_is_computed_again_is_too() {
    for again in [false, true] {
        let profile = profile(|backend| {
            let parameter = |shape: &[usize]| {
                let elements = shape.iter().product();
                Parameter::new(backend.filled(DType::F32, elements, 0.5).unwrap(), shape).unwrap()
            };
            let (w, gain, x) = (parameter(&[4, 4]), parameter(&[4]), parameter(&[3, 4]));
            let model = {
                let (w, gain) = (w.clone(), gain.clone());
                move |tape: &Tape, x: &Tensor| {
                    let base = Base::Dense(w.tensor());
                    let y = layer("q_proj", || tape.linear(x, &base, None, None, Compute::F32))?;
                    layer("norm", || tape.rms_norm(&y, &gain.tensor(), 1e-5))
                }
            };
            step(1, || {
                let tape = Tape::new(backend.clone());
                let x = x.tensor();
                let y = layer("block", || if again { tape.checkpoint(&x, model) } else { model(&tape, &x) }).unwrap();
                let seed = backend.filled(DType::F32, 12, 1.0).unwrap();
                tape.backward(&y, seed, &mut Gradients::new(backend.clone())).unwrap();
            });
        });
        let report = profile.report(ROOF);
        let mut rows: Vec<(&str, &str, f64)> = report
            .rows
            .iter()
            .filter(|row| row.kernel.starts_with("linear") || row.kernel.starts_with("rms_norm"))
            .map(|row| (row.kernel, &*row.layer, row.calls))
            .collect();
        rows.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let forward = if again { 2.0 } else { 1.0 };
        let expected = [
            ("linear", "q_proj", forward),
            ("linear_grad_input", "q_proj", 1.0),
            ("linear_grad_weight", "q_proj", 1.0),
            ("rms_norm", "norm", forward),
            ("rms_norm_grad", "norm", 1.0),
        ];
        assert_eq!(rows, expected, "computed again: {again}");
    }
}

#[test]
fn the_trace_nests_and_holds_the_first_steps_and_nothing_outside() {
    let profile = profile(|backend| {
        fill(backend, 2);
        for n in 3..20 {
            step(n, || {
                tracing::debug_span!(target: "rankfold", "forward").in_scope(|| {
                    layer("attention", || layer("q_proj", || fill(backend, 3)));
                });
                tracing::debug_span!(target: "somebody_else", "layer", kind = "no").in_scope(|| fill(backend, 1));
            });
            layer("outside", || fill(backend, 2));
        }
    });
    let events = events(&profile);
    assert!(nest(&events), "{events:?}");
    let names = |of: &str| -> Vec<&str> {
        events.iter().filter(|(category, ..)| category == of).map(|(_, name, ..)| name.as_str()).collect()
    };
    assert_eq!(names("step"), ["step 3", "step 4", "step 5", "step 6", "step 7"]);
    assert_eq!(names("step").len(), TRACED_STEPS);
    assert_eq!(names("part"), ["forward"; TRACED_STEPS]);
    assert_eq!(names("layer"), ["attention", "q_proj"].repeat(TRACED_STEPS));
    // Two allocations and four fills a step.
    assert_eq!(names("kernel").len(), 6 * TRACED_STEPS);
}

#[test]
fn a_trace_ends_at_its_most_events_and_nests_still() {
    let profile = profile(|backend| {
        step(1, || {
            (0..1000).for_each(|_| layer("mlp", || fill(backend, MOST_EVENTS / 900)));
        });
    });
    let events = events(&profile);
    assert_eq!(events.len(), MOST_EVENTS);
    assert!(nest(&events));
    assert_eq!(events[0].0, "step");
    let report = profile.report(ROOF);
    assert_eq!(common::row(&report, "fill").calls, (1000 * (MOST_EVENTS / 900)) as f64, "the table has all");
}
