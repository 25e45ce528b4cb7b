//! Plans of training against training: what each rank of a job with data holds, computes and moves
//! in a step, compared with what is planned for the rank without data.

use shardwise::{
    Result,
    comm::{DeviceMesh, Group},
    device::{Cpu, DType, Device, Element},
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    launch,
    models::{Decoder, DecoderConfig, DecoderEnds, LayerChoices, Tokens},
    ops::{RopeConfig, RopeScaling},
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{AttentionConfig, BlockConfig, ResidualStream, VocabParallelCrossEntropy},
    plan::{Job, Preview, Strategy, Transfers},
    shard::{Axis, Replicated, Sequences, Shard},
    tensor::{Param, Random},
    train::{DataParallel, GradReduce, Microbatch, Pipeline},
};

/// What a rank of a job has done in its last step, and the most that it has held.
#[derive(Debug)]
struct Real {
    peak: u64,
    flops: u64,
    tensor: Transfers,
    pipeline: Transfers,
    data: Transfers,
}

/// Trains two steps on one rank.
fn train<S: ResidualStream, T: Element, B: shardwise::kernels::Backend>(
    world: &Group<B>,
    config: &DecoderConfig,
    strategy: &Strategy,
    tokens: usize,
) -> Result<Real> {
    let mesh = DeviceMesh::new(world, strategy.mesh()?)?;
    let (tensor, of_tensor) = mesh.group(Axis::Tensor).recorded();
    let (stages, of_stages) = mesh.group(Axis::Pipeline).recorded();
    let (replicas, of_replicas) = mesh.group(Axis::Data).recorded();
    let (schedule, source) = (strategy.schedule()?, Random::normal(1, 0.02));
    let mut config = config.clone();
    config.recomputed = strategy.recomputed;
    let model = Decoder::<S, T, B>::load_stages(&tensor, &source, &config, &schedule, stages.rank())?;
    let params = model.params();
    params.iter().for_each(|param| param.set_microbatches(schedule.microbatches()));
    let pipeline = Pipeline::new(&stages, &tensor, schedule, config.hidden())?;
    let parallel = DataParallel::new(&replicas, &params)?;
    let rows = strategy.sequences * tokens;
    let ids: Vec<u32> = (0..rows).map(|at| (at * 5 + 1) as u32 % config.vocabulary as u32).collect();
    let sequences = Sequences::packed(vec![tokens; strategy.sequences]);
    let microbatches = vec![Microbatch { sequences, dropout: None }; strategy.microbatches];
    let mut adamw = AdamW::default();
    let mut before = 0;
    for _ in 0..2 {
        // Other ranks may still read what this rank has sent in the step before.
        world.barrier()?;
        [&of_tensor, &of_stages, &of_replicas].map(|log| log.take());
        before = 0;
        params.iter().for_each(Param::zero_grad);
        parallel.begin(GradReduce::Sum)?;
        let tokens = vec![Tokens { ids: &ids, targets: &ids }; strategy.microbatches];
        let mut ends = DecoderEnds::new(&model, tokens, VocabParallelCrossEntropy::default(), Some(1.0));
        pipeline.run(model.chunks(), &microbatches, &mut ends)?;
        parallel.finish()?;
        if let Some(table) = model.tied() {
            pipeline.sum_tied(&table)?;
        }
        let norm = grad_norm(&params, &[&tensor, &stages])?;
        adamw.step(&params, 1e-3, clip_scale(norm, 1.0)?)?;
    }
    let count = |log: Vec<_>| {
        let mut transfers = Transfers::new();
        log.into_iter().for_each(|transfer| *transfers.entry(transfer).or_default() += 1);
        transfers
    };
    Ok(Real {
        peak: world.device().memory().peak as u64,
        flops: 0 - before,
        tensor: count(of_tensor.take()),
        pipeline: count(of_stages.take()),
        data: count(of_replicas.take()),
    })
}

