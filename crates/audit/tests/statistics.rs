//! The figures are those of a plain loop over all weights; totals are the sums of their parts; files that cannot be
//! audited are refused by name.

mod common;

use common::{backend, bytes, normals, run, small, write};
use rankfold_audit::{BLOCKS, Error, Figures, Options, Report, Selection, normality};
use rankfold_backend::{DType, Format, Quantized};
use rankfold_files::Checkpoint;
use rankfold_reference::derive::normal_quantile;
use std::collections::BTreeSet;

/// Two sums of n < 10⁴ terms of one sign, in different orders, differ by less than 2n·2⁻⁵³ < 3·10⁻¹² of themselves;
/// a root, a quotient or a logarithm adds a few 2⁻⁵³.
fn assert_same(what: &str, x: f64, y: f64) {
    assert!((x - y).abs() <= 3e-12 * x.abs().max(y.abs()), "{what}: {x}, expected {y}");
}

fn assert_naive(checkpoint: &Checkpoint, name: &str, shape: [usize; 2], found: &Figures) {
    let backend = backend();
    let w = checkpoint.read_f32(name).unwrap();
    let dense = checkpoint.load(name, backend.as_ref()).unwrap();
    let q = Quantized::quantize(backend.as_ref(), dense.view(), shape, found.format, found.block, found.double);
    let q = q.unwrap();
    let mut out = backend.alloc(DType::F32, w.len()).unwrap();
    backend.dequantize_4bit(&q, out.view_mut()).unwrap();
    let decoded: Vec<f32> = backend.download(out.view()).unwrap();
    let codes: Vec<u8> = backend.download(q.codes.view()).unwrap();

    let n = w.len() as f64;
    let error: Vec<f64> = w.iter().zip(&decoded).rev().map(|(w, d)| f64::from(*d) - f64::from(*w)).collect();
    let signal: f64 = w.iter().rev().map(|w| f64::from(*w).powi(2)).sum();
    let square: f64 = error.iter().map(|e| e * e).sum();
    assert_same("mean", found.mean_error, error.iter().map(|e| e.abs()).sum::<f64>() / n);
    assert_same("rms", found.rms_error, (square / n).sqrt());
    assert_same("snr", found.snr_db.unwrap(), 10.0 * (signal / square).log10());
    let relative = error.iter().zip(w.iter().rev()).map(|(e, w)| e.abs() / (f64::from(w.abs()) + 1e-8));
    assert_same("relative", found.mean_relative_error, relative.sum::<f64>() / n);
    assert_eq!(found.max_error, error.iter().fold(0.0, |max, e| f64::max(max, e.abs())));
    assert_eq!(found.size.bits, 8 * q.bytes() as u64);
    assert_eq!(found.size.parameters, w.len() as u64);

    let mut counts = [0; 16];
    for i in 0..w.len() {
        counts[usize::from(if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 })] += 1;
    }
    assert_eq!(found.code_counts, counts);
    let entropy: f64 = counts.iter().filter(|c| **c > 0).map(|c| *c as f64 / n).map(|p| -p * p.log2()).sum();
    assert_same("entropy", found.code_entropy, entropy);

    let worst = &found.worst;
    let index = worst.row * shape[1] + worst.column;
    assert_eq!((worst.w, worst.decoded), (w[index].into(), decoded[index].into()));
    assert_eq!(worst.error.abs(), found.max_error);
    assert!(worst.margin >= 0.0 && worst.margin == worst.bound - found.max_error && found.certified);
    let first = w.iter().zip(&decoded).position(|(w, d)| (f64::from(*d) - f64::from(*w)).abs() == found.max_error);
    assert_eq!(first, Some(index), "the first of equals");
}

