//! Plans of training against training: what each rank of a job with data holds, computes and moves
//! in a step, compared with what is planned for the rank without data.

use half::bf16;
use shardwise::{
    Result,
    comm::{DeviceMesh, Group, Transfer},
    device::{Cpu, DType, Device, Element},
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    launch,
    models::{Decoder, DecoderConfig, DecoderEnds, LayerChoices, Tokens},
    ops::{RopeConfig, RopeScaling},
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{AttentionConfig, BlockConfig, ResidualStream, VocabParallelCrossEntropy},
    plan::{Job, Limits, Machine, Plan, Preview, Strategy, Transfers, Verdict, plan, plan_within},
    shard::{Axis, Heads, Replicated, Sequences, Shard},
    tensor::{Param, Random},
    train::{DataParallel, GradReduce, Microbatch, Pipeline},
};

/// What a rank of a job has done in its last step, and the most that it has held.
#[derive(Debug)]
struct Real {
    peak: u64,
    /// The bytes of the weights, the gradients and the optimizer's state.
    parts: [u64; 3],
    flops: u64,
    tensor: Transfers,
    pipeline: Transfers,
    data: Transfers,
}

/// Trains two steps on one rank.
fn train<S: ResidualStream, T: Element>(
    world: &Group<Cpu>,
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
    let model = Decoder::<S, T, Cpu>::load_stages(&tensor, &source, &config, &schedule, stages.rank())?;
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
        for log in [&of_tensor, &of_stages, &of_replicas] {
            log.take();
        }
        before = world.device().flops();
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
    let elements: usize = params.iter().map(|param| param.shape().len()).sum();
    let state: usize = adamw.state()?.iter().map(|param| param.shape().len()).sum();
    let (weight, sum) = (size_of::<T>(), size_of::<T::Acc>());
    Ok(Real {
        parts: [elements * weight, elements * sum, state * sum].map(|bytes| bytes as u64),
        peak: world.device().memory().peak as u64,
        flops: world.device().flops() - before,
        tensor: count(of_tensor.take()),
        pipeline: count(of_stages.take()),
        data: count(of_replicas.take()),
    })
}

