//! The options for quantized weights.

use clap::{Args, ValueEnum};
use shardwise::{
    Result,
    kernels::{Activations, Format},
    tensor::WeightSource,
    weights::{Gguf, Packed, Quantization},
};

/// The options for quantized weights. A program's arguments flatten them.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Precision {
    /// Quantize the matrices when they are loaded. Only for a model that is not quantized.
    #[arg(long, value_enum)]
    quantize: Option<Bits>,
    /// Use one scale for each row, not one for 32 weights. Needs `--quantize int8`.
    #[arg(long, requires = "quantize")]
    by_row: bool,
    /// How products with quantized weights treat activations. Only for a quantized model.
    #[arg(long, value_enum)]
    activations: Option<Rounding>,
    /// Load quantized matrices as floating-point numbers.
    #[arg(long, conflicts_with_all = ["quantize", "activations"])]
    dequantize: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Bits {
    /// 8 bits: Q8_0.
    Int8,
    /// 4 bits: Q4_1.
    Int4,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum Rounding {
    /// Round them to 8 bits, with one scale for 32 numbers.
    Int8,
    /// Leave them as they are.
    Exact,
}

impl Precision {
    /// Checks the options for a model.
    pub(super) fn check(&self, quantized: bool) -> Result<(), &'static str> {
        if quantized && self.quantize.is_some() {
            return Err("--quantize: the model is already quantized");
        }
        if !quantized && self.dequantize {
            return Err("--dequantize: the model is not quantized");
        }
        if self.activations.is_some() && !self.leaves_quantized(quantized) {
            return Err("--activations: the model is not quantized, and there is no --quantize");
        }
        if self.by_row && self.quantize == Some(Bits::Int4) {
            return Err("--by-row: --quantize is int4, but only int8 has one scale for each row");
        }
        Ok(())
    }

    /// Whether a rank holds quantized weights of a model.
    pub(super) fn leaves_quantized(&self, quantized: bool) -> bool {
        !self.dequantize && (quantized || self.quantize.is_some())
    }

    /// Whether products with quantized weights round activations to 8 bits.
    pub fn rounds_activations(&self) -> bool {
        self.activations() == Activations::Int8
    }

    fn activations(&self) -> Activations {
        match self.activations {
            Some(Rounding::Int8) => Activations::Int8,
            Some(Rounding::Exact) => Activations::Exact,
            None => Activations::default(),
        }
    }

    /// Applies the options to the weights of a file.
    pub(super) fn of_gguf(&self, gguf: Gguf) -> Gguf {
        let gguf = gguf.with_activations(self.activations());
        if self.dequantize { gguf.dequantized() } else { gguf }
    }

    /// Applies the options to the weights of a quantized folder.
    pub(super) fn of_packed(&self, packed: Packed) -> Packed {
        let packed = packed.with_activations(self.activations());
        if self.dequantize { packed.dequantized() } else { packed }
    }

    /// Runs `run` with the weights of a source, quantized if there is `--quantize`.
    pub(super) fn with_weights<R>(
        &self,
        source: &(dyn WeightSource + Sync),
        run: impl FnOnce(&(dyn WeightSource + Sync)) -> Result<R>,
    ) -> Result<R> {
        let format = match self.quantize {
            None => return run(source),
            Some(Bits::Int8) => Format::Q8_0,
            Some(Bits::Int4) => Format::Q4_1,
        };
        let quantization = Quantization::new(source, format)?.with_activations(self.activations());
        run(&if self.by_row { quantization.by_row()? } else { quantization })
    }
}