#[test]
fn figures_equal_a_naive_recomputation() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = small(folder.path());
    let report = run(&checkpoint, &Format::ALL, &BLOCKS, 2).unwrap();
    assert_eq!(report.tensors.len(), 2);
    assert_eq!(report.left_out, ["embed_tokens.weight"]);
    for tensor in &report.tensors {
        assert_eq!(tensor.results.len(), 3 * 8 * 2);
        for figures in &tensor.results {
            assert_naive(&checkpoint, &tensor.name, tensor.shape, figures);
        }
    }
}

#[test]
fn totals_equal_the_sums_of_their_parts() {
    let folder = tempfile::tempdir().unwrap();
    let report = run(&small(folder.path()), &Format::ALL, &BLOCKS, 1).unwrap();
    for (i, total) in report.totals.results.iter().enumerate() {
        let parts: Vec<&Figures> = report.tensors.iter().map(|tensor| &tensor.results[i]).collect();
        let n = |part: &Figures| part.size.parameters as f64;
        let sum =
            |value: &dyn Fn(&Figures) -> f64| parts.iter().map(|part| value(part) * n(part)).sum::<f64>() / n(total);
        assert!(parts.iter().all(|p| (p.format, p.block, p.double) == (total.format, total.block, total.double)));
        assert_same("mean", total.mean_error, sum(&|part| part.mean_error));
        assert_same("relative", total.mean_relative_error, sum(&|part| part.mean_relative_error));
        assert_same("square", total.rms_error.powi(2), sum(&|part| part.rms_error.powi(2)));
        assert_eq!(total.size.bits, parts.iter().map(|part| part.size.bits).sum::<u64>());
        assert_eq!(total.size.padding_bits, parts.iter().map(|part| part.size.padding_bits).sum::<f64>());
        for code in 0..16 {
            assert_eq!(total.code_counts[code], parts.iter().map(|part| part.code_counts[code]).sum::<u64>());
        }
        let worst = parts.iter().max_by(|a, b| a.max_error.total_cmp(&b.max_error)).unwrap();
        assert_eq!((&total.worst, total.max_error), (&worst.worst, worst.max_error));
    }
    assert_eq!(report.totals.parameters, report.totals.histogram.iter().sum::<u64>());
    assert_eq!(report.totals.fits.iter().map(|fit| fit.1).sum::<usize>(), 2);
}

#[test]
fn threads_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    // Four chunks, the last of them short.
    let w = normals(3, 211 * 1000);
    let tensors = [("w", DType::F32, &[211usize, 1000][..], bytes(&w))];
    let checkpoint = write(&folder.path().join("w.safetensors"), &tensors);
    let reports = [1, 2, 7].map(|threads| run(&checkpoint, &[Format::Nf4], &[64, 4096], threads).unwrap());
    assert!(reports[0] == reports[1] && reports[0] == reports[2]);
}

/// Bitsandbytes' own mean error and deviation for draws of this size and block (its tests allow 7 deviations), and
/// QLoRA's bits a parameter.
#[test]
fn a_large_normal_matrix_has_the_published_error_and_bits() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [("w", DType::F32, &[1024usize, 1024][..], bytes(&normals(4, 1 << 20)))];
    let report = run(&write(&folder.path().join("w.safetensors"), &tensors), &[Format::Nf4], &[64], 2).unwrap();
    let [single, double] = &report.totals.results[..] else { panic!("{} results", report.totals.results.len()) };
    assert!((single.mean_error - 0.072798).abs() < 7.0 * 0.000074, "{}", single.mean_error);
    assert_eq!((single.size.bits_per_parameter, double.size.nominal_bits_per_parameter), (4.5, 4.126953125));
    assert_eq!((double.size.bits - double.size.offset_bits) as f64 / (1u64 << 20) as f64, 4.126953125);
    assert_eq!(report.tensors[0].weights.fit, normality::Fit::Normal);
}