/// The families of models: a Llama with grouped key/value heads, a Llama in which every other block
/// has a window, and a GPT-2 with a tied head. The vocabulary of 211 tokens does not divide.
fn models() -> [(&'static str, DType, DecoderConfig); 3] {
    let attention = AttentionConfig::new(128, 8).with_choices(AttentionChoices::CAUSAL);
    let rope = RopeConfig { dim: 16, base: 1e4, pairs: RopePairs::Halves, scaling: RopeScaling::None };
    let norm = NormKind::RmsNorm { eps: 1e-5 };
    let grouped = attention.clone().with_kv_heads(2).with_rope(rope);
    let block = BlockConfig::new(grouped.clone(), 350, Activation::Silu, norm).with_gate(true);
    let mut llama = DecoderConfig::new(211, block, 5);
    llama.tied = false;
    let mut windows = llama.clone();
    for layer in [1, 3] {
        let window = AttentionChoices { window: Some(9), ..AttentionChoices::CAUSAL };
        windows.layers[layer] = LayerChoices::new(window, grouped.rope.clone());
    }
    let attention = attention.with_qkv_bias(true).with_out_bias(true);
    let norm = NormKind::LayerNorm { eps: 1e-5 };
    let block = BlockConfig::new(attention, 512, Activation::GeluTanh, norm).with_mlp_bias(true);
    let mut gpt = DecoderConfig::new(211, block, 4);
    gpt.positions = Some(64);
    [("llama", DType::F32, llama), ("windows", DType::BF16, windows), ("gpt", DType::F32, gpt)]
}

/// Meshes, with even and uneven shards, stages and microbatches.
fn strategies() -> Vec<Strategy> {
    let mesh = |data, pipeline, tensor| Strategy::new(data, pipeline, tensor, 2);
    vec![
        mesh(1, 1, 1),
        mesh(1, 1, 1).with_microbatches(3),
        mesh(1, 1, 1).with_microbatches(2).with_recomputed(2),
        mesh(1, 1, 2),
        mesh(1, 1, 2).with_microbatches(2).with_sequence_parallel(true),
        mesh(1, 1, 3).with_microbatches(2),
        mesh(1, 1, 3).with_recomputed(4).with_sequence_parallel(true),
        mesh(1, 1, 4).with_microbatches(2).with_recomputed(1),
        mesh(1, 2, 1).with_microbatches(4),
        mesh(1, 2, 1).with_microbatches(4).with_chunks(2),
        mesh(1, 3, 1).with_microbatches(5).with_recomputed(2),
        mesh(2, 1, 1).with_microbatches(2),
        mesh(3, 1, 1),
        mesh(1, 2, 3).with_microbatches(2),
        mesh(2, 2, 2).with_microbatches(2).with_sequence_parallel(true),
        mesh(2, 2, 2).with_microbatches(3).with_recomputed(1),
    ]
}

const TOKENS: usize = 48;

/// Trains on every rank of a strategy, and compares parameters, gradients, optimizer state,
/// transfers and operations with the plan. Returns each rank's plan and the bytes of its peak.
fn compare(what: &str, dtype: DType, config: &DecoderConfig, strategy: &Strategy) -> Vec<(Preview, u64)> {
    let batch = strategy.sequences * strategy.microbatches * strategy.data;
    let job = Job::train(config.clone(), dtype, batch, TOKENS);
    let run = match (dtype, strategy.sequence_parallel) {
        (DType::F32, false) => train::<Replicated, f32>,
        (DType::F32, true) => train::<Shard<0>, f32>,
        (_, false) => train::<Replicated, bf16>,
        (_, true) => train::<Shard<0>, bf16>,
    };
    let reals = launch::threads(strategy.ranks(), |world| run(&world, config, strategy, TOKENS)).unwrap();
    let each = |(rank, real): (usize, Real)| {
        let plan = Preview::new(&job, strategy, rank).unwrap();
        let (what, traffic) = (format!("{what}, {strategy}, rank {rank}"), plan.traffic.clone());
        assert_eq!(real.tensor, traffic.tensor, "tensor parallel, {what}");
        assert_eq!(real.data, traffic.data, "data parallel, {what}");
        // The two ends of a pipeline are a part of its group.
        let mut pipeline = traffic.pipeline;
        pipeline.extend(traffic.ends);
        assert_eq!(real.pipeline, pipeline, "pipeline, {what}");
        assert_eq!(real.flops, plan.flops, "{what}");
        assert_eq!(real.parts, [plan.memory.weights, plan.gradients, plan.memory.optimizer], "{what}");
        (plan, real.peak)
    };
    reals.into_iter().enumerate().map(each).collect()
}

/// The peak is the planned one and what a plan does not count: the blocks that products pack, the
/// sums of a product in bf16, the tiles of attention's scores, and on threads the tensor of a
/// started collective, which lives until the other ranks have read it.
#[test]
fn ranks_hold_compute_and_move_what_is_planned() {
    let mut ranks = 0;
    for (name, dtype, config) in models() {
        for strategy in strategies() {
            for (plan, peak) in compare(name, dtype, &config, &strategy) {
                let rows = (strategy.sequences * TOKENS) as u64;
                let scratch = 2 * 4 * rows * 2 * config.block.ffn as u64 + (1 << 16);
                let bytes = |(transfer, _): (&Transfer, &u64)| transfer.bytes() as u64;
                let reduced: u64 = plan.traffic.data.iter().map(bytes).sum();
                let started = plan.traffic.tensor.iter().map(bytes).max().unwrap_or(0);
                let planned = plan.memory.total();
                let most = planned + scratch + reduced + 2 * started;
                assert!(
                    (planned..=most).contains(&peak),
                    "{name}, {strategy}: {:?}, but {peak} bytes",
                    plan.memory
                );
                ranks += 1;
            }
        }
    }
    assert_eq!(ranks, 3 * strategies().iter().map(Strategy::ranks).sum::<usize>());
}

/// In a larger model, what a plan does not count is less than 2 %.
#[test]
fn peaks_of_a_larger_model_are_within_2_percent() {
    let attention = AttentionConfig::new(256, 8).with_choices(AttentionChoices::CAUSAL);
    let norm = NormKind::RmsNorm { eps: 1e-5 };
    let block = BlockConfig::new(attention, 500, Activation::Silu, norm).with_gate(true);
    let config = DecoderConfig::new(211, block, 16);
    let mesh = |pipeline, tensor| Strategy::new(1, pipeline, tensor, 2).with_microbatches(2);
    for strategy in [mesh(1, 1), mesh(1, 2), mesh(2, 1), mesh(1, 3).with_sequence_parallel(true)] {
        for (plan, peak) in compare("large", DType::F32, &config, &strategy) {
            let error = plan.memory.total() as f64 / peak as f64 - 1.0;
            assert!(error.abs() <= 0.02, "{strategy}: {:?}, but {peak} bytes", plan.memory);
        }
    }
}

fn machine(ranks: usize) -> Machine {
    let mut machine = Machine::preset("a100-80g").unwrap().with_ranks(ranks);
    machine.ranks_per_node = ranks.min(4);
    machine
}

/// The memory of a plan's pipeline ranks is the largest of their tensor-parallel ranks.
#[test]
fn plans_have_the_memory_of_their_fullest_ranks() {
    for (name, dtype, config) in models() {
        let job = Job::train(config, dtype, 12, TOKENS);
        let plans = plan(&job, &machine(6)).unwrap();
        assert_eq!(plans.best.len(), 10, "{name}");
        for plan in &plans.best {
            let strategy = plan.strategy;
            for (number, rank) in plan.ranks.iter().enumerate() {
                let first = number * strategy.tensor;
                let all = (first..first + strategy.tensor)
                    .map(|rank| Preview::new(&job, &strategy, rank).unwrap().memory.total());
                assert_eq!(Some(rank.memory.total()), all.max(), "{name}, {strategy}, stage {number}");
            }
        }
    }
}

/// The search skips most strategies. Its best is the best of all, each planned by itself.
#[test]
fn the_best_plan_is_the_best_of_all_strategies() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let job = Job::train(config, dtype, 8, TOKENS);
    let mut machine = machine(4);
    let unlimited = plan(&job, &machine).unwrap();
    // With half of the memory that the best plan needs, other plans are best, some of them with
    // recomputation.
    let fullest = unlimited.best[0].ranks.iter().map(|rank| rank.memory.total()).max().unwrap();
    for memory in [machine.memory, 2 * fullest / 3, fullest / 2, fullest / 3] {
        machine.memory = memory;
        let plans = plan(&job, &machine).unwrap();
        let mut all = Vec::new();
        for (data, pipeline, tensor) in meshes(4) {
            for sequences in [1, 2, 4, 8] {
                for sp in [false, true] {
                    let limits = Limits::default()
                        .with_data(data)
                        .with_pipeline(pipeline)
                        .with_tensor(tensor)
                        .with_sequences(sequences)
                        .with_sequence_parallel(sp);
                    all.extend(plan_within(&job, &machine, &limits).unwrap().best);
                }
            }
        }
        let fitting = |plans: &[Plan]| -> Vec<f64> {
            let fits = plans.iter().filter(|plan| plan.verdict == Verdict::Fits);
            fits.map(|plan| plan.seconds).collect()
        };
        let best = fitting(&all).into_iter().fold(f64::INFINITY, f64::min);
        let found = fitting(&plans.best).first().copied().unwrap_or(f64::INFINITY);
        assert!(best.is_finite() && found == best, "{memory} bytes: {found} s, but {best} s");
        assert!(plans.best.iter().all(|plan| plan.verdict != Verdict::OutOfMemory));
    }
    machine.memory = 1 << 16;
    let none = plan(&job, &machine).unwrap();
    assert!(none.best.is_empty());
    assert!(none.refused[0].reason.starts_with("out of memory: dp "), "{:?}", none.refused);
    assert!(none.considered > 20);
}

