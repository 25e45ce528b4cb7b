//! The latency and bandwidth of collectives.

use super::timer::Timer;
use crate::{
    comm::{Op, ReduceOp},
    error::{Error, Result},
    kernels::Backend,
    plan::{Collective, Link},
    shard::{Partition, Shape},
    tensor::Tensor,
};

/// The operations that are measured.
const OPS: [Op; 5] = [Op::AllReduce, Op::AllGather, Op::ReduceScatter, Op::Broadcast, Op::Exchange];
/// The numbers of f32 elements: 1 KiB to 64 MiB.
const SIZES: [usize; 6] = [1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24];

/// The number of measurements at one number of ranks.
pub(super) const COUNT: usize = OPS.len() * SIZES.len();

/// Measures each operation in the timer's group. A group of one rank has none.
pub(super) fn measured<B: Backend>(timer: &Timer<'_, B>) -> Result<Vec<Collective>> {
    let ranks = timer.group.size();
    if ranks == 1 {
        return Ok(Vec::new());
    }
    let of = |op: Op| {
        let mut transfers = Vec::new();
        for elements in SIZES {
            let seconds = seconds(timer, op, elements)?;
            transfers.push(((4 * elements) as f64, seconds));
            if timer.is_long(seconds) {
                break;
            }
        }
        let Link { latency, bandwidth } = fit(&transfers);
        Ok(Collective { op: op.name().into(), ranks, latency, bandwidth })
    };
    OPS.into_iter().map(of).collect()
}

fn seconds<B: Backend>(timer: &Timer<'_, B>, op: Op, elements: usize) -> Result<f64> {
    let (group, device) = (timer.group, timer.group.device());
    let (rank, ranks) = (group.rank(), group.size());
    let partition = Partition::even(elements, ranks);
    let mut whole = Tensor::<f32, B>::full(device, [elements], 0.5)?;
    let shard = Tensor::<f32, B>::full(device, [partition.size(rank)], 0.5)?;
    let shape = Shape::from([elements]);
    let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
    timer.seconds(device, &mut || match op {
        Op::AllReduce => group.all_reduce(ReduceOp::Max, &mut whole),
        Op::AllGather => group.all_gather(&shard, 0, &partition).map(drop),
        Op::ReduceScatter => group.reduce_scatter(ReduceOp::Sum, &whole, 0, &partition).map(drop),
        Op::Broadcast => group.broadcast(0, &mut whole),
        Op::Exchange => group.exchange(Some((next, &whole)), Some((previous, shape))).map(drop),
        _ => Err(Error::internal("measure", format!("{} has no size", op.name()))),
    })
}

/// The factor by which products are slower while an all-reduce runs: 1 if both together take as
/// long as the longer one, and 2 if they take as long as one after the other.
pub(super) fn overlap<B: Backend>(timer: &Timer<'_, B>) -> Result<f64> {
    const SCALE: usize = 256;
    let (group, device) = (timer.group, &timer.device());
    let x = Tensor::<f32, B>::full(device, [SCALE, SCALE], 0.5)?;
    let mut y = Tensor::<f32, B>::empty(device, [SCALE, SCALE])?;
    let mut product = || device.gemm(1.0, x.mat(), x.mat(), 0.0, y.mat_mut()?);
    let one = timer.seconds(device, &mut product)?;
    let start = || {
        let x = Tensor::<f32, B>::empty(group.device(), [1 << 20])?;
        group.start_all_reduce(ReduceOp::Max, x)
    };
    let reduce = timer.seconds(device, &mut || start()?.wait().map(drop))?;
    // Products that take about as long as the all-reduce.
    let count = (reduce / one).clamp(1.0, 1e4).round() as usize;
    let compute = timer.seconds(device, &mut || (0..count).try_for_each(|_| product()))?;
    let both = timer.seconds(device, &mut || {
        let pending = start()?;
        (0..count).try_for_each(|_| product())?;
        pending.wait().map(drop)
    })?;
    let (longer, shorter) = (compute.max(reduce), compute.min(reduce));
    Ok((1.0 + (both - longer) / shorter).clamp(1.0, 2.0))
}

/// The link of messages that no collective is measured for: that of an exchange of two ranks.
pub(super) fn link(collectives: &[Collective]) -> Link {
    let exchange = collectives.iter().find(|own| own.op == Op::Exchange.name());
    // One rank makes no transfers.
    exchange.map_or(Link { latency: 0.0, bandwidth: 1e9 }, |own| Link {
        latency: own.latency,
        bandwidth: own.bandwidth,
    })
}

/// The latency α and the bandwidth 1/β of transfers `(bytes S, seconds t)` that minimize
/// Σ ((α + β S) / t − 1)², with α ≥ 0 and β > 0.
fn fit(transfers: &[(f64, f64)]) -> Link {
    let sum = |of: &dyn Fn(f64, f64) -> f64| {
        transfers.iter().map(|&(bytes, seconds)| of(bytes, seconds)).sum::<f64>()
    };
    // The normal equations: a α + b β = d, b α + c β = e.
    let (a, b, c) = (sum(&|_, t| 1.0 / (t * t)), sum(&|s, t| s / (t * t)), sum(&|s, t| s * s / (t * t)));
    let (d, e) = (sum(&|_, t| 1.0 / t), sum(&|s, t| s / t));
    let determinant = a * c - b * b;
    let (mut latency, mut per_byte) = ((c * d - b * e) / determinant, (a * e - b * d) / determinant);
    if !(latency >= 0.0 && latency.is_finite()) {
        (latency, per_byte) = (0.0, e / c);
    }
    if !(per_byte > 0.0 && per_byte.is_finite()) {
        // The seconds do not grow with the bytes: those of the longest transfer for all.
        let longest = transfers.iter().map(|&(_, seconds)| seconds).fold(0.0, f64::max);
        return Link { latency: longest, bandwidth: f64::from(u32::MAX) * 1e3 };
    }
    Link { latency, bandwidth: 1.0 / per_byte }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_latency_and_bandwidth() {
        let transfers: Vec<_> = SIZES.iter().map(|&s| (s as f64, 3e-6 + s as f64 / 2e9)).collect();
        let Link { latency, bandwidth } = fit(&transfers);
        assert!((latency / 3e-6 - 1.0).abs() < 1e-6 && (bandwidth / 2e9 - 1.0).abs() < 1e-6);
        // Relative squares: a large transfer that is 10 % slower hardly changes the latency.
        let mut slower = transfers;
        slower[5].1 *= 1.1;
        let Link { latency, .. } = fit(&slower);
        assert!((latency / 3e-6 - 1.0).abs() < 0.1, "{latency}");
    }

    #[test]
    fn a_fit_has_no_negative_numbers() {
        let Link { latency, bandwidth } = fit(&[(1e3, 1e-6), (1e6, 2e-3), (1e7, 3e-2)]);
        assert!(latency >= 0.0 && bandwidth > 0.0, "{latency}, {bandwidth}");
        let Link { latency, bandwidth } = fit(&[(1e3, 3e-6), (1e6, 2e-6), (1e7, 1e-6)]);
        assert!(latency >= 1e-6 && bandwidth > 1e9, "{latency}, {bandwidth}");
        let Link { latency, bandwidth } = fit(&[(1e3, 3e-6)]);
        assert!(latency >= 0.0 && bandwidth.is_finite() && bandwidth > 0.0, "{latency}, {bandwidth}");
    }
}