#[test]
fn the_shape_of_weights_equals_a_naive_recomputation() {
    let w = normals(5, 5000);
    let shape = normality::Shape::of(&w, 3);
    let n = w.len() as f64;
    let mean = w.iter().rev().map(|w| f64::from(*w)).sum::<f64>() / n;
    let moment = |k: i32| w.iter().rev().map(|w| (f64::from(*w) - mean).powi(k)).sum::<f64>() / n;
    // Sums of both signs cancel: their roundings are n·2⁻⁵³ of the sum of magnitudes, which is of size 1 and 10 here.
    assert!((shape.mean - mean).abs() < 1e-11 && (shape.sd - moment(2).sqrt()).abs() < 1e-11);
    assert!((shape.skewness - moment(3) / moment(2).powf(1.5)).abs() < 1e-10);
    assert!((shape.excess_kurtosis - (moment(4) / moment(2).powi(2) - 3.0)).abs() < 1e-10);
    let mut z: Vec<f64> = w.iter().map(|w| (f64::from(*w) - shape.mean) / shape.sd).collect();
    z.sort_by(f64::total_cmp);
    let distance = |(i, z): (usize, &f64)| {
        let normal = normality::cumulative(*z);
        ((i + 1) as f64 / n - normal).abs().max((i as f64 / n - normal).abs())
    };
    assert_eq!(shape.kolmogorov, z.iter().enumerate().map(distance).fold(0.0, f64::max));
}

#[test]
fn shapes_are_told_apart() {
    let fit = |w: &[f32]| normality::Shape::of(w, 1).fit;
    let z = normals(6, 20_000);
    let map = |f: &dyn Fn(f64) -> f64| z.iter().map(|z| f(f64::from(*z)) as f32).collect::<Vec<f32>>();
    assert_eq!(fit(&map(&|z| 0.02 * z + 3.0)), normality::Fit::Normal);
    assert_eq!(fit(&map(&|z| z * z * z)), normality::Fit::HeavyTails);
    assert_eq!(fit(&map(&normality::cumulative)), normality::Fit::LightTails);
    assert_eq!(fit(&map(&|z| (0.2 * z).exp())), normality::Fit::OtherShape);
    assert_eq!(fit(&[0.1; 10]), normality::Fit::Constant);
    let uniform = normality::Shape::of(&map(&normality::cumulative), 1);
    // 1.36/√20000: what one in twenty samples may add to the distance.
    assert!((uniform.kolmogorov - 0.057).abs() < 0.01 && (uniform.excess_kurtosis + 1.2).abs() < 0.05);
}

#[test]
fn the_distribution_function_undoes_the_quantile_function() {
    for i in 1..1000 {
        let p = f64::from(i) / 1000.0;
        // Wichura's quantile is good to 10⁻¹⁶ of itself, at most 3.1 here, times a density of at most 0.4; the series
        // to some ten roundings of 2⁻⁵³.
        assert!((normality::cumulative(normal_quantile(p)) - p).abs() < 2e-15, "{p}");
    }
    assert_eq!([-9.0, 0.0, 9.0].map(normality::cumulative), [0.0, 0.5, 1.0]);
}

/// serde_json's parser may be off by a unit in the last place; everything but a number with a fraction is equal.
fn assert_json(x: &serde_json::Value, y: &serde_json::Value) {
    use serde_json::Value::{Array, Number, Object};
    match (x, y) {
        (Array(x), Array(y)) => {
            assert_eq!(x.len(), y.len());
            x.iter().zip(y).for_each(|(x, y)| assert_json(x, y));
        }
        (Object(x), Object(y)) => {
            assert!(x.keys().eq(y.keys()));
            x.values().zip(y.values()).for_each(|(x, y)| assert_json(x, y));
        }
        (Number(x), Number(y)) if x.is_f64() => {
            let (x, y) = (x.as_f64().unwrap(), y.as_f64().unwrap());
            assert!((x - y).abs() <= 2f64.powi(-51) * x.abs(), "{x} {y}");
        }
        _ => assert_eq!(x, y),
    }
}