fn meshes(ranks: usize) -> Vec<(usize, usize, usize)> {
    let sizes = (1..=ranks).flat_map(|data| (1..=ranks).map(move |pipeline| (data, pipeline)));
    let all = sizes.flat_map(|(data, pipeline)| (1..=ranks).map(move |tensor| (data, pipeline, tensor)));
    all.filter(|(data, pipeline, tensor)| data * pipeline * tensor <= ranks).collect()
}

/// A plan recomputes as few blocks as it can.
#[test]
fn one_recomputed_block_less_does_not_fit() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let job = Job::train(config, dtype, 8, TOKENS);
    let limits = Limits::default().with_data(1).with_pipeline(1).with_tensor(1).with_sequences(4);
    let mut machine = machine(1);
    let peak = |strategy: &Strategy| Preview::new(&job, strategy, 0).unwrap().memory.total();
    let strategy = plan_within(&job, &machine, &limits).unwrap().best[0].strategy;
    let [none, all] = [0, 5].map(|recomputed| peak(&strategy.with_recomputed(recomputed)));
    assert!(all < none);
    machine.fits = 1.0;
    machine.tight = 1.0;
    machine.memory = (none + all) / 2;
    let best = plan_within(&job, &machine, &limits).unwrap().best[0].strategy;
    assert!(best.recomputed > 0 && peak(&best) <= machine.memory);
    assert!(peak(&best.with_recomputed(best.recomputed - 1)) > machine.memory);
}

