//! The kernels of `cuda/*.cu`, by family. A process compiles and loads them when it first uses a
//! GPU.

use crate::device::DType;

/// A `.cu` file and its kernels.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// The contents of the file.
    pub(super) source: &'static str,
    /// Whether the family's kernels use more than 48 KiB of shared memory.
    pub(super) large_shared_memory: bool,
    /// Whether the compiler may contract a product and a sum to a fused multiply-add, which rounds
    /// only its result. Contraction is faster. But the compiler decides where it contracts, so two
    /// versions of a loop that compute the same may give different bits.
    pub(super) contracts: bool,
    pub(super) kernels: &'static [(Kernel, &'static str, Elements)],
}

/// The element types for which a kernel is compiled.
#[derive(Clone, Copy)]
pub(super) enum Elements {
    /// All four types.
    Each,
    /// The accumulator types, f64 and f32.
    Accumulators,
    /// The types whose accumulator is f32: f32, bf16 and f16.
    SumsInF32,
    /// The types of 16 bits, bf16 and f16.
    Halves,
    /// All pairs of types.
    Pairs,
    /// All pairs of types with the same accumulator.
    SumPairs,
}

impl Elements {
    /// Returns the one or two element types of every compiled variant.
    pub(super) fn all(self) -> Vec<(DType, Option<DType>)> {
        use DType::{BF16, F16, F32, F64};
        let one = |elements: &[DType]| elements.iter().map(|&element| (element, None)).collect::<Vec<_>>();
        let two = |elements: &[DType]| {
            let with = |&first: &DType| elements.iter().map(move |&second| (first, Some(second)));
            elements.iter().flat_map(with).collect::<Vec<_>>()
        };
        match self {
            Self::Each => one(&[F64, F32, BF16, F16]),
            Self::Accumulators => one(&[F64, F32]),
            Self::SumsInF32 => one(&[F32, BF16, F16]),
            Self::Halves => one(&[BF16, F16]),
            Self::Pairs => two(&[F64, F32, BF16, F16]),
            Self::SumPairs => [two(&[F64]), two(&[F32, BF16, F16])].concat(),
        }
    }
}

impl Kernel {
    /// The index of a kernel's variant in a table of all kernels and element types.
    pub(super) fn index(self, first: DType, second: Option<DType>) -> usize {
        (self as usize * 4 + first as usize) * 5 + second.map_or(0, |second| 1 + second as usize)
    }
}

/// The length of the table for [`Kernel::index`].
pub(super) const KERNELS: usize = COUNT * 4 * 5;

macro_rules! kernels {
    ($($family:literal ($($option:ident: $value:literal),*) { $($kernel:ident $stem:literal $elements:ident,)* })*) => {
        /// A kernel, without its element types.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kernel { $($($kernel,)*)* }

        const COUNT: usize = [$($(Kernel::$kernel,)*)*].len();

        /// All families, in descending order of compile time, so that the slowest compiles first.
        pub(crate) static FAMILIES: &[Family] = &[$(Family {
            name: $family,
            source: include_str!(concat!("../../../cuda/", $family, ".cu")),
            $($option: $value,)*
            kernels: &[$((Kernel::$kernel, $stem, Elements::$elements),)*],
        },)*];

        impl Kernel {
            /// Returns the name of the kernel's family.
            pub(super) fn family(self) -> &'static str {
                match self {
                    $($(Self::$kernel)|* => $family,)*
                }
            }
        }
    };
}

