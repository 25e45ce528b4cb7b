//! AVX2 and AVX-512-VNNI vectors for products with quantized weights.
//!
//! The functions use no closures: a closure does not inherit the instructions of the function that
//! it is inlined into.

use super::{
    lanes::Lanes,
    panel::{Line, ROWS},
};
use crate::device::Kernel;
use std::arch::{is_x86_feature_detected, x86_64::*};

/// Proof that the processor has AVX-512 F, BW, VL and VNNI.
#[derive(Clone, Copy)]
pub(super) struct Vnni(());

impl Vnni {
    /// Returns the proof if the processor has the instructions.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        has.then_some(Self(()))
    }
}

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// Returns the proof if the processor has the instructions.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

/// Calls intrinsics whose instructions a proof `self` shows to be there.
macro_rules! proven {
    ($self:ident, $body:expr) => {{
        let _ = $self;
        // SAFETY: `self` exists, so `detect` found the instructions. Pointers are those of
        // references to as many bytes as the intrinsic reads or writes.
        #[allow(unsafe_code)]
        unsafe {
            $body
        }
    }};
}

impl Lanes for Vnni {
    type Codes = __m512i;
    type Ints = __m512i;
    type Floats = __m512;

    const TOKENS: usize = 8;
    const BYTES_ARE_SIGNED: bool = false;

    #[inline(always)]
    fn nibbles(self, line: &Line, high: bool) -> __m512i {
        proven!(self, {
            let bytes = _mm512_load_si512(line.0.as_ptr().cast());
            let bytes = if high { _mm512_srli_epi16::<4>(bytes) } else { bytes };
            _mm512_and_si512(bytes, _mm512_set1_epi8(15))
        })
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> __m512i {
        proven!(self, _mm512_load_si512(line.0.as_ptr().cast()))
    }

    #[inline(always)]
    fn with_bit(self, codes: __m512i, mask: u64, bit: u8) -> __m512i {
        proven!(self, _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(bit as i8)))
    }

    #[inline(always)]
    fn dot(self, sums: __m512i, codes: __m512i, x: i32) -> __m512i {
        proven!(self, _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn dot_bytes(self, sums: __m512i, codes: __m512i, x: i32) -> __m512i {
        self.dot(sums, codes, x)
    }

    #[inline(always)]
    fn e4m3(self, line: &Line, column: usize) -> __m512 {
        proven!(self, {
            let codes = _mm512_load_si512(line.0.as_ptr().cast());
            // The code becomes the highest byte.
            let codes = match column {
                0 => _mm512_slli_epi32::<24>(codes),
                1 => _mm512_slli_epi32::<16>(codes),
                2 => _mm512_slli_epi32::<8>(codes),
                _ => codes,
            };
            // As `format::e4m3`.
            let size = _mm512_and_si512(_mm512_srli_epi32::<4>(codes), _mm512_set1_epi32(0x7f << 20));
            let subnormal = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8 << 20));
            let normal = _mm512_castsi512_ps(_mm512_add_epi32(size, _mm512_set1_epi32(120 << 23)));
            let (two, less) = (_mm512_set1_ps(2.0), _mm512_set1_ps(-0.015625));
            let size = _mm512_castps_si512(_mm512_mask_fmadd_ps(normal, subnormal, two, less));
            let sign = _mm512_and_si512(codes, _mm512_set1_epi32(i32::MIN));
            _mm512_castsi512_ps(_mm512_or_si512(size, sign))
        })
    }

    #[inline(always)]
    fn int(self, value: i32) -> __m512i {
        proven!(self, _mm512_set1_epi32(value))
    }

