//! Run-time selection of the processor's vector width.

/// Runs `f` compiled for AVX2 if the processor has AVX2 and F16C, so that its loops are vectorized
/// eight floats wide. Otherwise runs `f` compiled for the target's baseline.
///
/// The bits of the result do not depend on the processor, because the compiler never contracts or
/// reorders additions and multiplications. `f` and the functions that it calls must be `#[inline]`.
/// Otherwise they are not compiled for AVX2.
#[inline(always)]
pub(crate) fn vectorized<K: Kernel>(f: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2,f16c")]
        fn with_avx2<K: Kernel>(f: K) -> K::Output {
            f.compute()
        }
        if std::arch::is_x86_feature_detected!("f16c") {
            // SAFETY: `is_x86_feature_detected` found AVX2 and F16C, the features that `with_avx2`
            // enables.
            #[allow(unsafe_code)]
            return unsafe { with_avx2(f) };
        }
    }
    f.compute()
}

/// As [`vectorized`], but compiled for AVX-512 if the processor has it. Use this only for loops
/// that AVX-512 makes faster, because the compiler makes another copy of each loop.
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
        // SAFETY: `is_x86_feature_detected` found the features that `with_avx512` enables.
        #[allow(unsafe_code)]
        return unsafe { with_avx512(f) };
    }
    vectorized(f)
}

/// Code for [`vectorized`] and [`widest`]: a closure, or a type whose `compute` is
/// `#[inline(always)]`. The type is for bodies that are so large that the compiler would not inline
/// a closure.
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
