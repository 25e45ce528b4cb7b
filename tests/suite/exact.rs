//! Programs of collectives with exact results, for every communicator.
//!
//! Inputs are small whole numbers times a power of two, as in nccl-tests. Sums of a few such
//! numbers are exact in every element type and order, so results are compared for equality.

use ndarray::{ArrayD, Axis, IxDyn, Slice};
use shardwise::{
    Result, Tensor,
    comm::{Group, Pending, ReduceOp},
    device::{DType, Element},
    kernels::Pointwise,
    shard::{Partition, Shape},
};

pub(crate) const OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min];
pub(crate) const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// Calls a function that is generic over the element type. A [`DType`] selects the type at run
/// time.
macro_rules! with_element {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            shardwise::device::DType::F64 => $function::<f64, _>($($argument),*),
            shardwise::device::DType::F32 => $function::<f32, _>($($argument),*),
            shardwise::device::DType::BF16 => $function::<half::bf16, _>($($argument),*),
            shardwise::device::DType::F16 => $function::<half::f16, _>($($argument),*),
            other => panic!("{other} has no test"),
        }
    };
}

pub(crate) use with_element;

/// Hashes a few numbers (the finalizer of SplitMix64).
pub(crate) fn mix(seed: u64, a: usize, b: usize) -> u64 {
    let mut bits = seed
        ^ (a as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (b as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Returns the ranks' inputs: whole numbers from −8 to 8 times one power of two.
pub(crate) fn inputs(seed: u64, world: usize, dims: &[usize]) -> Vec<ArrayD<f64>> {
    let scale = 2.0_f64.powi((seed % 7) as i32 - 3);
    let input = |rank| {
        let mut at = 0;
        ArrayD::from_shape_simple_fn(IxDyn(dims), || {
            at += 1;
            ((mix(seed, rank, at) % 17) as f64 - 8.0) * scale
        })
    };
    (0..world).map(input).collect()
}

/// A partition of `len` into `parts` shards, some of them empty.
pub(crate) fn uneven(seed: u64, len: usize, parts: usize) -> Partition {
    let mut bounds: Vec<_> = (1..parts).map(|at| mix(seed, at, 1) as usize % (len + 1)).collect();
    bounds.extend([0, len]);
    bounds.sort_unstable();
    Partition::from_sizes(bounds.windows(2).map(|pair| pair[1] - pair[0]))
}

pub(crate) fn tensor<T: Element, B: Pointwise>(
    group: &Group<B>,
    array: &ArrayD<f64>,
) -> Result<Tensor<T, B>> {
    let values: Vec<_> = array.iter().map(|value| T::from_f64(*value)).collect();
    Tensor::from_slice(group.device(), array.shape(), &values)
}

/// Computes a reduction element by element.
pub(crate) fn reduced<'a>(op: ReduceOp, inputs: impl IntoIterator<Item = &'a ArrayD<f64>>) -> ArrayD<f64> {
    let mut inputs = inputs.into_iter();
    let mut result = inputs.next().expect("a group has a rank").clone();
    for input in inputs {
        result.zip_mut_with(input, |a, b| match op {
            ReduceOp::Sum => *a += b,
            ReduceOp::Max => *a = a.max(*b),
            ReduceOp::Min => *a = a.min(*b),
            other => panic!("no naive reduction for {other:?}"),
        });
    }
    result
}

pub(crate) fn slice(whole: &ArrayD<f64>, dim: usize, partition: &Partition, rank: usize) -> ArrayD<f64> {
    whole.slice_axis(Axis(dim), Slice::from(partition.range(rank))).to_owned()
}

#[track_caller]
pub(crate) fn same<T: Element, B: Pointwise>(
    what: &Step,
    got: &Tensor<T, B>,
    want: &ArrayD<f64>,
) -> Result<()> {
    assert_eq!(got.shape().dims(), want.shape(), "{what:?}");
    let got = got.to_vec()?;
    let wrong = got.iter().zip(want).position(|(got, want)| got.to_f64() != *want);
    assert_eq!(wrong, None, "{what:?} of {} {:?}: the first wrong element", T::DTYPE, want.shape());
    Ok(())
}

/// One collective of a program.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    AllReduce(ReduceOp),
    AllGather(usize, Partition),
    ReduceScatter(ReduceOp, usize, Partition),
    Broadcast(usize),
    /// Every rank sends to the rank at this distance.
    Shift(usize),
    /// Even ranks exchange with the next rank.
    Pairs,
    Barrier,
    /// Ranks of the same random color form a group and reduce in it.
    Split(u64),
}

/// Performs one rank's step and compares the result with the expected one, which this function
/// computes from all ranks' inputs.
pub(crate) fn perform<T: Element, B: Pointwise>(
    group: &Group<B>,
    step: &Step,
    inputs: &[ArrayD<f64>],
) -> Result<()> {
    let (size, rank) = (group.size(), group.rank());
    let shape = Shape::new(inputs[0].shape());
    match step {
        Step::AllReduce(op) => {
            let mut x = tensor::<T, B>(group, &inputs[rank])?;
            group.all_reduce(*op, &mut x)?;
            same(step, &x, &reduced(*op, inputs))
        }
        Step::AllGather(dim, partition) => {
            let part = tensor::<T, B>(group, &slice(&inputs[0], *dim, partition, rank))?;
            same(step, &group.all_gather(&part, *dim, partition)?, &inputs[0])
        }
        Step::ReduceScatter(op, dim, partition) => {
            let x = tensor::<T, B>(group, &inputs[rank])?;
            let part = group.reduce_scatter(*op, &x, *dim, partition)?;
            same(step, &x, &inputs[rank])?;
            same(step, &part, &slice(&reduced(*op, inputs), *dim, partition, rank))
        }
        Step::Broadcast(root) => {
            let mut x = tensor::<T, B>(group, &inputs[rank])?;
            group.broadcast(*root, &mut x)?;
            same(step, &x, &inputs[*root])
        }
        Step::Shift(by) => {
            let (to, from) = ((rank + by) % size, (rank + size - by % size) % size);
            let x = tensor::<T, B>(group, &inputs[rank])?;
            let y = group.exchange(Some((to, &x)), Some((from, shape)))?;
            same(step, &y.expect("the exchange returns the expected message"), &inputs[from])
        }
        Step::Pairs => {
            let peer = rank ^ 1;
            let x = tensor::<T, B>(group, &inputs[rank])?;
            let pair = peer < size;
            let y = group.exchange(pair.then_some((peer, &x)), pair.then_some((peer, shape)))?;
            assert_eq!(y.is_some(), pair);
            y.map_or(Ok(()), |y| same(step, &y, &inputs[peer]))
        }
        Step::Barrier => group.barrier(),
        Step::Split(seed) => {
            // A rank with color 3 gets no group. The keys reverse or keep the order of the ranks.
            let color = |rank| Some(mix(*seed, rank, 2) % 4).filter(|color| *color < 3);
            let key = |rank: usize| if seed % 2 == 0 { size - rank } else { 7 };
            let part = group.split(color(rank), key(rank) as u64)?;
            let Some(color_here) = color(rank) else {
                assert!(part.is_none());
                return Ok(());
            };
            let part = part.expect("a rank with a color has a group");
            let mut members: Vec<_> = (0..size).filter(|&rank| color(rank) == Some(color_here)).collect();
            members.sort_by_key(|&rank| (key(rank), rank));
            assert_eq!((part.size(), members[part.rank()]), (members.len(), rank));
            assert_eq!(part.name(), format!("{}/{color_here}", group.name()));
            let mut x = tensor::<T, B>(&part, &inputs[rank])?;
            part.all_reduce(ReduceOp::Sum, &mut x)?;
            same(step, &x, &reduced(ReduceOp::Sum, members.iter().map(|&rank| &inputs[rank])))
        }
    }
}

/// A function that waits for a started collective and checks its result.
pub(crate) type Awaited = Box<dyn FnOnce() -> Result<()>>;

/// Starts a step if its collective can be started. Otherwise performs it.
pub(crate) fn start<T: Element, B: Pointwise>(
    group: &Group<B>,
    step: &Step,
    inputs: &[ArrayD<f64>],
) -> Result<Awaited> {
    let rank = group.rank();
    let x = tensor::<T, B>(group, &inputs[rank])?;
    let (pending, want): (Pending<T, B>, _) = match step {
        Step::AllReduce(op) => (group.start_all_reduce(*op, x)?, reduced(*op, inputs)),
        Step::AllGather(dim, partition) => {
            let part = tensor(group, &slice(&inputs[0], *dim, partition, rank))?;
            (group.start_all_gather(part, *dim, partition)?, inputs[0].clone())
        }
        Step::ReduceScatter(op, dim, partition) => {
            let want = slice(&reduced(*op, inputs), *dim, partition, rank);
            (group.start_reduce_scatter(*op, x, *dim, partition)?, want)
        }
        _ => {
            perform::<T, B>(group, step, inputs)?;
            return Ok(Box::new(|| Ok(())));
        }
    };
    let step = step.clone();
    Ok(Box::new(move || same(&step, &pending.wait()?, &want)))
}

/// Returns every step for tensors of these dimensions. A dimension of size one is only partitioned
/// evenly.
pub(crate) fn all_steps(seed: u64, world: usize, dims: [usize; 2]) -> Vec<Step> {
    let mut steps = vec![Step::Barrier, Step::Pairs, Step::Split(seed)];
    steps.extend(OPS.map(Step::AllReduce));
    for dim in 0..2 {
        let op = OPS[(seed as usize + dim) % 3];
        let partitions = [Partition::even(dims[dim], world), uneven(seed, dims[dim], world)];
        for partition in partitions.into_iter().take(if dims[dim] == 1 { 1 } else { 2 }) {
            steps.push(Step::AllGather(dim, partition.clone()));
            steps.push(Step::ReduceScatter(op, dim, partition));
        }
    }
    steps.extend((0..world).map(Step::Broadcast));
    steps.extend((0..world).map(Step::Shift));
    steps
}

/// Performs every step on tensors of many sizes and every element type. Uses a third of the sizes
/// if `thorough` is false.
pub(crate) fn all_exact<B: Pointwise>(group: &Group<B>, thorough: bool) -> Result<()> {
    for (at, dtype) in DTYPES.into_iter().enumerate() {
        // Payloads of at most 16 KiB take another path than larger ones.
        let eager = (16 << 10) / dtype.size();
        let lines = [0, 1, 2, 7, 31, 33, 127, eager - 1, eager, eager + 1, 2 * eager + 13];
        let lines = lines.into_iter().enumerate().map(|(at, len)| [[len, 1], [1, len]][at % 2]);
        let matrices = [[0, 3], [5, 7], [64, 65], [3, 4099]];
        for (round, dims) in lines.chain(matrices).enumerate() {
            if !thorough && (round + at) % 3 != 0 {
                continue;
            }
            let seed = (at * 100 + round) as u64;
            let inputs = inputs(seed, group.size(), &dims);
            for step in all_steps(seed, group.size(), dims) {
                with_element!(dtype, perform(group, &step, &inputs))?;
            }
        }
    }
    Ok(())
}

/// Starts several steps. Each rank waits for them in a different order.
pub(crate) fn all_in_flight<B: Pointwise>(group: &Group<B>) -> Result<()> {
    let world = group.size();
    let small = inputs(1, world, &[5]);
    let mut flights = Vec::new();
    for (round, dims) in [[9, 700], [1, 7], [5, 0], [128, 129]].into_iter().enumerate() {
        let inputs = inputs(round as u64, world, &dims);
        for (at, step) in all_steps(3, world, dims).into_iter().enumerate() {
            let dtype = DTYPES[(at + round) % 4];
            flights.push(with_element!(dtype, start(group, &step, &inputs))?);
            perform::<f32, _>(group, &Step::AllReduce(ReduceOp::Sum), &small)?;
        }
    }
    while !flights.is_empty() {
        let next = mix(9, group.rank(), flights.len()) as usize % flights.len();
        flights.swap_remove(next)()?;
    }
    Ok(())
}

/// Random normal numbers of every magnitude, whose sums depend on the order.
fn general<T: Element>(rank: usize, len: usize) -> Vec<T> {
    let number = |at| {
        let bits = mix(77, rank, at);
        let magnitude = 2.0_f64.powi((bits % 12) as i32 - 6);
        T::from_f64(((bits >> 11) as f64 / (1_u64 << 53) as f64 - 0.5) * magnitude)
    };
    (0..len).map(number).collect()
}

pub(crate) fn sums_in_rank_order<T: Element, B: Pointwise>(group: &Group<B>) -> Result<()> {
    let bits = |values: &[T]| values.iter().map(|value| value.to_f64().to_bits()).collect::<Vec<_>>();
    for len in [1, 100, 3000, 20_011] {
        let all: Vec<Vec<T>> = (0..group.size()).map(|rank| general(rank, len)).collect();
        let sum = |at: usize| {
            let first = all[0][at].widen();
            T::narrow(all[1..].iter().fold(first, |sum, values| sum + values[at].widen()))
        };
        let want = bits(&(0..len).map(sum).collect::<Vec<_>>());
        let partition = uneven(len as u64, len, group.size());
        let x = Tensor::from_slice(group.device(), [len], &all[group.rank()])?;
        for _ in 0..3 {
            let mut y = x.clone();
            group.all_reduce(ReduceOp::Sum, &mut y)?;
            assert_eq!(bits(&y.to_vec()?), want);
            let y = group.start_all_reduce(ReduceOp::Sum, x.clone())?.wait()?;
            assert_eq!(bits(&y.to_vec()?), want);
            let part = group.reduce_scatter(ReduceOp::Sum, &x, 0, &partition)?;
            assert_eq!(bits(&part.to_vec()?), want[partition.range(group.rank())]);
        }
    }
    Ok(())
}

pub(crate) fn nan_wins<T: Element, B: Pointwise>(group: &Group<B>) -> Result<()> {
    for len in [5, 20_000] {
        for (op, holder) in OPS.iter().flat_map(|op| (0..group.size()).map(move |rank| (*op, rank))) {
            let mut values = vec![T::from_f64(group.rank() as f64 - 2.0); len];
            if group.rank() == holder {
                values[len / 2] = T::NAN;
            }
            let check = |got: Vec<T>, start: usize| {
                let is_right = |(at, value): (usize, &T)| value.to_f64().is_nan() == (start + at == len / 2);
                assert!(got.iter().enumerate().all(is_right), "{op:?} of {} by rank {holder}", T::DTYPE);
            };
            let x = Tensor::from_slice(group.device(), [len], &values)?;
            let mut y = x.clone();
            group.all_reduce(op, &mut y)?;
            check(y.to_vec()?, 0);
            let partition = Partition::even(len, group.size());
            let part = group.reduce_scatter(op, &x, 0, &partition)?;
            check(part.to_vec()?, partition.range(group.rank()).start);
            check(group.start_all_reduce(op, x)?.wait()?.to_vec()?, 0);
        }
    }
    Ok(())
}