    #[inline(always)]
    fn widen(self, bytes: &[u8; ROWS]) -> __m512i {
        proven!(self, _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn widen_unsigned(self, bytes: &[u8; ROWS]) -> __m512i {
        proven!(self, _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn add_ints(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(self, _mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn subtract_ints(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(self, _mm512_sub_epi32(a, b))
    }

    #[inline(always)]
    fn multiply_ints(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(self, _mm512_mullo_epi32(a, b))
    }

    #[inline(always)]
    fn to_floats(self, ints: __m512i) -> __m512 {
        proven!(self, _mm512_cvtepi32_ps(ints))
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 2 * ROWS]) -> __m512 {
        proven!(self, _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn floats(self, bytes: &[u8; 4 * ROWS]) -> __m512 {
        proven!(self, _mm512_loadu_ps(bytes.as_ptr().cast()))
    }

    #[inline(always)]
    fn float(self, value: f32) -> __m512 {
        proven!(self, _mm512_set1_ps(value))
    }

    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        proven!(self, _mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn multiply_add(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        proven!(self, _mm512_fmadd_ps(a, b, sum))
    }

    #[inline(always)]
    fn store(self, floats: __m512) -> [f32; ROWS] {
        let mut to = [0.0; ROWS];
        proven!(self, _mm512_storeu_ps(to.as_mut_ptr(), floats));
        to
    }
}

impl Lanes for Avx2 {
    type Codes = [__m256i; 2];
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];

    const TOKENS: usize = 2;
    const BYTES_ARE_SIGNED: bool = true;

    #[inline(always)]
    fn nibbles(self, line: &Line, high: bool) -> [__m256i; 2] {
        let [a, b] = self.bytes(line);
        proven!(self, {
            let (a, b) = if high { (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)) } else { (a, b) };
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)]
        })
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> [__m256i; 2] {
        let (a, b) = line.0.split_at(32);
        proven!(self, [_mm256_load_si256(a.as_ptr().cast()), _mm256_load_si256(b.as_ptr().cast())])
    }

    #[inline(always)]
    fn with_bit(self, codes: [__m256i; 2], mask: u64, bit: u8) -> [__m256i; 2] {
        proven!(self, {
            // Byte i gets the byte of the mask that has bit i, and selects this bit.
            let bytes =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let value = _mm256_set1_epi8(bit as i8);
            let low = _mm256_shuffle_epi8(_mm256_set1_epi32(mask as i32), bytes);
            let high = _mm256_shuffle_epi8(_mm256_set1_epi32((mask >> 32) as i32), bytes);
            let low = _mm256_cmpeq_epi8(_mm256_and_si256(low, bits), bits);
            let high = _mm256_cmpeq_epi8(_mm256_and_si256(high, bits), bits);
            [
                _mm256_or_si256(codes[0], _mm256_and_si256(low, value)),
                _mm256_or_si256(codes[1], _mm256_and_si256(high, value)),
            ]
        })
    }

    /// The sums of two products have at most 2 · 63 · 127 < 2¹⁵, so `maddubs` does not saturate.
    #[inline(always)]
    fn dot(self, sums: [__m256i; 2], codes: [__m256i; 2], x: i32) -> [__m256i; 2] {
        proven!(self, {
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            let a = _mm256_madd_epi16(_mm256_maddubs_epi16(codes[0], x), ones);
            let b = _mm256_madd_epi16(_mm256_maddubs_epi16(codes[1], x), ones);
            [_mm256_add_epi32(sums[0], a), _mm256_add_epi32(sums[1], b)]
        })
    }

    /// Multiplies |code| by x with the sign of the code. The sums of two products have at most
    /// 2 · 128 · 127 < 2¹⁵, also for the code −128.
    #[inline(always)]
    fn dot_bytes(self, sums: [__m256i; 2], codes: [__m256i; 2], x: i32) -> [__m256i; 2] {
        proven!(self, {
            let (x, ones, flip) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1), _mm256_set1_epi8(-128));
            let (a, b) = (_mm256_xor_si256(codes[0], flip), _mm256_xor_si256(codes[1], flip));
            let a = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(x, a));
            let b = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(x, b));
            let (a, b) = (_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
            [_mm256_add_epi32(sums[0], a), _mm256_add_epi32(sums[1], b)]
        })
    }

    #[inline(always)]
    fn e4m3(self, line: &Line, column: usize) -> [__m256; 2] {
        let [a, b] = self.bytes(line);
        [self.half_e4m3(a, column), self.half_e4m3(b, column)]
    }

    #[inline(always)]
    fn int(self, value: i32) -> [__m256i; 2] {
        proven!(self, [_mm256_set1_epi32(value); 2])
    }

    #[inline(always)]
    fn widen(self, bytes: &[u8; ROWS]) -> [__m256i; 2] {
        let (a, b) = bytes.split_at(ROWS / 2);
        proven!(self, {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(a.as_ptr().cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(b.as_ptr().cast())),
            ]
        })
    }

    #[inline(always)]
    fn widen_unsigned(self, bytes: &[u8; ROWS]) -> [__m256i; 2] {
        let (a, b) = bytes.split_at(ROWS / 2);
        proven!(self, {
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(a.as_ptr().cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(b.as_ptr().cast())),
            ]
        })
    }

