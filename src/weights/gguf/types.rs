//! The types of the elements of tensors in GGUF files.

use crate::{device::DType, kernels::Format};

/// How this crate reads a type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Encoding {
    Float(DType),
    Blocks(Format),
}

/// A type of ggml: `weights` elements of a row take `bytes` bytes.
#[derive(Clone, Copy)]
pub(super) struct Type {
    pub(super) name: &'static str,
    pub(super) weights: usize,
    pub(super) bytes: usize,
    /// `None` if this crate cannot read the type.
    pub(super) encoding: Option<Encoding>,
}

impl Type {
    /// Returns the type with this number (`enum ggml_type`), or `None` if it is not known.
    pub(super) fn of(number: u32) -> Option<Self> {
        let float = |name, dtype: DType| {
            let encoding = Some(Encoding::Float(dtype));
            Some(Self { name, weights: 1, bytes: dtype.size(), encoding })
        };
        let blocks = |name, format: Format| {
            let encoding = Some(Encoding::Blocks(format));
            Some(Self { name, weights: format.weights(), bytes: format.bytes(), encoding })
        };
        let other = |name, weights, bytes| Some(Self { name, weights, bytes, encoding: None });
        match number {
            0 => float("F32", DType::F32),
            1 => float("F16", DType::F16),
            2 => blocks("Q4_0", Format::Q4_0),
            3 => blocks("Q4_1", Format::Q4_1),
            6 => blocks("Q5_0", Format::Q5_0),
            7 => blocks("Q5_1", Format::Q5_1),
            8 => blocks("Q8_0", Format::Q8_0),
            9 => other("Q8_1", 32, 36),
            10 => other("Q2_K", 256, 84),
            11 => other("Q3_K", 256, 110),
            12 => blocks("Q4_K", Format::Q4K),
            13 => blocks("Q5_K", Format::Q5K),
            14 => blocks("Q6_K", Format::Q6K),
            15 => other("Q8_K", 256, 292),
            16 => other("IQ2_XXS", 256, 66),
            17 => other("IQ2_XS", 256, 74),
            18 => other("IQ3_XXS", 256, 98),
            19 => other("IQ1_S", 256, 50),
            20 => other("IQ4_NL", 32, 18),
            21 => other("IQ3_S", 256, 110),
            22 => other("IQ2_S", 256, 82),
            23 => other("IQ4_XS", 256, 136),
            24 => other("I8", 1, 1),
            25 => other("I16", 1, 2),
            26 => other("I32", 1, 4),
            27 => other("I64", 1, 8),
            28 => float("F64", DType::F64),
            29 => other("IQ1_M", 256, 56),
            30 => float("BF16", DType::BF16),
            34 => other("TQ1_0", 256, 54),
            35 => other("TQ2_0", 256, 66),
            39 => other("MXFP4", 32, 17),
            40 => other("NVFP4", 64, 36),
            41 => other("Q1_0", 128, 18),
            _ => None,
        }
    }
}
