//! Kernels, and the one place of run-time dispatch and of intrinsics.
//!
//! A kernel is compiled once for each [`Level`] and states the order of its additions and where it fuses a multiplication
//! with one, so every level gives the same bits: a result does not depend on the machine's vector width.

pub mod block;
pub mod dots;
mod element;
pub mod integer_tile;
#[cfg(target_arch = "aarch64")]
mod neon;
mod register;
mod signs;
pub mod tile;
mod vector;

pub use element::{Element, Run};
#[cfg(target_arch = "aarch64")]
pub use neon::{NEON_ROWS, multiplies_bytes, multiply_bytes, multiply_pairs};
pub use signs::spread_signs;
pub use vector::{
    add_scaled, add_scaled_float64, add_scaled_to_float64, add_terms_to_float64, combine, dot, largest_magnitude,
    lower_bounds, multiply, not_above, pair_products, prefetch, round_to_bytes, scale, scale_sums, squared_distance,
    squared_distance_float64, squared_norm_float64, squared_rest, subtract, subtract_bytes, to_float64,
};

use std::sync::atomic::{AtomicU8, Ordering};

/// The instruction sets that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What the compiler makes of plain Rust on every machine of the architecture.
    Plain = 1,
    /// NEON, which every AArch64 has.
    #[cfg(target_arch = "aarch64")]
    Neon = 2,
    /// AVX2 with FMA and F16C.
    Avx2 = 3,
    /// As [`Level::Avx2`], with products of bytes.
    AvxVnni = 4,
    /// AVX-512 F, BW, DQ and VL.
    Avx512 = 5,
    /// AVX-512 with products of bytes.
    Avx512Vnni = 6,
}

impl Level {
    /// All, the best last.
    pub const ALL: &[Level] = &[
        Level::Plain,
        #[cfg(target_arch = "aarch64")]
        Level::Neon,
        Level::Avx2,
        Level::AvxVnni,
        Level::Avx512,
        Level::Avx512Vnni,
    ];

    /// Its name, as `BPO_SIMD` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Plain => "plain",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "neon",
            Level::Avx2 => "avx2",
            Level::AvxVnni => "avxvnni",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
        }
    }
}

/// Makes kernels use less than the processor has.
const VARIABLE: &str = "BPO_SIMD";

static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The levels of this machine, the best one first. There are processors with the best that lack [`Level::AvxVnni`].
fn detected_levels() -> impl Iterator<Item = Level> {
    #[cfg(target_arch = "x86_64")]
    let found = {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        [
            (Level::Avx512Vnni, avx512 && is_x86_feature_detected!("avx512vnni")),
            (Level::Avx512, avx512),
            (Level::AvxVnni, avx2 && is_x86_feature_detected!("avxvnni")),
            (Level::Avx2, avx2),
            (Level::Plain, true),
        ]
    };
    #[cfg(target_arch = "aarch64")]
    let found = [(Level::Neon, true), (Level::Plain, true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = [(Level::Plain, true)];
    found.into_iter().filter(|(_, there)| *there).map(|(level, _)| level)
}

/// Whether this machine has a level.
pub fn is_detected(level: Level) -> bool {
    detected_levels().any(|detected| detected == level)
}

/// The level that kernels of vectors run at.
#[inline]
pub fn level() -> Level {
    match level_of_bytes() {
        Level::AvxVnni => Level::Avx2,
        level => level,
    }
}

/// The level that products of bytes run at, which alone tell [`Level::AvxVnni`] from [`Level::Avx2`].
#[inline]
pub fn level_of_bytes() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        1 => Level::Plain,
        #[cfg(target_arch = "aarch64")]
        2 => Level::Neon,
        3 => Level::Avx2,
        4 => Level::AvxVnni,
        5 => Level::Avx512,
        6 => Level::Avx512Vnni,
        _ => set_level(wanted_level()),
    }
}

/// What the environment variable `BPO_SIMD` asks for by its name, else the best.
fn wanted_level() -> Level {
    named_level(std::env::var(VARIABLE).ok().as_deref()).unwrap_or(Level::Avx512Vnni)
}

fn named_level(name: Option<&str>) -> Option<Level> {
    Level::ALL.iter().copied().find(|level| Some(level.name()) == name)
}

/// What `BPO_SIMD` holds where that is no level, and the names of those.
pub fn unknown_level() -> Option<(String, String)> {
    let given = std::env::var_os(VARIABLE)?.to_string_lossy().into_owned();
    let names = || Level::ALL.iter().map(|level| level.name()).collect::<Vec<_>>().join(", ");
    (!given.is_empty() && named_level(Some(&given)).is_none()).then(|| (given, names()))
}

/// Runs kernels at `level`, or at the next lower one that this machine has; returns the level in force.
///
/// For comparing the levels with one another; they give the same bits, so it is safe at any time.
pub fn set_level(level: Level) -> Level {
    let level = detected_levels().find(|&detected| detected <= level).unwrap_or(Level::Plain);
    LEVEL.store(level as u8, Ordering::Relaxed);
    level
}

/// Compiles a function once for each [`Level`] and picks one at run time.
macro_rules! dispatch {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<const $generic:ident: usize>)? (
            $($argument:ident: $kind:ty),* $(,)?
        ) $(-> $output:ty)? $body:block
    ) => {
        $(#[$attribute])*
        #[inline]
        $visibility fn $name $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
            #[inline(always)]
            fn plain $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
                    plain $(::<$generic>)? ($($argument),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
                    plain $(::<$generic>)? ($($argument),*)
                }
                match $crate::simd::level() {
                    $crate::simd::Level::Avx512 | $crate::simd::Level::Avx512Vnni => {
                        // SAFETY: `level` never exceeds what this machine was detected to have.
                        return unsafe { avx512 $(::<$generic>)? ($($argument),*) };
                    }
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 | $crate::simd::Level::AvxVnni => return unsafe { avx2 $(::<$generic>)? ($($argument),*) },
                    $crate::simd::Level::Plain => {}
                }
            }
            plain $(::<$generic>)? ($($argument),*)
        }
    };
}
pub(crate) use dispatch;
