//! Placements as types: how the ranks of a group hold one tensor.
//!
//! The names and the rule "the gradient's placement follows from the value's" are those of PyTorch's `DTensor` and of
//! Megatron-LM's `mappings.py`, with one distinction both leave to the programmer: [`Replicated`] (equal everywhere,
//! and used equally everywhere) against [`Copied`] (equal everywhere, but each rank does something else with it). The
//! gradient of the first is equal on every rank; that of the second is a term of a sum.

/// How the ranks of one group hold one tensor; implemented by the four markers of this module.
///
/// Sealed: what the types of layers prove rests on there being these four. So [`Elementwise`] and a
/// residual stream are closed, too.
///
/// | placement | the ranks hold | `Dual`, the placement of its gradient |
/// |---|---|---|
/// | [`Replicated`] | the same value, used in the same way | `Replicated` |
/// | [`Copied`] | the same value, used by each in its own way | `Partial` |
/// | [`Shard<D>`] | each its part of dimension `D` | `Shard<D>` |
/// | [`Partial`] | terms whose sum is the value | `Copied` |
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a placement",
    note = "a placement is `Replicated`, `Copied`, `Shard<D>` or `Partial`"
)]
pub trait Placement: sealed::Sealed + Sized + 'static {
    /// How the ranks hold the gradient of a tensor that is held like this.
    type Dual: Placement<Dual = Self>;
    /// The dimension that is cut, if one is.
    const CUT: Option<usize> = None;
    /// The name that messages use.
    const NAME: &'static str;
}

mod sealed {
    /// The placements.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` cannot be made a placement: there are only those of `shard`"
    )]
    pub trait Sealed {}

    impl Sealed for super::Replicated {}
    impl Sealed for super::Copied {}
    impl<const D: usize> Sealed for super::Shard<D> {}
    impl Sealed for super::Partial {}
}

/// Equal on every rank, and so is its gradient.
#[derive(Clone, Copy, Debug)]
pub enum Replicated {}

/// Equal on every rank, about to be used differently by each; its gradient is a [`Partial`] sum.
#[derive(Clone, Copy, Debug)]
pub enum Copied {}

/// Each rank holds its part of dimension `D`.
#[derive(Clone, Copy, Debug)]
pub enum Shard<const D: usize> {}

/// The value is the sum of what the ranks hold. Only linear operators may act on it.
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
    const CUT: Option<usize> = Some(D);
    const NAME: &'static str = "Shard";
}

impl Placement for Partial {
    type Dual = Copied;
    const NAME: &'static str = "Partial";
}

/// Placements under which each rank's elements are final values, so that a non-linear function may act on them.
///
/// `f(a + b) ≠ f(a) + f(b)`: a [`Partial`] sum has to be reduced first, and the compiler says so.
#[diagnostic::on_unimplemented(
    message = "a non-linear operator cannot act on a `{Self}` tensor: it would see one rank's term, not the sum",
    label = "this operator needs final values",
    note = "reduce the sum first: `ReduceFrom` (all-reduce) or `ReduceScatterSequence` (reduce-scatter)"
)]
pub trait Elementwise: Placement {}

impl Elementwise for Replicated {}
impl Elementwise for Copied {}
impl<const D: usize> Elementwise for Shard<D> {}