kernels! {
    "flash" (large_shared_memory: true, contracts: true) {
        Flash64 "flash_64" Halves,
        Flash128 "flash_128" Halves,
        FlashBackwardQueries64 "flash_backward_queries_64" Halves,
        FlashBackwardQueries128 "flash_backward_queries_128" Halves,
        FlashBackwardKeys64 "flash_backward_keys_64" Halves,
        FlashBackwardKeys128 "flash_backward_keys_128" Halves,
    }
    "attention" (large_shared_memory: true, contracts: true) {
        Attention64 "attention_64" Each,
        Attention128 "attention_128" Each,
        Attention256 "attention_256" Each,
        AttentionBackwardQueries64 "attention_backward_queries_64" Each,
        AttentionBackwardQueries128 "attention_backward_queries_128" Each,
        AttentionBackwardQueries256 "attention_backward_queries_256" Each,
        AttentionBackwardKeys64 "attention_backward_keys_64" Each,
        AttentionBackwardKeys128 "attention_backward_keys_128" Each,
        AttentionBackwardKeys256 "attention_backward_keys_256" Each,
        AttentionDelta "attention_delta" Each,
    }
    "pointwise" (large_shared_memory: false, contracts: false) {
        Activate "activate" Each,
        ActivateBackward "activate_backward" Each,
        Gate "gate" Each,
        GateBackward "gate_backward" Each,
        Add "add" Each,
        Mul "mul" Each,
        ScaleRows "scale_rows" Each,
        DotRows "dot_rows" Each,
        AddBias "add_bias" Each,
        Scale "scale" Each,
        Fill "fill" Each,
        Accumulate "accumulate" SumPairs,
        Copy "copy" Pairs,
        CopyStrided "copy_strided" Each,
        ColumnRuns "column_runs" Each,
        ColumnSums "column_sums" Accumulators,
        Reduce "reduce" Each,
    }
    "loss" (large_shared_memory: false, contracts: false) {
        RowMax "row_max" Each,
        ExpSums "exp_sums" Each,
        CrossEntropy "cross_entropy" Accumulators,
        CrossEntropyBackward "cross_entropy_backward" Each,
        SquaredError "squared_error" Each,
        SquaredErrorBackward "squared_error_backward" Each,
    }
    "norm" (large_shared_memory: false, contracts: false) {
        Normalize "normalize" Each,
        NormalizeBackward "normalize_backward" Each,
        NormalizeColumns "normalize_columns" Each,
    }
    "quantized" (large_shared_memory: false, contracts: false) {
        Dequantize "dequantize" Each,
        QuantizedProduct "quantized_product" Each,
        QuantizeRows "quantize_rows" SumsInF32,
        WidenRows "widen_rows" SumsInF32,
    }
    "update" (large_shared_memory: false, contracts: false) {
        Sgd "sgd" Each,
        AdamW "adamw" Each,
        SquareSums "square_sums" Each,
    }
    "dropout" (large_shared_memory: false, contracts: false) {
        Dropout "dropout" Each,
    }
    "gather" (large_shared_memory: false, contracts: false) {
        Gather "gather" Each,
        ScatterAdd "scatter_add" Each,
    }
    "decode" (large_shared_memory: false, contracts: false) {
        Decode64 "decode_64" Each,
        Decode128 "decode_128" Each,
        Decode256 "decode_256" Each,
        Combine "combine" Each,
        Append "append" Each,
    }
    "rope" (large_shared_memory: false, contracts: false) {
        Rope "rope" Each,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_kernel_has_an_index_of_its_own() {
        let all = FAMILIES.iter().flat_map(|family| family.kernels);
        let indices: Vec<_> = all
            .flat_map(|&(kernel, _, elements)| elements.all().into_iter().map(move |of| (kernel, of)))
            .map(|(kernel, (first, second))| kernel.index(first, second))
            .collect();
        assert_eq!(indices.iter().collect::<HashSet<_>>().len(), indices.len());
        assert!(indices.iter().all(|&index| index < KERNELS));
    }

    /// A macro in the sources appends the element type's name to a kernel's name.
    #[test]
    fn every_kernel_of_every_file_is_listed() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        assert_eq!(
            files.filter(|path| path.extension().is_some_and(|end| end == "cu")).count(),
            FAMILIES.len(),
            "a family is missing"
        );
        for family in FAMILIES {
            let declared = family.source.split("__global__ void ").skip(1);
            let names = declared
                .map(|rest| {
                    rest.strip_prefix("__launch_bounds__(")
                        .map_or(rest, |rest| rest.split_once(") ").unwrap().1)
                })
                .map(|rest| rest.split('(').next().unwrap());
            let stems: HashSet<&str> = names.map(|name| name.split("_##").next().unwrap()).collect();
            for stem in &stems {
                let known = family.kernels.iter().any(|(_, known, _)| {
                    known.trim_end_matches(|character: char| character.is_ascii_digit()).trim_end_matches('_')
                        == *stem
                });
                assert!(known, "{}: {stem}", family.name);
            }
            assert!(!stems.is_empty(), "{}", family.name);
        }
    }
}
