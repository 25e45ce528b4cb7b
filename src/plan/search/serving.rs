//! The search for serving.

use super::{BEST, OP, impossible, replicas, tensor_sizes, verdict};
use crate::{
    device::DType,
    error::{Error, Result},
    plan::{
        Exposed, Job, Limits, Machine, Memory, Passes, Plan, Plans, RankUse, Strategy, Verdict, bounds,
        dry::{self, Serving, Time},
    },
};
use half::bf16;

/// Finds the best strategies for generating `batch` sequences of at most `context` tokens.
pub(super) fn search(
    job: &Job,
    machine: &Machine,
    limits: &Limits,
    batch: usize,
    context: usize,
) -> Result<Plans> {
    let (mut refusals, mut considered, mut plans) = (impossible(job, machine, batch), 0, Vec::new());
    for tensor in tensor_sizes(job, machine, limits) {
        let (left, of_node) = (machine.ranks / tensor, machine.ranks_per_node / tensor);
        for data in replicas(batch, left, of_node, limits) {
            considered += 1;
            let strategy = Strategy::new(data, 1, tensor, batch.div_ceil(data));
            let plan = evaluate(job, machine, &strategy, batch, context)?;
            if plan.verdict == Verdict::OutOfMemory {
                refusals.out_of_memory(plan.ranks[0].memory.total(), &strategy);
            } else {
                plans.push(plan);
            }
        }
    }
    plans.sort_by(Plan::order);
    plans.truncate(BEST);
    let refused = refusals.list(machine);
    Ok(Plans { job: job.clone(), machine: machine.clone(), best: plans, considered, refused })
}

/// The plan of one strategy, whatever its memory.
pub(super) fn evaluate(
    job: &Job,
    machine: &Machine,
    strategy: &Strategy,
    batch: usize,
    context: usize,
) -> Result<Plan> {
    let Strategy { data, tensor, sequences, .. } = *strategy;
    let run = match job.dtype {
        DType::F32 => Serving::run::<f32>,
        DType::BF16 | DType::F16 => Serving::run::<bf16>,
        DType::F64 => return Err(dry::no_f64()),
    };
    let mut ranks = Vec::new();
    for rank in dry::distinct_ranks(&job.model, tensor, sequences)? {
        let mut serving = run(&job.model, (rank, tensor), (sequences, context), job.dtype)?;
        serving.price(machine, strategy.ranks(), tensor)?;
        ranks.push(serving);
    }
    let memory = |serving: &Serving| Memory {
        weights: serving.weights,
        cache: serving.cache,
        transients: serving.prefill.peak.max(serving.decode.peak) as u64,
        ..Memory::default()
    };
    let seconds = |serving: &Serving| serving.decode.time.total();
    let slowest = ranks.iter().max_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    let fullest = ranks.iter().map(memory).max_by_key(Memory::total);
    let (Some(slowest), Some(memory)) = (slowest, fullest) else {
        return Err(Error::internal(OP, "a tensor-parallel group without ranks"));
    };
    let turns = machine.turns(strategy.ranks());
    let decode = Time { compute: turns * slowest.decode.time.compute, ..slowest.decode.time };
    let mut prefill = 0.0_f64;
    for serving in &ranks {
        let Time { compute, transfers } = serving.prefill.time;
        let own = turns * compute + transfers;
        // Before `max`, which ignores NaN.
        bounds::seconds(OP, "a prefill", own)?;
        bounds::seconds(OP, "a token", seconds(serving))?;
        prefill = prefill.max(own);
    }
    bounds::seconds(OP, "a token", decode.total())?;
    let sent =
        slowest.decode.transfers.iter().map(|(transfer, count)| transfer.wire_bytes(tensor) as u64 * count);
    // The shards of a group differ, but their operations add up to those of the model.
    let flops = slowest.decode.flops().saturating_mul((tensor * data) as u128);
    Ok(Plan {
        strategy: *strategy,
        verdict: verdict(machine, strategy, &memory),
        seconds: decode.total(),
        error: machine.error,
        tokens_per_second: batch as f64 / decode.total(),
        prefill: Some(prefill),
        bubble: 0.0,
        exposed: Exposed { tensor: decode.transfers, ..Exposed::default() },
        exchange: 0.0,
        buffered: machine.buffered,
        threads: machine.rates(strategy.ranks())?.threads,
        flops: u64::try_from(flops).unwrap_or(u64::MAX),
        ranks: vec![RankUse {
            pipeline: 0,
            memory,
            passes: vec![Passes { forward: decode.total(), backward: 0.0 }],
            sent: sent.sum(),
        }],
    })
}
