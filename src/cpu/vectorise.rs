//! Inner loops compiled once for each instruction set, chosen at run time.
//!
//! A function inside `vectorised!` exists three times: for AVX-512, for AVX2 with FMA, and for
//! whatever the crate was compiled for. Everything that it calls must be `#[inline(always)]`,
//! else it is compiled for the weakest of the three.

/// The instruction sets that are told apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
pub enum Level {
    Baseline,
    Avx2,
    Avx512,
}

impl Level {
    /// What this machine has.
    #[inline(always)]
    pub fn of_this_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
            {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Baseline
    }
}

macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident<T: Float>(
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $out:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: Float>($($arg: $ty),*) $(-> $out)? {
            #[inline(always)]
            fn body<T: Float>($($arg: $ty),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            {
                use crate::cpu::vectorise::Level;
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512<T: Float>($($arg: $ty),*) $(-> $out)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<T: Float>($($arg: $ty),*) $(-> $out)? { body($($arg),*) }
                match Level::of_this_machine() {
                    // SAFETY: this machine has the instruction set, as was found just now.
                    Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    )*};
}

pub(crate) use vectorised;
