//! The overhead of NCCL calls, blocking and not blocking. The calls are all-reduces over one rank,
//! which move no data.

use crate::{
    data::Data,
    report::{Bench, Cost, timed},
};
use shardwise::{
    Result,
    comm::{ReduceOp, nccl::Options},
    device::Cuda,
    launch,
};

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let quick = bench.quick;
    bench.case("nccl", |bench| {
        let lines = launch::threads(1, |rank| {
            let cuda = Cuda::new(0)?;
            let data = Data::new(&cuda, quick)?;
            let mut lines = Vec::new();
            let large = if quick { ("16 KiB", 1 << 12) } else { ("64 MiB", 1 << 24) };
            let modes = [("", true), (", not blocking", false)];
            let cases =
                modes.into_iter().flat_map(|mode| [("4 KiB", 1 << 10), large].map(|size| (mode, size)));
            for ((mode, blocking), (name, len)) in cases {
                let group = rank.over_nccl(&cuda, Options { blocking, ..Options::default() })?;
                let mut x = data.fill::<f32>([len], 1.0)?;
                let before = x.to_vec()?;
                let times = timed(&cuda, quick, |_| group.all_reduce(ReduceOp::Sum, &mut x))?;
                let same = x.to_vec()?.iter().zip(&before).filter(|(x, before)| x == before).count();
                lines.push((format!("all-reduce f32 {name}, one rank{mode}"), times, same, len));
            }
            Ok(lines)
        })?;
        for (name, times, same, len) in lines.into_iter().flatten() {
            bench.line(&name, &times, Cost::default())?;
            bench.expect(&name, &[same as f64], &[(len as f64, 0.0)])?;
        }
        Ok(())
    })
}