#[test]
fn json_holds_the_whole_report() {
    let folder = tempfile::tempdir().unwrap();
    let report = run(&small(folder.path()), &Format::ALL, &[64, 128], 1).unwrap();
    let json = report.to_json().unwrap();
    let back: Report = serde_json::from_str(&json).unwrap();
    let value = |report: &Report| serde_json::to_value(report).unwrap();
    assert_json(&value(&report), &value(&back));
    assert!(json.contains("\"format\": \"nf4\"") && json.contains("\"bound_used\""));
}

#[test]
fn what_cannot_be_audited_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut w = normals(7, 8 * 32);
    w[3 * 32 + 5] = f32::NAN;
    let nan = write(&at("nan.safetensors"), &[("a.weight", DType::F32, &[8, 32], bytes(&w))]);
    let error = run(&nan, &[Format::Nf4], &[64], 1).unwrap_err();
    assert!(matches!(error, Error::NonFinite { index: 101, row: 3, column: 5, .. }), "{error}");
    assert!(error.to_string().contains("nan.safetensors: tensor 'a.weight': element 101 (row 3, column 5) is NaN"));

    let key = "a.weight.quant_state.bitsandbytes__nf4";
    let tensors = [("a.weight", DType::U8, &[64usize, 1][..], vec![0; 64]), (key, DType::U8, &[2], b"{}".to_vec())];
    let error = run(&write(&at("bits.safetensors"), &tensors), &[Format::Nf4], &[64], 1).unwrap_err().to_string();
    assert!(error.contains("'a.weight' is in 4 bits already") && error.contains("expected the unquantised"), "{error}");

    let none = write(&at("none.safetensors"), &[("lm_head.weight", DType::F32, &[1, 1], bytes(&[1.0]))]);
    let error = run(&none, &[Format::Nf4], &[64], 1).unwrap_err().to_string();
    assert!(error.contains("none.safetensors: nothing to audit"), "{error}");
    let options =
        Options::new(&[Format::Nf4], &[64], 1, Selection::Linear(BTreeSet::from(["b.weight".into()]))).unwrap();
    assert!(rankfold_audit::audit(&backend(), &nan, "", &options, &mut |_, _, _| ()).is_err());

    // Half of the scales f32's largest number, the others 0: every figure is still a number. With 40 zeros of 256 a
    // scale overflows when it is quantised (the arithmetic is at `reference`'s test of it).
    let mut huge = vec![0.0; 256 * 32];
    huge[128 * 32..].fill(f32::MAX);
    let half = write(&at("half.safetensors"), &[("a", DType::F32, &[256, 32], bytes(&huge))]);
    assert!(run(&half, &Format::ALL, &[32], 1).unwrap().certified());
    huge[40 * 32..].fill(f32::MAX);
    let most = write(&at("most.safetensors"), &[("a", DType::F32, &[256, 32], bytes(&huge))]);
    let error = run(&most, &[Format::Nf4], &[32], 1).unwrap_err();
    let source = rankfold_backend::Error::Scale { block: 40, value: f32::INFINITY };
    assert!(matches!(&error, Error::Kernel { source: found, .. } if *found == source), "{error}");
}

#[test]
fn zeros_have_no_error_and_no_ratio() {
    let folder = tempfile::tempdir().unwrap();
    let zeros = write(&folder.path().join("0.safetensors"), &[("a", DType::F32, &[3, 3], bytes(&[0.0; 9]))]);
    let report = run(&zeros, &Format::ALL, &[64], 2).unwrap();
    for figures in &report.totals.results {
        assert_eq!((figures.max_error, figures.snr_db, figures.bound_used), (0.0, None, 0.0));
        assert!(figures.certified && figures.code_entropy == 0.0);
    }
    let page = rankfold_audit::html(&report);
    assert!(!page.contains("NaN") && !page.contains("inf"), "a number that is none");
}
