//! Placements as types: how the ranks of a group hold one tensor.
//!
//! The names follow PyTorch's `DTensor`. As in Megatron-LM's `mappings.py`, the placement of a
//! value determines the placement of its gradient. Only the distinction between [`Replicated`] and
//! [`Copied`] is new. All ranks use a `Replicated` value in the same way, so its gradient is equal
//! on every rank. Each rank uses a `Copied` value differently, so each rank has one term of its
//! gradient.

/// How the ranks of one group hold one tensor. The four markers of this module implement it.
///
/// The trait is sealed, because the guarantees of the layers' types assume these four placements.
/// [`Elementwise`] and `ResidualStream` are sealed for the same reason.
///
/// | placement | each rank holds | `Dual`, the placement of the gradient |
/// |---|---|---|
/// | [`Replicated`] | the value, used in the same way by all | `Replicated` |
/// | [`Copied`] | the value, used differently by each | `Partial` |
/// | [`Shard<D>`] | its shard of dimension `D` | `Shard<D>` |
/// | [`Partial`] | a term; the sum of the terms is the value | `Copied` |
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a placement",
    note = "a placement is `Replicated`, `Copied`, `Shard<D>` or `Partial`"
)]
pub trait Placement: sealed::Sealed + Sized + 'static {
    /// The placement of the gradient.
    type Dual: Placement<Dual = Self>;
    /// The sharded dimension, if there is one.
    const SHARD_DIM: Option<usize> = None;
    /// The name of the placement in error messages.
    const NAME: &'static str;
}

mod sealed {
    /// The placements.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` cannot be a placement: the only placements are those of `shardwise::shard`"
    )]
    pub trait Sealed {}

    impl Sealed for super::Replicated {}
    impl Sealed for super::Copied {}
    impl<const D: usize> Sealed for super::Shard<D> {}
    impl Sealed for super::Partial {}
}

/// Every rank holds the same value, and the same gradient.
#[derive(Clone, Copy, Debug)]
pub enum Replicated {}

/// Every rank holds the same value, but uses it differently. The gradient is a [`Partial`] sum.
#[derive(Clone, Copy, Debug)]
pub enum Copied {}

/// Each rank holds its shard of dimension `D`.
#[derive(Clone, Copy, Debug)]
pub enum Shard<const D: usize> {}

/// Each rank holds one term; the value is the sum over the ranks. Only linear operators accept this
/// placement.
#[derive(Clone, Copy, Debug)]
pub enum Partial {}

impl Placement for Replicated {
    type Dual = Replicated;
    const NAME: &'static str = "Replicated";
}

impl Placement for Copied {
    type Dual = Partial;
    const NAME: &'static str = "Copied";
}

impl<const D: usize> Placement for Shard<D> {
    type Dual = Shard<D>;
    const SHARD_DIM: Option<usize> = Some(D);
    const NAME: &'static str = "Shard";
}

impl Placement for Partial {
    type Dual = Copied;
    const NAME: &'static str = "Partial";
}

/// The placements that non-linear functions accept, because each rank's elements are final values.
///
/// In general f(a + b) ≠ f(a) + f(b), so a [`Partial`] sum must be reduced before a non-linear f.
/// Otherwise the program does not compile.
#[diagnostic::on_unimplemented(
    message = "a non-linear operator cannot act on a `{Self}` tensor: it would see one rank's term, not the sum",
    label = "this operator needs final values",
    note = "reduce the sum first: `ReduceFrom` (all-reduce) or `ReduceScatterSequence` (reduce-scatter)"
)]
pub trait Elementwise: Placement {}

impl Elementwise for Replicated {}
impl Elementwise for Copied {}
impl<const D: usize> Elementwise for Shard<D> {}
