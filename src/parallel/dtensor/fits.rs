//! The bound that two placements are equal. Its error message names the missing mapping.

use super::DTensor;
use crate::{
    device::{Device, Element},
    shard::Placement,
};

/// `P: Fits<In>`: `P` and `In` are the same placement. Every placement fits itself and no other.
///
/// Bounds use this trait instead of an equality of types, because rustc then prints the message
/// below, which names the missing mapping.
#[diagnostic::on_unimplemented(
    message = "a tensor held as `{Self}` is given where one held as `{In}` is taken",
    label = "takes `{In}`, but is given `{Self}`",
    note = "a mapping between them changes the placement: `CopyTo` from `Replicated` to `Copied`; `ReduceFrom` from `Partial` to `Replicated`",
    note = "`GatherFrom::<D>` from `Shard<D>` to `Replicated`; `ScatterTo::<D>::even()` from `Replicated` to `Shard<D>`",
    note = "with sequence parallelism, `GatherSequence` from `Shard<0>` to `Copied`; `ReduceScatterSequence` from `Partial` to `Shard<0>`",
    note = "a `RowParallelLinear` goes from `Shard<1>` back to a residual stream, a `ColumnParallelLinear` from there to `Shard<1>`"
)]
pub trait Fits<In: Placement>: Placement {
    /// Returns the tensor unchanged.
    fn fit<T: Element, B: Device>(x: DTensor<Self, T, B>) -> DTensor<In, T, B>;

    /// Returns the gradient unchanged.
    fn fit_grad<T: Element, B: Device>(dx: DTensor<In::Dual, T, B>) -> DTensor<Self::Dual, T, B>;
}

impl<P: Placement> Fits<P> for P {
    fn fit<T: Element, B: Device>(x: DTensor<P, T, B>) -> DTensor<P, T, B> {
        x
    }

    fn fit_grad<T: Element, B: Device>(dx: DTensor<P::Dual, T, B>) -> DTensor<P::Dual, T, B> {
        dx
    }
}