    #[inline(always)]
    fn add_ints(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        proven!(self, [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn subtract_ints(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        proven!(self, [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn multiply_ints(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        proven!(self, [_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])])
    }

    #[inline(always)]
    fn to_floats(self, ints: [__m256i; 2]) -> [__m256; 2] {
        proven!(self, [_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1])])
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 2 * ROWS]) -> [__m256; 2] {
        let (a, b) = bytes.split_at(ROWS);
        proven!(self, {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(a.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(b.as_ptr().cast())),
            ]
        })
    }

    #[inline(always)]
    fn floats(self, bytes: &[u8; 4 * ROWS]) -> [__m256; 2] {
        let (a, b) = bytes.split_at(2 * ROWS);
        proven!(self, [_mm256_loadu_ps(a.as_ptr().cast()), _mm256_loadu_ps(b.as_ptr().cast())])
    }

    #[inline(always)]
    fn float(self, value: f32) -> [__m256; 2] {
        proven!(self, [_mm256_set1_ps(value); 2])
    }

    #[inline(always)]
    fn multiply(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        proven!(self, [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn multiply_add(self, a: [__m256; 2], b: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
        proven!(self, [_mm256_fmadd_ps(a[0], b[0], sum[0]), _mm256_fmadd_ps(a[1], b[1], sum[1])])
    }

    #[inline(always)]
    fn store(self, floats: [__m256; 2]) -> [f32; ROWS] {
        let mut to = [0.0; ROWS];
        let (a, b) = to.split_at_mut(ROWS / 2);
        proven!(self, {
            _mm256_storeu_ps(a.as_mut_ptr(), floats[0]);
            _mm256_storeu_ps(b.as_mut_ptr(), floats[1]);
        });
        to
    }
}

impl Avx2 {
    /// [`Lanes::e4m3`] of 8 rows.
    #[inline(always)]
    fn half_e4m3(self, codes: __m256i, column: usize) -> __m256 {
        proven!(self, {
            // The code becomes the highest byte.
            let codes = match column {
                0 => _mm256_slli_epi32::<24>(codes),
                1 => _mm256_slli_epi32::<16>(codes),
                2 => _mm256_slli_epi32::<8>(codes),
                _ => codes,
            };
            // As `format::e4m3`.
            let size = _mm256_and_si256(_mm256_srli_epi32::<4>(codes), _mm256_set1_epi32(0x7f << 20));
            let subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(8 << 20), size);
            let normal = _mm256_castsi256_ps(_mm256_add_epi32(size, _mm256_set1_epi32(120 << 23)));
            let (two, less) = (_mm256_set1_ps(2.0), _mm256_set1_ps(-0.015625));
            let small = _mm256_fmadd_ps(normal, two, less);
            let size = _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(subnormal));
            let sign = _mm256_and_si256(codes, _mm256_set1_epi32(i32::MIN));
            _mm256_or_ps(size, _mm256_castsi256_ps(sign))
        })
    }
}

/// Runs a kernel compiled for AVX-512-VNNI.
pub(super) fn with_vnni<K: Kernel>(proof: Vnni, kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn compute<K: Kernel>(kernel: K) -> K::Output {
        kernel.compute()
    }
    proven!(proof, compute(kernel))
}

/// Runs a kernel compiled for AVX2, FMA and F16C.
pub(super) fn with_avx2<K: Kernel>(proof: Avx2, kernel: K) -> K::Output {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn compute<K: Kernel>(kernel: K) -> K::Output {
        kernel.compute()
    }
    proven!(proof, compute(kernel))
}