/// A Llama with three kinds of blocks, or a GPT-2 with a tied head.
fn model(llama: bool, heads: usize, kv_heads: usize, vocabulary: usize, layers: usize) -> DecoderConfig {
    let hidden = 16 * heads;
    let attention = AttentionConfig::new(hidden, heads)
        .with_kv_heads(kv_heads)
        .with_choices(AttentionChoices::CAUSAL);
    if llama {
        let rope = RopeConfig { dim: 16, base: 1e4, pairs: RopePairs::Halves, scaling: RopeScaling::None };
        let block = BlockConfig::new(
            attention.with_rope(rope),
            90,
            Activation::Silu,
            NormKind::RmsNorm { eps: 1e-5 },
        )
        .with_gate(true);
        let mut config = DecoderConfig::new(vocabulary, block, layers);
        config.tied = false;
        return config;
    }
    let attention = attention.with_qkv_bias(true).with_out_bias(true);
    let block = BlockConfig::new(attention, 4 * hidden, Activation::GeluTanh, NormKind::LayerNorm { eps: 1e-5 });
    let mut config = DecoderConfig::new(vocabulary, block.with_mlp_bias(true), layers);
    config.positions = Some(64);
    config
}

pub fn main() {
    let tokens = 24;
    let all = [
        (true, 4, 2, 101, 3, Strategy::new(1, 1, 1, 2)),
        (false, 4, 4, 101, 3, Strategy::new(1, 1, 1, 2)),
        (true, 4, 2, 101, 3, Strategy::new(1, 1, 1, 2).with_microbatches(3)),
        (true, 4, 2, 101, 3, Strategy::new(1, 1, 1, 2).with_microbatches(3).with_recomputed(2)),
        (true, 4, 2, 101, 3, Strategy::new(1, 1, 2, 2).with_microbatches(2)),
        (true, 4, 2, 101, 3, Strategy::new(1, 1, 2, 2).with_microbatches(2).with_sequence_parallel(true)),
        (true, 4, 2, 101, 4, Strategy::new(1, 1, 3, 2).with_microbatches(2)),
        (true, 4, 2, 101, 5, Strategy::new(1, 2, 1, 2).with_microbatches(4)),
        (false, 4, 4, 101, 5, Strategy::new(1, 2, 1, 2).with_microbatches(4)),
        (false, 4, 4, 101, 5, Strategy::new(1, 2, 1, 2).with_microbatches(4).with_chunks(2)),
        (false, 4, 4, 101, 5, Strategy::new(2, 1, 1, 2).with_microbatches(4)),
        (false, 4, 4, 101, 5, Strategy::new(2, 2, 2, 2).with_microbatches(4)),
    ];
    for (llama, heads, kv, vocabulary, layers, strategy) in all {
        let config = model(llama, heads, kv, vocabulary, layers);
        let job = Job::train(config.clone(), DType::F32, strategy.sequences * strategy.microbatches * strategy.data, tokens);
        let reals = launch::threads(strategy.ranks(), |world| match strategy.sequence_parallel {
            true => train::<Shard<0>, f32, Cpu>(&world, &config, &strategy, tokens),
            false => train::<Replicated, f32, Cpu>(&world, &config, &strategy, tokens),
        })
        .unwrap();
        if strategy.ranks() == 1 {
            let m = train::<Replicated, f32, _>(&Group::solo(&shardwise::device::Meta::new()), &config, &strategy, tokens).unwrap();
            println!("meta {}", m.peak);
        }
        for (rank, real) in reals.iter().enumerate() {
            let plan = Preview::new(&job, &strategy, rank).unwrap();
            let planned = plan.memory.total();
            let mut pipeline = plan.traffic.pipeline.clone();
            pipeline.extend(plan.traffic.ends.clone());
            println!(
                "{llama} {}x{}x{} mb {} rank {rank}: peak {} planned {planned} ({:+.2} %) {:?} | tensor {} pipeline {} data {} flops {} {}",
                strategy.data, strategy.pipeline, strategy.tensor, strategy.microbatches,
                real.peak, 100.0 * (planned as f64 / real.peak as f64 - 1.0), plan.memory,
                real.tensor == plan.traffic.tensor, real.pipeline == pipeline, real.data == plan.traffic.data,
                real.flops, plan.flops,
            );
            if real.tensor != plan.traffic.tensor { println!("   {:?}\n   {:?}", real.tensor, plan.traffic.tensor); }
            if real.pipeline != pipeline { println!("   {:?}\n   {:?}", real.pipeline, pipeline); }
            if real.data != plan.traffic.data { println!("   {:?}\n   {:?}", real.data, plan.traffic.data); }
        }
    }
}
