//! Timed steps: each does what is planned, and takes the same time on all ranks.

use crate::models;
use shardwise::{
    Error, Result,
    comm::Group,
    device::{Cpu, DType},
    launch,
    plan::{Job, Limits, Machine, Preview, Strategy, plan_within, time_steps},
};

const TOKENS: usize = 12;

/// Times steps on all ranks, checks the times, and returns the operations of each rank.
fn run(what: &str, job: &Job, strategy: &Strategy, steps: usize) -> Vec<u64> {
    let rank = |world: Group<Cpu>| Ok((time_steps(&world, job, strategy, steps)?, world.device().flops()));
    let ranks = launch::threads(strategy.ranks(), rank).unwrap();
    for (seconds, _) in &ranks {
        assert_eq!(seconds.len(), steps, "{what}, {strategy}");
        assert!(seconds.iter().all(|&s| s > 0.0 && s.is_finite()), "{what}, {strategy}: {seconds:?}");
        assert_eq!(*seconds, ranks[0].0, "{what}, {strategy}");
    }
    ranks.into_iter().map(|(_, flops)| flops).collect()
}

#[test]
fn timed_steps_of_training_compute_what_is_planned() {
    let [llama, windows, gpt] = models().map(|(.., config)| config);
    let mut dropout = gpt.clone();
    dropout.dropout = 0.1;
    let mesh = |data, pipeline, tensor| Strategy::new(data, pipeline, tensor, 2);
    for (what, dtype, config, strategy) in [
        ("llama", DType::F32, &llama, mesh(2, 1, 1).with_microbatches(2)),
        ("llama", DType::F16, &llama, mesh(1, 1, 2).with_sequence_parallel(true)),
        ("windows", DType::BF16, &windows, mesh(1, 1, 3)),
        ("windows", DType::F16, &windows, mesh(1, 1, 1).with_microbatches(2).with_recomputed(3)),
        ("gpt", DType::F32, &gpt, mesh(1, 2, 1).with_microbatches(2).with_chunks(2)),
        ("dropout", DType::BF16, &dropout, mesh(2, 1, 2).with_sequence_parallel(true)),
    ] {
        let job = Job::train(config.clone(), dtype, 8, TOKENS);
        for (rank, flops) in run(what, &job, &strategy, 2).into_iter().enumerate() {
            let planned = Preview::new(&job, &strategy, rank).unwrap().flops;
            assert_eq!(flops, 3 * planned, "{what}, {strategy}, rank {rank}");
        }
    }
}

#[test]
fn timed_steps_of_serving_compute_what_is_planned() {
    let meshes = [(1, 2), (2, 1), (2, 2)];
    for ((what, dtype, mut config), (data, tensor)) in models().into_iter().zip(meshes) {
        // All tensor-parallel ranks then have equal shards.
        (config.vocabulary, config.block.ffn) = (212, 352);
        let job = Job::serve(config, dtype, 6, TOKENS);
        let machine = Machine::preset("a100-80g").unwrap().with_ranks(4);
        let limits = Limits::default().with_data(data).with_tensor(tensor);
        let plan = plan_within(&job, &machine, &limits).unwrap().best.remove(0);
        let flops = |steps| run(what, &job, &plan.strategy, steps).iter().sum::<u64>();
        assert_eq!(flops(3) - flops(1), 2 * plan.flops, "{what}, {}", plan.strategy);
    }
}

#[test]
fn steps_that_cannot_be_timed_are_refused() {
    let [llama, _, gpt] = models().map(|(.., config)| config);
    let train = |tokens| Job::train(gpt.clone(), DType::F32, 2, tokens);
    let serve = |context| Job::serve(gpt.clone(), DType::F32, 2, context);
    let error = |job: &Job, strategy: Strategy, steps| -> Error {
        let run = |world: Group<Cpu>| -> Result<_> { time_steps(&world, job, &strategy, steps) };
        run(Group::solo(&Cpu::new())).unwrap_err()
    };
    let one = Strategy::new(1, 1, 1, 2);
    for (job, strategy, steps, expected) in [
        (train(12), Strategy::new(1, 1, 2, 2), 1, "the ranks of the strategy is 2"),
        (train(12), one.with_chunks(5), 1, "the number of blocks is 4"),
        (train(12), one, 0, "`steps` is 0"),
        (train(12), Strategy::new(1, 1, 1, 0), 1, "`sequences` is 0"),
        (train(65), one, 1, "the tokens of a sequence is 65"),
        (train(0), one, 1, "2 sequences of 0 tokens"),
        (serve(65), one, 1, "the tokens of a sequence is 65"),
        (serve(1), one, 1, "2 sequences of 1 tokens"),
        (Job::train(llama.clone(), DType::F32, 2, usize::MAX), one, 1, "at most 4294967295"),
    ] {
        let error = error(&job, strategy, steps).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let f64 = |job: Job| {
        let mut job = job;
        job.dtype = DType::F64;
        job
    };
    for (job, strategy) in [
        (f64(train(12)), one),
        (f64(serve(12)), one),
        (serve(12), one.with_chunks(2)),
        (serve(12), one.with_microbatches(2)),
        (serve(12), one.with_recomputed(1)),
        (serve(12), one.with_sequence_parallel(true)),
    ] {
        let error = error(&job, strategy, 1);
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    let pipeline = Strategy::new(1, 2, 1, 2);
    let job = serve(12);
    let outcomes = launch::Threads::new(2).run_each(|world| time_steps(&world, &job, &pipeline, 1)).unwrap();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Unsupported { .. }))), "{outcomes:?}");
}
