//! Calls in which ranks disagree, for the tests of every communicator.

use crate::dev::{Dev, Tensor};
use half::{bf16, f16};
use shardwise::{
    Result,
    comm::{Group, ReduceOp},
    device::Element,
    shard::{Partition, Shape},
};

/// A call of the odd rank or of the other ranks.
pub(crate) type Act = fn(&Group<Dev>) -> Result<()>;

/// Runs a collective on a buffer filled with the rank's number plus 1. Asserts that a failed
/// collective leaves the buffer unchanged.
pub(crate) fn attempt<T: Element>(
    group: &Group<Dev>,
    dims: &[usize],
    collective: impl FnOnce(&mut Tensor<T>) -> Result<()>,
) -> Result<()> {
    let own = group.rank() as f64 + 1.0;
    let mut x = Tensor::full(group.device(), dims, own)?;
    let result = collective(&mut x);
    if result.is_err() {
        assert!(x.to_vec()?.iter().all(|value| value.to_f64() == own), "the buffer has changed");
    }
    result
}

pub(crate) fn reduce<T: Element>(group: &Group<Dev>, op: ReduceOp, dims: &[usize]) -> Result<()> {
    attempt::<T>(group, dims, |x| group.all_reduce(op, x))
}

pub(crate) fn broadcast(group: &Group<Dev>, root: usize, len: usize) -> Result<()> {
    attempt::<f32>(group, &[len], |x| group.broadcast(root, x))
}

/// Gathers a `[12, 12]` tensor.
pub(crate) fn gather(group: &Group<Dev>, dim: usize, partition: &Partition) -> Result<()> {
    let part = Shape::new(&[12, 12]).with(dim, partition.size(group.rank()));
    attempt::<f32>(group, part.dims(), |x| group.all_gather(x, dim, partition).map(drop))
}

/// Reduces and scatters a `[12, 12]` tensor.
pub(crate) fn scatter(group: &Group<Dev>, op: ReduceOp, dim: usize, partition: &Partition) -> Result<()> {
    attempt::<f32>(group, &[12, 12], |x| group.reduce_scatter(op, x, dim, partition).map(drop))
}

pub(crate) fn even(group: &Group<Dev>) -> Partition {
    Partition::even(12, group.size())
}

/// A partition in which rank 0 has the largest shard.
pub(crate) fn slanted(group: &Group<Dev>) -> Partition {
    let size = group.size();
    Partition::from_sizes((0..size).map(|rank| if rank == 0 { 13 - size } else { 1 }))
}

pub(crate) fn started(group: &Group<Dev>, op: ReduceOp, len: usize) -> Result<()> {
    let x = Tensor::<f32>::zeros(group.device(), [len])?;
    group.start_all_reduce(op, x)?.wait().map(drop)
}

