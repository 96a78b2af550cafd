//! Every instruction set of this machine, and the portable one at both widths, against plain Rust.

use super::*;

/// Run a generic check on every token that this machine can run.
fn everywhere<K: Kernel<Output = ()> + Clone>(kernel: K) {
    for isa in Isa::available() {
        isa.run(kernel.clone());
    }
    // SAFETY: plain Rust.
    unsafe { kernel.run::<Portable<16>>() };
}

unsafe fn lanes<S: Simd>(v: S::V) -> Vec<f32> {
    let mut out = vec![0.0; S::LANES];
    // SAFETY: LANES elements.
    unsafe { S::store(out.as_mut_ptr(), v) };
    out
}

#[derive(Clone)]
struct LookupAndTranspose;
impl Kernel for LookupAndTranspose {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let values: [f32; 16] = std::array::from_fn(|i| (i * i) as f32 - 7.0);
        let bytes: Vec<u8> = (0..S::LANES as u8 / 2).map(|i| i.wrapping_mul(0x9D) ^ 0x3A).collect();
        // SAFETY: LANES / 2 bytes, LANES rows, LANES elements.
        unsafe {
            let found = lanes::<S>(S::lookup_nibbles(S::table(&values), bytes.as_ptr()));
            let expected: Vec<f32> =
                bytes.iter().flat_map(|b| [values[usize::from(b >> 4)], values[usize::from(b & 15)]]).collect();
            assert_eq!(found, expected);

            let matrix: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
            let mut rows: Vec<S::V> = (0..S::LANES).map(|i| S::load(matrix.as_ptr().add(i * S::LANES))).collect();
            S::transpose(&mut rows);
            for (i, row) in rows.into_iter().enumerate() {
                assert_eq!(lanes::<S>(row), (0..S::LANES).map(|j| matrix[j * S::LANES + i]).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn nibbles_are_looked_up_in_order_and_tiles_transposed() {
    everywhere(LookupAndTranspose);
}

#[derive(Clone)]
struct Exponential;
impl Kernel for Exponential {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut x = -87.3f32;
        while x < 88.7 {
            // SAFETY: values only.
            let found = unsafe { lanes::<S>(exp::<S>(S::splat(x)))[0] };
            let exact = f64::from(x).exp();
            assert!(
                ((f64::from(found) - exact) / exact).abs() <= 2.0 * f64::from(f32::EPSILON),
                "exp({x}) = {found}, {exact}"
            );
            x += 0.0137;
        }
        // SAFETY: values only.
        unsafe {
            assert_eq!(lanes::<S>(exp::<S>(S::splat(0.0)))[0], 1.0);
            assert_eq!(lanes::<S>(exp::<S>(S::splat(f32::NEG_INFINITY)))[0], 0.0);
            for x in [88.73, 1e30, f32::INFINITY] {
                assert_eq!(lanes::<S>(exp::<S>(S::splat(x)))[0], f32::INFINITY);
            }
            assert!(lanes::<S>(exp::<S>(S::splat(f32::NAN)))[0].is_nan());
            assert_eq!(lanes::<S>(sigmoid::<S>(S::splat(f32::NEG_INFINITY)))[0], 0.0);
            assert_eq!(lanes::<S>(sigmoid::<S>(S::splat(f32::INFINITY)))[0], 1.0);
        }
    }
}

#[test]
fn exp_is_within_two_ulp_and_exact_at_zero() {
    everywhere(Exponential);
}

#[derive(Clone)]
struct HyperbolicTangent;
impl Kernel for HyperbolicTangent {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: values only.
        let tanh = |x: f32| unsafe { lanes::<S>(tanh::<S>(S::splat(x)))[0] };
        let mut size = 1e-40f32;
        while size < 50.0 {
            for x in [size, -size] {
                let (found, exact) = (f64::from(tanh(x)), f64::from(x).tanh());
                // A denormal has steps of its own.
                let bound = 4.0 * f64::from(f32::EPSILON) * exact.abs() + f64::from(f32::from_bits(2));
                assert!((found - exact).abs() <= bound, "tanh({x}) = {found}, {exact}");
            }
            size *= 1.0137;
        }
        assert_eq!([f32::NEG_INFINITY, -1e30, 0.0, 1e30, f32::INFINITY].map(tanh), [-1.0, -1.0, 0.0, 1.0, 1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }
}

#[test]
fn tanh_is_within_four_ulp_near_0_too() {
    everywhere(HyperbolicTangent);
}

#[derive(Clone)]
struct Parts;
impl Kernel for Parts {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let values: Vec<f32> = (0..S::LANES).map(|i| i as f32 - 2.5).collect();
        for n in 0..S::LANES {
            let mut out = vec![9.0; S::LANES];
            // SAFETY: LANES elements.
            unsafe {
                let v = S::load_first(values.as_ptr(), n);
                S::store_first(out.as_mut_ptr(), v, n);
                assert_eq!(S::sum(v), values[..n].iter().sum::<f32>());
            }
            assert!(out.iter().enumerate().all(|(i, x)| *x == if i < n { values[i] } else { 9.0 }));
        }
        let halves: Vec<half::f16> = values.iter().map(|x| half::f16::from_f32(*x)).collect();
        let brains: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
        // SAFETY: LANES elements each.
        unsafe {
            assert_eq!(lanes::<S>(S::load_f16(halves.as_ptr())), values);
            assert_eq!(lanes::<S>(S::load_bf16(brains.as_ptr())), values);
            assert_eq!(S::max_lane(S::load(values.as_ptr())), values[S::LANES - 1]);
        }
    }
}

#[test]
fn partial_loads_stores_and_conversions_touch_only_their_elements() {
    everywhere(Parts);
}

#[derive(Clone)]
struct Rounding;
impl Kernel for Rounding {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Every upper half with lower halves below, on and above a tie; NaNs and infinities among them.
        for upper in (0..=u16::MAX).step_by(3) {
            for lower in [0u32, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (mut brains, mut halves) = ([half::bf16::ZERO; 16], [half::f16::ZERO; 16]);
                // SAFETY: LANES ≤ 16 elements.
                unsafe {
                    S::store_bf16(brains.as_mut_ptr(), S::splat(x));
                    S::store_f16(halves.as_mut_ptr(), S::splat(x));
                }
                assert_eq!(brains[S::LANES - 1].to_bits(), half::bf16::from_f32(x).to_bits(), "{x:e}");
                assert_eq!(halves[S::LANES - 1].to_bits(), half::f16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }
}

#[test]
fn stores_round_to_nearest_even_and_keep_nan() {
    everywhere(Rounding);
}

#[derive(Clone)]
struct Encode;
impl Kernel for Encode {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut thresholds: [f32; 16] = std::array::from_fn(|i| i as f32 - 7.0);
        thresholds[15] = f32::INFINITY;
        let codes: [u32; 16] = std::array::from_fn(|i| (i as u32 * 7 + 3) % 16);
        let values: Vec<f32> = (0..64).map(|i| i as f32 * 0.25 - 8.0).collect();
        let expected = |part: &[f32]| -> Vec<u8> {
            let code = |x: f32| codes[thresholds.iter().filter(|t| x > **t).count()] as u8;
            part.chunks(2).map(|pair| code(pair[0]) << 4 | code(pair[1])).collect()
        };
        for part in values.chunks(S::LANES) {
            let mut bytes = vec![0; S::LANES / 2];
            // SAFETY: LANES elements, LANES / 2 bytes.
            unsafe {
                let (t, c) = (S::table(&thresholds), S::table(&codes.map(f32::from_bits)));
                S::encode_nibbles(t, c, S::load(part.as_ptr()), bytes.as_mut_ptr());
            }
            assert_eq!(bytes, expected(part));
        }
        for part in values.chunks(ENCODED) {
            let mut bytes = [0; ENCODED / 2];
            // SAFETY: ENCODED elements, ENCODED / 2 bytes.
            unsafe {
                let (t, c) = (S::table(&thresholds), S::table(&codes.map(f32::from_bits)));
                let mut v = [S::splat(0.0); 4];
                for (v, part) in v.iter_mut().zip(part.chunks(S::LANES)) {
                    *v = S::load(part.as_ptr());
                }
                S::encode_many(t, c, v, bytes.as_mut_ptr());
            }
            assert_eq!(bytes[..], expected(part));
        }
    }
}

#[test]
fn nibbles_are_encoded_by_the_thresholds_exceeded() {
    everywhere(Encode);
}

/// What bf16 units make of all pairs of some numbers, as bits; NaNs as one.
#[derive(Clone)]
struct Units16(Vec<f32>);
impl Bf16Kernel for Units16 {
    type Output = Vec<u32>;
    #[inline(always)]
    unsafe fn run<S: Bf16Units>(self) -> Vec<u32> {
        let mut bits = Vec::new();
        for part in self.0.chunks_exact(3 * S::LANES) {
            // SAFETY: three vectors.
            unsafe {
                let [a, b, c] = [0, 1, 2].map(|i| S::load(part.as_ptr().add(i * S::LANES)));
                let (along, across) = (S::pair_along(a, b), S::pair_across(b, a));
                let sum = lanes::<S>(S::dot(along, across, c)).into_iter();
                bits.extend(sum.map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }));
                for pairs in [along, across] {
                    let halves =
                        lanes::<S>(pairs).into_iter().flat_map(|x| [x.to_bits() << 16, x.to_bits() & 0xFFFF_0000]);
                    bits.extend(halves.map(|x| if f32::from_bits(x).is_nan() { u32::MAX } else { x }));
                }
            }
        }
        bits
    }
}

#[test]
fn bf16_units_do_what_plain_rust_says() {
    // Every exponent, ties between two bf16 and their neighbours, both zeros, infinities, NaN, denormals; sums whose
    // order shows.
    let mut numbers =
        vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-40, 1e-45];
    for i in 0..4096u32 {
        let word = rankfold_backend::philox::word(1, 0, i.into());
        let near_tie = word & 0xFFFF_0000 | [0x8000, 0x7FFF, 0x8001, word & 0xFFFF][i as usize % 4];
        numbers.push(f32::from_bits(near_tie));
        numbers.push(2.0 * rankfold_backend::philox::unit(word) - 1.0);
    }
    let expected = Isa::portable_16(Units::Pairs).run_bf16(Units16(numbers.clone()));
    for isa in Isa::available().into_iter().filter(|isa| isa.has_bf16_units()) {
        let found = isa.run_bf16(Units16(numbers.clone()));
        assert!(found == expected, "{isa}: {:?}", found.iter().zip(&expected).enumerate().find(|(_, (a, b))| a != b));
    }
}
