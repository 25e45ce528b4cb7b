//! SIMD vectors for the blocked product: AVX-512, AVX2, or small arrays that the compiler
//! vectorizes.

use crate::device::Accumulator;
use std::slice;

/// A vector of f32 or f64.
///
/// A value of a vector type proves that the processor has the type's instructions. Kernels get
/// their first value from the unsafe function [`Vector::zero`]. Every other function that uses
/// these instructions takes a value of the vector type, which is the proof.
///
/// # Safety
/// The type must consist of [`Vector::LANES`] reals without padding, and all bits must be valid.
/// Its functions must need no instructions beyond those that `zero` requires. The intrinsics of the
/// standard library can also create a vector. Code that calls them must know that the processor has
/// all instructions that `zero` requires.
#[allow(unsafe_code)]
pub(in super::super) unsafe trait Vector: Copy {
    /// The type of an element.
    type Real: Accumulator;
    /// The number of elements.
    const LANES: usize;

    /// 0 in every SIMD lane.
    ///
    /// # Safety
    /// The caller must have detected that the processor has the instructions of this vector type.
    /// An array needs none.
    unsafe fn zero() -> Self;

    /// `x` in every SIMD lane.
    fn splat(self, x: Self::Real) -> Self;

    /// Loads the first LANES elements of a slice.
    fn load(self, from: &[Self::Real]) -> Self;

    /// Stores to the first LANES elements of a slice.
    fn store(self, to: &mut [Self::Real]);

    /// self + other.
    fn plus(self, other: Self) -> Self;

    /// self · other.
    fn times(self, other: Self) -> Self;

    /// a · b + self, rounded once where the processor has FMA.
    fn add_product(self, a: Self, b: Self) -> Self;

    /// Returns the elements a₀ b₀ a₁ b₁ … of a = self and b = other, in two vectors.
    fn interleave(self, other: Self) -> (Self, Self);

    /// The elements of these vectors.
    #[inline(always)]
    fn lanes(vectors: &[Self]) -> &[Self::Real] {
        // SAFETY: this trait requires that a vector consists of `LANES` reals without padding. A
        // vector is at least as aligned as a real.
        #[allow(unsafe_code)]
        unsafe {
            slice::from_raw_parts(vectors.as_ptr().cast(), vectors.len() * Self::LANES)
        }
    }

    /// Reinterprets the aligned part of some memory as vectors.
    #[inline(always)]
    fn in_memory(self, memory: &mut [Self::Real]) -> &mut [Self] {
        // SAFETY: this trait requires that a vector consists of `LANES` reals without padding, and
        // that all bits are valid.
        #[allow(unsafe_code)]
        unsafe {
            memory.align_to_mut().1
        }
    }
}

/// Prefetches the cache line at an address, which need not be valid.
#[inline(always)]
pub(in crate::kernels) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no architectural effect and never faults. Every x86-64 processor has
    // the instruction.
    #[allow(unsafe_code)]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Arrays as vectors: the compiler uses the target's baseline instructions.
macro_rules! portable {
    ($real:ty, $lanes:literal) => {
        // SAFETY: an array has no padding, and no function here needs an instruction that the
        // target lacks.
        #[allow(unsafe_code)]
        unsafe impl Vector for [$real; $lanes] {
            type Real = $real;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn zero() -> Self {
                [0.0; $lanes]
            }

            #[inline(always)]
            fn splat(self, x: $real) -> Self {
                [x; $lanes]
            }

            #[inline(always)]
            fn load(self, from: &[$real]) -> Self {
                *from.first_chunk().expect("a slice of at least LANES elements")
            }

            #[inline(always)]
            fn store(self, to: &mut [$real]) {
                *to.first_chunk_mut().expect("a slice of at least LANES elements") = self;
            }

            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                std::array::from_fn(|i| self[i] + other[i])
            }

            #[inline(always)]
            fn times(self, other: Self) -> Self {
                std::array::from_fn(|i| self[i] * other[i])
            }

            #[inline(always)]
            fn add_product(self, a: Self, b: Self) -> Self {
                // Without an FMA instruction, `mul_add` is a library call, which is a hundred times
                // slower.
                let one = |i: usize| {
                    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                        a[i].mul_add(b[i], self[i])
                    } else {
                        self[i] + a[i] * b[i]
                    }
                };
                std::array::from_fn(one)
            }

            #[inline(always)]
            fn interleave(self, other: Self) -> (Self, Self) {
                let both = |i: usize| if i % 2 == 0 { self[i / 2] } else { other[i / 2] };
                (std::array::from_fn(both), std::array::from_fn(|i| both(i + $lanes)))
            }
        }
    };
}