/// The call of all ranks but one, the call of the odd rank, and both calls' descriptions in the
/// error.
pub(crate) const DISAGREEMENTS: &[(Act, Act, &str, &str)] = &[
    // The odd rank makes an additional started call. No rank waits for this call, so only the
    // sequence numbers differ.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| {
            drop(group.start_all_reduce(ReduceOp::Sum, Tensor::<f32>::zeros(group.device(), [6])?)?);
            reduce::<f32>(group, ReduceOp::Sum, &[6])
        },
        "all_reduce(sum, f32 [6], call 0)",
        "all_reduce(sum, f32 [6], call 1)",
    ),
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]).and_then(|()| group.barrier()),
        |group| {
            reduce::<f32>(group, ReduceOp::Sum, &[6])?;
            reduce::<f32>(group, ReduceOp::Sum, &[6])?;
            group.barrier()
        },
        "barrier(call 1)",
        "all_reduce(sum, f32 [6], call 1)",
    ),
    // The odd rank calls a different operation.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| broadcast(group, 0, 6),
        "all_reduce(",
        "broadcast(",
    ),
    (
        |group| gather(group, 0, &even(group)),
        |group| scatter(group, ReduceOp::Sum, 0, &even(group)),
        "all_gather(",
        "reduce_scatter(",
    ),
    (|group| group.barrier(), |group| group.split(Some(0), 0).map(drop), "barrier(", "split("),
    (
        |group| group.barrier(),
        |group| reduce::<f64>(group, ReduceOp::Max, &[100_000]),
        "barrier(",
        "all_reduce(max",
    ),
    // The odd rank passes different arguments.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| reduce::<f32>(group, ReduceOp::Max, &[6]),
        "all_reduce(sum",
        "all_reduce(max",
    ),
    (
        |group| scatter(group, ReduceOp::Max, 0, &even(group)),
        |group| scatter(group, ReduceOp::Min, 0, &even(group)),
        "reduce_scatter(max",
        "reduce_scatter(min",
    ),
    (|group| broadcast(group, 0, 6), |group| broadcast(group, 1, 6), "root 0", "root 1"),
    (|group| broadcast(group, 0, 50_000), |group| broadcast(group, 1, 50_000), "root 0", "root 1"),
    // The odd rank has a different element type. In some cases both types have the same size.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| reduce::<bf16>(group, ReduceOp::Sum, &[6]),
        "f32 [6]",
        "bf16 [6]",
    ),
    (
        |group| reduce::<bf16>(group, ReduceOp::Sum, &[9000]),
        |group| reduce::<f16>(group, ReduceOp::Sum, &[9000]),
        "bf16 [9000]",
        "f16 [9000]",
    ),
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| reduce::<f64>(group, ReduceOp::Sum, &[3]),
        "f32 [6]",
        "f64 [3]",
    ),
    // The odd rank has a different shape. In some cases both shapes have the same number of
    // elements.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[2, 3]),
        |group| reduce::<f32>(group, ReduceOp::Sum, &[3, 2]),
        "f32 [2, 3]",
        "f32 [3, 2]",
    ),
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6, 1]),
        "f32 [6]",
        "f32 [6, 1]",
    ),
    (|group| broadcast(group, 1, 6), |group| broadcast(group, 1, 7), "f32 [6]", "f32 [7]"),
    // One payload is within the eager limit, and the other exceeds it.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[4096]),
        |group| reduce::<f32>(group, ReduceOp::Sum, &[4097]),
        "f32 [4096]",
        "f32 [4097]",
    ),
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[100_000]),
        |group| reduce::<f32>(group, ReduceOp::Sum, &[0]),
        "f32 [100000]",
        "f32 [0]",
    ),
    // The odd rank has a different partition, or partitions a different dimension.
    (
        |group| gather(group, 0, &even(group)),
        |group| gather(group, 0, &slanted(group)),
        "partition ",
        "partition ",
    ),
    (
        |group| gather(group, 0, &even(group)),
        |group| gather(group, 1, &even(group)),
        "partition ",
        "partition ",
    ),
    (
        |group| scatter(group, ReduceOp::Sum, 1, &even(group)),
        |group| scatter(group, ReduceOp::Sum, 1, &slanted(group)),
        "partition ",
        "partition ",
    ),
    (
        |group| scatter(group, ReduceOp::Sum, 1, &even(group)),
        |group| scatter(group, ReduceOp::Sum, 0, &even(group)),
        "partition ",
        "partition ",
    ),
    // Started collectives. Thread ranks find the disagreement at the wait.
    (
        |group| started(group, ReduceOp::Sum, 6),
        |group| started(group, ReduceOp::Min, 6),
        "start_all_reduce(sum",
        "start_all_reduce(min",
    ),
    (
        |group| started(group, ReduceOp::Sum, 9000),
        |group| started(group, ReduceOp::Sum, 9),
        "f32 [9000]",
        "f32 [9]",
    ),
    // The odd rank starts the collective, and the others make a blocking call. The next call finds
    // this disagreement.
    (
        |group| reduce::<f32>(group, ReduceOp::Sum, &[6]),
        |group| {
            let x = Tensor::<f32>::zeros(group.device(), [6])?;
            let pending = group.start_all_reduce(ReduceOp::Sum, x)?;
            group.barrier()?;
            pending.wait().map(drop)
        },
        "all_reduce(sum, f32 [6], call 0)",
        "barrier(call 1)",
    ),
];
