//! The CPU's kernels, compiled into this crate.
//!
//! A crate compiles the generic functions that it calls, except those that are `#[inline(never)]`
//! and already compiled in a dependency. The kernels are `#[inline(never)]`, and this module
//! instantiates them for every element, so that programs only link to them.

use super::{Attention, Dropout, Gather, Gemm, Loss, Norm, Pointwise, Quantized, Rope, Update};
use crate::device::{Accumulator, Cpu, Element};
use half::{bf16, f16};

macro_rules! pointers {
    ($($kernel:expr),* $(,)?) => { [$($kernel as *const ()),*] };
}

/// The addresses of the kernels. The function is public, so that rustc has to compile the kernels
/// in this crate.
#[doc(hidden)]
pub fn compiled() -> Vec<*const ()> {
    let of = [of_element::<f64>(), of_element::<f32>(), of_element::<bf16>(), of_element::<f16>()];
    [of.concat(), of_accumulator::<f64>(), of_accumulator::<f32>()].concat()
}

fn of_element<T: Element>() -> Vec<*const ()> {
    let kernels = pointers![
        Cpu::attention::<T>,
        Cpu::attention_backward::<T>,
        Cpu::append_cached::<T>,
        Cpu::attention_cached::<T>,
        Cpu::dropout::<T>,
        Cpu::gather::<T>,
        Cpu::scatter_add::<T>,
        Cpu::gemm_batched::<T, T>,
        Cpu::gemm_batched::<T, T::Acc>,
        Cpu::gemm_all::<T, T>,
        Cpu::gemm_all::<T, T::Acc>,
        Cpu::gemm_tree::<T>,
        Cpu::linear::<T>,
        Cpu::linear_dx::<T>,
        Cpu::row_max::<T>,
        Cpu::exp_sums::<T>,
        Cpu::cross_entropy_backward::<T>,
        Cpu::squared_error::<T>,
        Cpu::squared_error_backward::<T>,
        Cpu::normalize::<T>,
        Cpu::normalize_backward::<T>,
        Cpu::activate::<T>,
        Cpu::activate_backward::<T>,
        Cpu::gate::<T>,
        Cpu::gate_backward::<T>,
        Cpu::add::<T>,
        Cpu::mul::<T>,
        Cpu::scale_rows::<T>,
        Cpu::dot_rows::<T>,
        Cpu::accumulate::<T, T>,
        Cpu::accumulate::<T, T::Acc>,
        Cpu::accumulate::<T::Acc, T>,
        Cpu::add_bias::<T>,
        Cpu::sum_rows::<T>,
        Cpu::copy::<T, T>,
        Cpu::copy::<T, T::Acc>,
        Cpu::copy::<T::Acc, T>,
        Cpu::scale::<T>,
        Cpu::fill::<T>,
        Cpu::quantized_product::<T, T>,
        Cpu::quantized_product::<T, T::Acc>,
        Cpu::dequantize::<T>,
        Cpu::rope::<T>,
        Cpu::sgd::<T>,
        Cpu::adamw::<T>,
        Cpu::square_sums::<T>,
    ];
    kernels.into()
}

fn of_accumulator<A: Accumulator>() -> Vec<*const ()> {
    pointers![Cpu::cross_entropy::<A>].into()
}
