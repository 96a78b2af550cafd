//! AMX: eight tiles of sixteen rows of 64 bytes, and a product of two of them that is added to a third.
//!
//! The instructions are written as assembler, whose operands are the tiles' numbers: stable Rust has no intrinsics for
//! them. The state of the tiles belongs to a thread, which configures them before its first product and releases them
//! after its last, so that the processor can rest and the system need not save 8 KiB at every switch.

/// Bytes of a tile's row.
pub(crate) const ROW: usize = 64;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

/// Matrix units.
///
/// # Safety
/// Every method but `configure` needs a thread on which `configure` was called, and `release` not since; pointers are
/// valid for sixteen rows of 64 bytes, `stride` bytes from one to the next. Tiles are 0 to 7.
pub(crate) unsafe trait Tiles {
    /// All tiles as sixteen rows of 64 bytes, on this thread.
    unsafe fn configure();
    /// Give the tiles up.
    unsafe fn release();
    /// Tile T = 0.
    unsafe fn zero<const T: u8>();
    /// Tile T from memory.
    unsafe fn load<const T: u8>(p: *const f32, stride: usize);
    /// Tile T to memory.
    unsafe fn store<const T: u8>(p: *mut f32, stride: usize);
    /// Tile C [16, 16] f32 += A·B, of pairs of bf16: A [16, 16 pairs]; B [16 pairs, 16], pair l of column j at (l, j).
    unsafe fn multiply_add<const C: u8, const A: u8, const B: u8>();
}

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::{Amx, usable};

#[cfg(target_arch = "x86_64")]
mod amx {
    use super::{ROW, ROWS, Tiles};
    use half::bf16;
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max, _xgetbv};
    use std::sync::OnceLock;

    /// AMX-TILE and AMX-BF16.
    pub(crate) struct Amx;

    /// The operand of `ldtilecfg`.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        /// Bytes of a row of each tile, of eight that exist.
        bytes: [u16; 16],
        /// Rows of each tile.
        rows: [u8; 16],
    }

    const ALL_WHOLE: Configuration = {
        let mut all = Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        let mut tile = 0;
        while tile < 8 {
            all.bytes[tile] = ROW as u16;
            all.rows[tile] = ROWS as u8;
            tile += 1;
        }
        all
    };

    // SAFETY: `usable` found the units on this machine; the rest is the trait's.
    #[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
    unsafe impl Tiles for Amx {
        #[inline(always)]
        unsafe fn configure() {
            unsafe { asm!("ldtilecfg [{}]", in(reg) &ALL_WHOLE, options(nostack, preserves_flags)) }
        }
        #[inline(always)]
        unsafe fn release() {
            unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
        }
        #[inline(always)]
        unsafe fn zero<const T: u8>() {
            unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags)) }
        }
        #[inline(always)]
        unsafe fn load<const T: u8>(p: *const f32, stride: usize) {
            unsafe {
                asm!("tileloadd tmm{t}, [{p} + {stride}]", t = const T, p = in(reg) p, stride = in(reg) stride,
                     options(nostack, preserves_flags, readonly));
            }
        }
        #[inline(always)]
        unsafe fn store<const T: u8>(p: *mut f32, stride: usize) {
            unsafe {
                asm!("tilestored [{p} + {stride}], tmm{t}", t = const T, p = in(reg) p, stride = in(reg) stride,
                     options(nostack, preserves_flags));
            }
        }
        #[inline(always)]
        unsafe fn multiply_add<const C: u8, const A: u8, const B: u8>() {
            unsafe {
                asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                     options(nostack, preserves_flags));
            }
        }
    }

    /// Whether this process can use the units: the processor has them, the system grants them, and a product of small
    /// integers comes out right.
    pub(crate) fn usable() -> bool {
        static USABLE: OnceLock<bool> = OnceLock::new();
        *USABLE.get_or_init(|| {
            // SAFETY: the third is called only where the first two found the units and their permission.
            unsafe { present() && granted() && multiplies() }
        })
    }

    /// CPUID.7.0:EDX has bit 22 for AMX-BF16 and 24 for AMX-TILE; XCR0 has bits 17 and 18 where the system saves tiles.
    fn present() -> bool {
        let (units, state) = (1 << 22 | 1 << 24, 1 << 17 | 1 << 18);
        // SAFETY: leaf 7 is asked for where it exists; XCR0 is read where the system has enabled it (which AVX-512
        // needs too).
        unsafe {
            __get_cpuid_max(0).0 >= 7
                && __cpuid_count(7, 0).edx & units == units
                && std::is_x86_feature_detected!("avx512bf16")
                && xcr0() & state == state
        }
    }

    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: the processor has XSAVE.
        unsafe { _xgetbv(0) }
    }

    /// Ask Linux for the state of tiles, once for the process: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    fn granted() -> bool {
        #[cfg(target_os = "linux")]
        {
            let (call, request, feature) = (158u64, 0x1023u64, 18u64);
            let answer: i64;
            // SAFETY: a system call that takes numbers alone; the kernel overwrites rcx and r11.
            unsafe {
                asm!("syscall", inlateout("rax") call => answer, in("rdi") request, in("rsi") feature,
                     out("rcx") _, out("r11") _, options(nostack));
            }
            answer == 0
        }
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// That a product of two tiles of small integers, which is exact, is what it should be.
    ///
    /// # Safety
    /// The machine has the units, and the process their permission.
    unsafe fn multiplies() -> bool {
        let (a, b) = (|i: usize, k: usize| (i + 3 * k) % 7, |k: usize, j: usize| (5 * k + j) % 9);
        let pair = |first: usize, second: usize| {
            let bits = |x: usize| u32::from(bf16::from_f32(x as f32).to_bits());
            f32::from_bits(bits(first) | bits(second) << 16)
        };
        let left: [f32; 256] = std::array::from_fn(|at| {
            let (i, l) = (at / 16, at % 16);
            pair(a(i, 2 * l), a(i, 2 * l + 1))
        });
        let right: [f32; 256] = std::array::from_fn(|at| {
            let (l, j) = (at / 16, at % 16);
            pair(b(2 * l, j), b(2 * l + 1, j))
        });
        let mut found = [1.0f32; 256];
        // SAFETY: the caller's; three arrays of a tile's size.
        unsafe {
            Amx::configure();
            Amx::load::<0>(found.as_ptr(), ROW);
            Amx::load::<1>(left.as_ptr(), ROW);
            Amx::load::<2>(right.as_ptr(), ROW);
            Amx::multiply_add::<0, 1, 2>();
            Amx::store::<0>(found.as_mut_ptr(), ROW);
            Amx::release();
        }
        found.iter().enumerate().all(|(at, found)| {
            let sum: usize = (0..32).map(|k| a(at / 16, k) * b(k, at % 16)).sum();
            *found == 1.0 + sum as f32
        })
    }
}