portable!(f32, 4);
portable!(f64, 2);

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::Vector;
    use std::arch::x86_64::*;

    /// Implements [`Vector`] for a type of `std::arch`. `$interleave` computes
    /// [`Vector::interleave`] of two vectors.
    macro_rules! vector {
        ($vector:ty, $real:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add:ident, $mul:ident, $fma:ident, $interleave:expr) => {
            // SAFETY: the type consists of this many reals without padding. Every function but
            // `zero` takes a vector. A vector of 256 bits exists only if the processor has AVX2 and
            // FMA, and one of 512 bits only if it has AVX-512. No function needs other
            // instructions.
            #[allow(unsafe_code)]
            unsafe impl Vector for $vector {
                type Real = $real;
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the caller has detected that the processor has the instruction.
                    #[allow(unsafe_code)]
                    unsafe {
                        $splat(0.0)
                    }
                }

                #[inline(always)]
                fn splat(self, x: $real) -> Self {
                    // SAFETY: `self` exists, so the processor has the instruction.
                    #[allow(unsafe_code)]
                    unsafe {
                        $splat(x)
                    }
                }

                #[inline(always)]
                fn load(self, from: &[$real]) -> Self {
                    let from: &[$real; $lanes] =
                        from.first_chunk().expect("a slice of at least LANES elements");
                    // SAFETY: `self` exists, so the processor has the instruction; `from` is as
                    // long as a vector.
                    #[allow(unsafe_code)]
                    unsafe {
                        $load(from.as_ptr())
                    }
                }

                #[inline(always)]
                fn store(self, to: &mut [$real]) {
                    let to: &mut [$real; $lanes] =
                        to.first_chunk_mut().expect("a slice of at least LANES elements");
                    // SAFETY: `self` exists, so the processor has the instruction; `to` is as long
                    // as a vector.
                    #[allow(unsafe_code)]
                    unsafe {
                        $store(to.as_mut_ptr(), self)
                    }
                }

                #[inline(always)]
                fn plus(self, other: Self) -> Self {
                    // SAFETY: `self` exists, so the processor has the instruction.
                    #[allow(unsafe_code)]
                    unsafe {
                        $add(self, other)
                    }
                }

                #[inline(always)]
                fn times(self, other: Self) -> Self {
                    // SAFETY: `self` exists, so the processor has the instruction.
                    #[allow(unsafe_code)]
                    unsafe {
                        $mul(self, other)
                    }
                }

                #[inline(always)]
                fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: `self` exists, so the processor has the instruction.
                    #[allow(unsafe_code)]
                    unsafe {
                        $fma(a, b, self)
                    }
                }

                #[inline(always)]
                fn interleave(self, other: Self) -> (Self, Self) {
                    // SAFETY: `self` exists, so the processor has the instructions.
                    #[allow(unsafe_code)]
                    unsafe {
                        $interleave(self, other)
                    }
                }
            }
        };
    }

    vector!(
        __m512,
        f32,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        |a, b| {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b))
        }
    );
    vector!(
        __m512d,
        f64,
        8,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_mul_pd,
        _mm512_fmadd_pd,
        |a, b| {
            let low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
            let high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
            (_mm512_permutex2var_pd(a, low, b), _mm512_permutex2var_pd(a, high, b))
        }
    );
    vector!(
        __m256,
        f32,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        |a, b| {
            let (even, odd) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            (_mm256_permute2f128_ps::<0x20>(even, odd), _mm256_permute2f128_ps::<0x31>(even, odd))
        }
    );
    vector!(
        __m256d,
        f64,
        4,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_mul_pd,
        _mm256_fmadd_pd,
        |a, b| {
            let (even, odd) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
            (_mm256_permute2f128_pd::<0x20>(even, odd), _mm256_permute2f128_pd::<0x31>(even, odd))
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Element;

    fn holds<S: Vector>(zero: S) {
        let real = |at: usize| S::Real::from_f64(at as f64);
        let numbers: Vec<S::Real> = (0..64).map(real).collect();
        let (a, b) = (zero.load(&numbers), zero.load(&numbers[S::LANES..]));
        let (low, high) = a.interleave(b);
        let want: Vec<S::Real> =
            (0..2 * S::LANES).map(|i| real(i / 2 + if i % 2 == 0 { 0 } else { S::LANES })).collect();
        assert_eq!(S::lanes(&[low, high]), want);
        let sum = zero.splat(real(1)).add_product(a, b);
        let want: Vec<S::Real> = (0..S::LANES).map(|i| real(1 + i * (i + S::LANES))).collect();
        assert_eq!(S::lanes(&[sum]), want);
        let mut memory = numbers.clone();
        a.plus(b).store(&mut memory[1..]);
        a.times(b).store(&mut memory[1 + S::LANES..]);
        let (plus, times) = (|i: usize| real(2 * i + S::LANES), |i: usize| real(i * (i + S::LANES)));
        let want: Vec<S::Real> = (0..S::LANES).map(plus).chain((0..S::LANES).map(times)).collect();
        assert_eq!((memory[0], &memory[1..1 + want.len()]), (numbers[0], &want[..]));
        assert!(zero.in_memory(&mut memory).len() >= 64 / S::LANES - 1);
    }

    #[test]
    fn vectors_do_what_they_say() {
        holds([0.0_f32; 4]);
        holds([0.0_f64; 2]);
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::{is_x86_feature_detected, x86_64::*};
            // SAFETY: each vector is created after the instructions of its type were detected.
            #[allow(unsafe_code)]
            unsafe {
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    holds(__m256::zero());
                    holds(__m256d::zero());
                }
                if is_x86_feature_detected!("avx512f") {
                    holds(__m512::zero());
                    holds(__m512d::zero());
                }
            }
        }
    }
}
