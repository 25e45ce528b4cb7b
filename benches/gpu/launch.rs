//! The overhead of calls that do almost nothing.

use crate::report::{Bench, Cost, Times};
use shardwise::{
    Result, Tensor,
    device::{Cuda, Device},
    kernels::Pointwise,
};
use std::{rc::Rc, time::Instant};

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let none = Cost::default();
    bench.case("launch", |bench| {
        let cuda = bench.cuda.clone();
        let one = Tensor::<f32, _>::full(&cuda, [1], 1.0)?;
        let mut sum = Tensor::<f32, _>::zeros(&cuda, [1])?;
        // Make fewer calls than fit in the queue of a stream, so that the host never waits.
        let (rounds, calls) = bench.pick((1, 10), (11, 500));
        let (mut asked, mut done) = (Vec::new(), Vec::new());
        for _ in 0..=rounds {
            cuda.synchronize()?;
            let begin = Instant::now();
            for _ in 0..calls {
                cuda.accumulate(one.mat(), sum.mat_mut()?)?;
            }
            asked.push(begin.elapsed().as_secs_f64() / calls as f64);
            cuda.synchronize()?;
            done.push(begin.elapsed().as_secs_f64() / calls as f64);
        }
        // Drop the first round, which loads the kernel.
        bench.line("launch of a kernel, until asked for", &Times::of(asked.split_off(1)), none)?;
        bench.line("launch of a kernel, until done", &Times::of(done.split_off(1)), none)?;
        let want = (calls * (rounds + 1)) as f64;
        bench.expect("launch of a kernel", &[sum.to_vec()?[0].into()], &[(want, 0.0)])?;
        bench.time("launch of a kernel, and wait", none, |_| {
            cuda.accumulate(one.mat(), sum.mat_mut()?)?;
            cuda.synchronize()
        })
    })?;
    bench.case("transfer", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let from = data.fill::<f32>([1024], 1.0)?.to_vec()?;
        let mut to = Tensor::<f32, _>::zeros(&cuda, [1024])?;
        bench.time("upload of 4 KiB", none, |_| cuda.upload(&from, to.slice_mut()?))?;
        let same = |to: Vec<f32>| to.iter().zip(&from).filter(|(to, from)| to == from).count() as f64;
        bench.expect("upload of 4 KiB", &[same(to.to_vec()?)], &[(1024.0, 0.0)])?;
        let mut back = [0.0];
        bench.time("download of 4 B", none, |_| {
            cuda.download::<f32>(Cuda::narrow(to.slice(), 1..2), &mut back)
        })?;
        bench.expect("download of 4 B", &[back[0].into()], &[(from[1].into(), 0.0)])
    })?;
    bench.case("allocation", |bench| {
        let cuda = bench.cuda.clone();
        bench.time("allocate and free 2 MiB", none, |_| Tensor::<f32, _>::empty(&cuda, [1 << 19]).map(drop))
    })
}