/// Tiles in plain Rust, so that what is written for them is tried on any machine.
#[cfg(test)]
pub(crate) mod emulated {
    use super::{ROWS, Tiles};
    use std::cell::RefCell;

    type Tile = [[f32; 16]; ROWS];

    thread_local! {
        static TILES: RefCell<Option<[Tile; 8]>> = const { RefCell::new(None) };
    }

    fn with<R>(f: impl FnOnce(&mut [Tile; 8]) -> R) -> R {
        TILES.with_borrow_mut(|tiles| f(tiles.as_mut().expect("tiles that are configured")))
    }

    pub(crate) struct Emulated;

    // SAFETY: plain Rust; sixteen rows of the caller's memory.
    #[allow(clippy::undocumented_unsafe_blocks)] // one reason for all of them, above
    unsafe impl Tiles for Emulated {
        unsafe fn configure() {
            TILES.set(Some([[[f32::NAN; 16]; ROWS]; 8]));
        }
        unsafe fn release() {
            TILES.set(None);
        }
        unsafe fn zero<const T: u8>() {
            with(|tiles| tiles[usize::from(T)] = [[0.0; 16]; ROWS]);
        }
        unsafe fn load<const T: u8>(p: *const f32, stride: usize) {
            let tile = std::array::from_fn(|i| unsafe { p.byte_add(i * stride).cast::<[f32; 16]>().read_unaligned() });
            with(|tiles| tiles[usize::from(T)] = tile);
        }
        unsafe fn store<const T: u8>(p: *mut f32, stride: usize) {
            let tile = with(|tiles| tiles[usize::from(T)]);
            for (i, row) in tile.into_iter().enumerate() {
                unsafe { p.byte_add(i * stride).cast::<[f32; 16]>().write_unaligned(row) }
            }
        }
        unsafe fn multiply_add<const C: u8, const A: u8, const B: u8>() {
            let halves = |x: f32| (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xFFFF_0000));
            with(|tiles| {
                let (a, b) = (tiles[usize::from(A)], tiles[usize::from(B)]);
                for (row, c) in a.iter().zip(&mut tiles[usize::from(C)]) {
                    for (j, c) in c.iter_mut().enumerate() {
                        // The chains of the even and of the odd k, each from zero.
                        let (mut even, mut odd) = (0.0f32, 0.0f32);
                        for (x, y) in row.iter().zip(&b) {
                            let ((x0, x1), (y0, y1)) = (halves(*x), halves(y[j]));
                            (even, odd) = (x0.mul_add(y0, even), x1.mul_add(y1, odd));
                        }
                        *c += even + odd;
                    }
                }
            });
        }
    }
}