/// A slow network makes one node the best answer, and slow links one rank.
#[test]
fn fewer_ranks_are_an_answer() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let job = Job::train(config, dtype, 8, TOKENS);
    let mut machine = machine(8);
    machine.network.latency = 10.0;
    let best = plan(&job, &machine).unwrap().best[0].strategy;
    assert!((2..=4).contains(&best.ranks()), "{best}");
    machine.node.latency = 10.0;
    assert_eq!(plan(&job, &machine).unwrap().best[0].strategy.ranks(), 1);
}

#[test]
fn serving_holds_the_cache_and_reads_every_weight() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let (batch, context) = (6, 100);
    let job = Job::serve(config.clone(), dtype, batch, context);
    let plans = plan(&job, &machine(6)).unwrap();
    assert!(plans.best.len() > 3);
    for plan in &plans.best {
        let Strategy { data, tensor, sequences, .. } = plan.strategy;
        assert_eq!(sequences, batch.div_ceil(data));
        let heads = Heads::new(8, 2, 16, tensor).unwrap();
        let heads = (0..tensor).map(|rank| heads.kv_range(rank).len()).max().unwrap();
        let cache = 2 * config.layers.len() * heads * 16 * sequences * context * 4;
        assert_eq!(plan.ranks[0].memory.cache, cache as u64, "{}", plan.strategy);
        assert!(plan.prefill.unwrap() > plan.seconds);
    }
    let one = plans.best.iter().find(|plan| plan.strategy.tensor == 1).unwrap();
    let attention = 128 * 128 * 2 + 2 * 128 * 32;
    let elements = 2 * 211 * 128 + 5 * (attention + 3 * 128 * 350 + 2 * 128) + 128;
    assert_eq!(one.ranks[0].memory.weights, 4 * elements as u64);
}

#[test]
fn bad_jobs_are_refused_with_what_would_work() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let job = Job::train(config.clone(), dtype, 8, TOKENS);
    let text = |job: &Job, machine: &Machine, limits: &Limits| {
        plan_within(job, machine, limits).unwrap_err().to_string()
    };
    let refused = |limits: Limits| text(&job, &machine(16), &limits);
    let limits = Limits::default();
    assert_eq!(
        refused(limits.with_tensor(9)),
        "plan: `tensor` is 9: the number of tensor-parallel ranks is between 1 and 8, the query heads in the model"
    );
    assert_eq!(
        refused(limits.with_data(16)),
        "plan: `data` is 16: the number of replicas is between 1 and 8, the sequences in a step"
    );
    assert_eq!(
        refused(limits.with_pipeline(6)),
        "plan: `pipeline` is 6: the number of pipeline ranks is between 1 and 5, the blocks in the model"
    );
    assert_eq!(
        refused(limits.with_tensor(8).with_data(4)),
        "plan: the limits need 32 ranks, but the machine has 16"
    );
    let empty = Job::train(config.clone(), dtype, 0, TOKENS);
    assert_eq!(text(&empty, &machine(1), &limits), "plan: a step of 0 sequences of 48 tokens");
    let mut slow = machine(2);
    slow.network.bandwidth = -1.0;
    assert_eq!(text(&job, &slow, &limits), "machine: `network.bandwidth` is -1, but has to be positive");
    let wide = Job::train(config, DType::F64, 8, TOKENS);
    assert!(text(&wide, &machine(1), &limits).contains("not supported"), "f64");
    let (_, dtype, gpt) = models().into_iter().last().unwrap();
    let long = Job::train(gpt, dtype, 8, 65);
    assert_eq!(
        text(&long, &machine(1), &limits),
        "plan: sequences of 65 tokens, but the model has 64 positions: use at most 64 tokens"
    );
}
