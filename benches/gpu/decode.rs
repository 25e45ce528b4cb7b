//! Decoding one token per sequence: attention to a KV cache, and a layer of Llama 8B's sizes.

use crate::{
    attention::{causal, heads, weighted, weights},
    block::{self, Sizes},
    data::to_host,
    report::{Bench, Cost},
};
use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::Group,
    kernels::{Attention, AttentionSpec, CacheSpec, Pointwise},
    parallel::{DTensor, KvCache, Layer},
    shard::{Replicated, Sequences},
};
use std::rc::Rc;

pub(crate) fn run(bench: &mut Bench) -> Result<()> {
    let dim = bench.pick(64, 128);
    for context in bench.pick([32, 64], [4096, 32768]) {
        for batch in bench.pick([1, 2, 4], [1, 16, 64]) {
            attend(bench, dim, context, batch)?;
        }
    }
    layer(bench)
}

fn attend(bench: &mut Bench, dim: usize, context: usize, batch: usize) -> Result<()> {
    let name = format!("decode attention bf16 ctx {context} b {batch}");
    bench.case(&name, |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let (heads, kv_heads) = heads(bench);
        let (sharing, rows) = (heads / kv_heads, batch * kv_heads * context);
        let attending = causal(heads, kv_heads, dim);
        let sequences = Sequences::packed(vec![1; batch]).starting_at(&vec![context - 1; batch])?;
        let slots: Vec<usize> = (0..batch).collect();
        let spec = AttentionSpec { heads: &attending, sequences: &sequences };
        let scale = attending.scale();
        let cache = CacheSpec { slots: &slots, capacity: context };
        let bytes = 4 * rows * dim;
        let copies = bench.copies(bytes);
        let fill = |_| Ok((data.fill::<bf16>([rows, dim], 1.0)?, data.fill::<bf16>([rows, dim], 1.0)?));
        let caches = (0..copies).map(fill).collect::<Result<Vec<_>>>()?;
        let q = data.fill::<bf16>([batch, heads * dim], 1.0)?;
        let mut out = Tensor::<bf16, _>::empty(&cuda, [batch, heads * dim])?;
        let flops = (4 * batch * heads * context * dim) as f64;
        let mut last = 0;
        bench.time(&name, Cost { bytes: bytes as f64, flops }, |call| {
            last = call % copies;
            let (keys, values) = &caches[last];
            cuda.attention_cached(&spec, &cache, q.mat(), keys.mat(), values.mat(), out.mat_mut()?)
        })?;
        let (keys, values) = &caches[last];
        for (row, head) in [(0, 0), (batch - 1, heads - 1)] {
            let columns = head * dim..(head + 1) * dim;
            let first = (row * kv_heads + head / sharing) * context;
            let there =
                [keys, values].map(|all| to_host(all.mat().block(first..first + context, 0..dim), &cuda));
            let [keys, values] = there;
            let q = to_host(q.mat().block(row..row + 1, columns.clone()), &cuda)?;
            let want = weighted(&weights(&q, &keys?, scale), values?.chunks(dim), dim);
            bench.expect(&name, &to_host(out.mat().block(row..row + 1, columns), &cuda)?, &want)?;
        }
        Ok(())
    })
}

/// Times a decoding step of a layer with [`KvCache`], as models run it. The weights alone are
/// larger than the caches of the GPU.
fn layer(bench: &mut Bench) -> Result<()> {
    bench.case("decode layer", |bench| {
        let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
        let group = Group::solo(&cuda);
        let sizes = Sizes::of(bench);
        let block = block::load(&group, &data.weights(0.02), &sizes, true)?;
        let (context, hidden) = (bench.pick(16, 1024), sizes.hidden);
        for batch in bench.pick([1, 2], [1, 64]) {
            let slots: Vec<usize> = (0..batch).collect();
            let mut cache = KvCache::new(batch, context + 1)?;
            let mut prompts = Vec::new();
            for slot in 0..batch {
                let x = data.fill::<bf16>([context, hidden], 1.0)?;
                let (sequences, mut step) = cache.step(&[slot], &[context])?;
                let prompt = DTensor::<Replicated, _, _>::replicated(&group, x.clone())?;
                block.infer(prompt.with_sequences(sequences)?, &mut step)?;
                step.finish()?;
                prompts = vec![x];
            }
            let token = data.fill::<bf16>([batch, hidden], 1.0)?;
            let x = DTensor::<Replicated, _, _>::replicated(&group, token)?;
            let name = format!("decode layer bf16 ctx {context} b {batch}");
            let kv = 4 * batch * context * sizes.kv_heads * sizes.hidden / sizes.heads;
            let weights = 2 * sizes.weights();
            let scores = 4 * batch * context * hidden;
            let cost =
                Cost { bytes: (weights + kv) as f64, flops: (2 * batch * sizes.weights() + scores) as f64 };
            let mut y = None;
            bench.time(&name, cost, |_| {
                // Do not finish the step, so that every call appends at the same position.
                let (sequences, mut step) = cache.step(&slots, &vec![1; batch])?;
                y = Some(block.infer(x.clone().with_sequences(sequences)?, &mut step)?);
                Ok(())
            })?;
            // Compares with a forward of the whole last sequence, without a cache.
            let (Some(y), Some(prompt)) = (y, prompts.pop()) else { continue };
            let mut whole = Tensor::<bf16, _>::empty(&cuda, [context + 1, hidden])?;
            cuda.copy(prompt.mat(), whole.mat_mut()?.block(0..context, 0..hidden))?;
            let row = batch - 1..batch;
            let last = context..context + 1;
            cuda.copy(
                x.local().mat().block(row.clone(), 0..hidden),
                whole.mat_mut()?.block(last.clone(), 0..hidden),
            )?;
            let (whole, _) = block.forward(DTensor::replicated(&group, whole)?)?;
            let want = to_host(whole.local().mat().block(last, 0..hidden), &cuda)?;
            let got = to_host(y.local().mat().block(row, 0..hidden), &cuda)?;
            bench.expect(&name, &got, &block::close(&want))?;
        }
        Ok(())
    })
}
