//! The vector in plain Rust: what each method of [`Simd`] means, and the fallback.

use super::Simd;

/// N lanes as an array. `Portable<8>` is the fallback; tests also run `Portable<16>`, so that everything generic is
/// tried at AVX-512's width on any machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const N: usize>;

/// An element for each lane. In the crate's own tests, which run sixteen lanes too, it is a call: unrolled they take
/// minutes to compile. `tests/conformance.rs` runs what is shipped.
#[cfg_attr(test, inline(never))]
#[cfg_attr(not(test), inline(always))]
fn lanes<const N: usize>(lane: impl FnMut(usize) -> f32) -> [f32; N] {
    std::array::from_fn(lane)
}

#[inline(always)]
fn map<const N: usize>(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    lanes(|i| f(a[i]))
}

#[inline(always)]
fn zip<const N: usize>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    lanes(|i| f(a[i], b[i]))
}

// SAFETY: plain Rust; pointers are read and written only for the elements that the trait names.
unsafe impl<const N: usize> Simd for Portable<N> {
    type V = [f32; N];
    type Table = [f32; 16];
    const LANES: usize = N;
    // Sixteen of four lanes are what x86-64 has without extensions.
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller's pointer is valid for N elements.
        unsafe { p.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller's pointer is valid for N elements.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> Self::V {
        // SAFETY: only the first n elements are read.
        lanes(|i| if i < n { unsafe { p.add(i).read_unaligned() } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, v: Self::V, n: usize) {
        for (i, x) in v.into_iter().take(n).enumerate() {
            // SAFETY: only the first n elements are written.
            unsafe { p.add(i).write_unaligned(x) }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const half::bf16) -> Self::V {
        // SAFETY: the caller's pointer is valid for N elements.
        lanes(|i| unsafe { p.add(i).read_unaligned() }.to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const half::f16) -> Self::V {
        // SAFETY: the caller's pointer is valid for N elements.
        lanes(|i| unsafe { p.add(i).read_unaligned() }.to_f32())
    }
    #[inline(always)]
    unsafe fn round_bf16(a: Self::V) -> Self::V {
        map(a, |x| half::bf16::from_f32(x).to_f32())
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut half::bf16, v: Self::V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: the caller's pointer is valid for N elements.
            unsafe { p.add(i).write_unaligned(half::bf16::from_f32(x)) }
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut half::f16, v: Self::V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: the caller's pointer is valid for N elements.
            unsafe { p.add(i).write_unaligned(half::f16::from_f32(x)) }
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Two roundings: without the instruction, `mul_add` would be a library call an element.
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn sqrt(a: Self::V) -> Self::V {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale_exp2(a: Self::V, n: Self::V) -> Self::V {
        // Two powers of two, as one alone may be none that f32 has.
        zip(a, n, |a, n| {
            let (n, power) = (n as i32, |n: i32| f32::from_bits(((n + 127) as u32) << 23));
            a * power(n >> 1) * power(n - (n >> 1))
        })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        let (mut half, mut lanes) = (N / 2, a);
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> Self::Table {
        *values
    }
    #[inline(always)]
    unsafe fn lookup_nibbles(table: Self::Table, p: *const u8) -> Self::V {
        lanes(|i| {
            // SAFETY: the caller's pointer is valid for N / 2 bytes.
            let byte = unsafe { p.add(i / 2).read() };
            table[usize::from(if i % 2 == 0 { byte >> 4 } else { byte & 15 })]
        })
    }
    #[inline(always)]
    unsafe fn encode_nibbles(thresholds: Self::Table, codes: Self::Table, v: Self::V, p: *mut u8) {
        let code = |x: f32| codes[thresholds.iter().filter(|t| x > **t).count()].to_bits() as u8;
        for i in 0..N / 2 {
            // SAFETY: the caller's pointer is valid for N / 2 bytes.
            unsafe { p.add(i).write(code(v[2 * i]) << 4 | code(v[2 * i + 1])) }
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self::V]) {
        let tile: [Self::V; N] = std::array::from_fn(|i| rows[i]);
        for (i, row) in rows.iter_mut().enumerate() {
            *row = std::array::from_fn(|j| tile[j][i]);
        }
    }
}
