//! One binary, the processor's own vector width.

/// Runs `f` compiled for AVX2 where the processor has it, so that the loops inside are vectorized eight floats wide.
///
/// The bits of the result do not depend on the processor: additions and multiplications are never contracted or
/// reordered by this. `f` and what it calls must be `#[inline]` for the wider instructions to reach it.
#[inline(always)]
pub(crate) fn vectorized<K: Kernel>(f: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2,f16c")]
        fn with_avx2<K: Kernel>(f: K) -> K::Output {
            f.compute()
        }
        if std::arch::is_x86_feature_detected!("f16c") {
            // SAFETY: the processor has AVX2 and F16C, the features that `with_avx2` enables: both were just detected.
            #[allow(unsafe_code)]
            return unsafe { with_avx2(f) };
        }
    }
    f.compute()
}

/// As [`vectorized`], compiled for AVX-512 where the processor has it: for few loops that gain by it, since it is another copy of each.
#[inline(always)]
pub(crate) fn widest<K: Kernel>(f: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512bw")
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
        fn with_avx512<K: Kernel>(f: K) -> K::Output {
            f.compute()
        }
        // SAFETY: the processor has the features that `with_avx512` enables: they were just detected.
        #[allow(unsafe_code)]
        return unsafe { with_avx512(f) };
    }
    vectorized(f)
}

/// What [`vectorized`] runs: a closure, or where a body is so large that the compiler would call a closure rather than
/// compile it in, a type whose `compute` is `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;

    fn compute(self) -> Self::Output;
}

impl<R, F: FnOnce() -> R> Kernel for F {
    type Output = R;

    #[inline(always)]
    fn compute(self) -> R {
        self()
    }
}
