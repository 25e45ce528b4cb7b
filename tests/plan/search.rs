//! The search for plans: its best is the best of all, and bad jobs are refused.

use crate::{TOKENS, models};
use shardwise::{
    device::DType,
    plan::{
        Goal, Job, Limits, Machine, Plan, Preview, Run, Strategy, Verdict, parts, plan, plan_within, predict,
    },
    shard::Heads,
    weights::{Packing, PackingMethod},
};

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

/// A strategy that is planned by itself has the plan that the search finds, and its parts are its
/// seconds.
#[test]
fn a_strategy_has_the_plan_of_the_search() {
    for (name, dtype, config) in models() {
        for job in [Job::train(config.clone(), dtype, 8, TOKENS), Job::serve(config, dtype, 8, TOKENS)] {
            let machine = machine(4);
            let plans = plan(&job, &machine).unwrap().best;
            assert!(!plans.is_empty(), "{name}");
            for best in plans {
                let strategy = best.strategy;
                assert_eq!(predict(&job, &machine, &strategy).unwrap(), best, "{name}, {strategy}");
                let parts = parts(&job, &machine, &strategy).unwrap();
                let (total, seconds) = (parts.total(), best.seconds);
                assert!((total / seconds - 1.0).abs() < 1e-6, "{name}, {strategy}: {total} and {seconds}");
                // The replicas of generation do not communicate.
                let ranks =
                    if let Goal::Serve { .. } = job.goal { strategy.tensor } else { strategy.ranks() };
                assert_eq!(parts.transfers > 0.0, ranks > 1, "{name}, {strategy}: {parts:?}");
            }
        }
    }
}

/// On two cores, four ranks that compute all the time take twice as long. Ranks of a pipeline that
/// wait leave their core to others.
#[test]
fn more_ranks_than_cores_take_turns_and_share_the_memory() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let job = Job::train(config, dtype, 8, TOKENS);
    let (mut machine, mut crowded) = (machine(4), machine(4));
    crowded.rates[0].ranks = 2;
    let (tensor, pipeline) = (Strategy::new(1, 1, 4, 8), Strategy::new(1, 4, 1, 1).with_microbatches(8));
    let slower = |strategy| {
        let seconds = |machine| predict(&job, machine, &strategy).unwrap().seconds;
        seconds(&crowded) / seconds(&machine)
    };
    let (tensor_parallel, pipelined) = (slower(tensor), slower(pipeline));
    assert!((1.9..=2.0).contains(&tensor_parallel), "{tensor_parallel}");
    assert!((1.0..1.9).contains(&pipelined), "{pipelined}");

    let peak = predict(&job, &machine, &tensor).unwrap().ranks[0].memory.total();
    machine.memory = 2 * peak;
    let verdict = |machine: &Machine| predict(&job, machine, &tensor).unwrap().verdict;
    assert_eq!(verdict(&machine), Verdict::Fits);
    machine.shares_memory = true;
    assert_eq!(verdict(&machine), Verdict::OutOfMemory);
    machine.memory = 8 * peak;
    assert_eq!(verdict(&machine), Verdict::Fits);
}

/// Steps that took twice as long as predicted calibrate the predictions of their goal.
#[test]
fn runs_calibrate_predictions() {
    let (_, dtype, config) = models().into_iter().next().unwrap();
    let train = Job::train(config.clone(), dtype, 8, TOKENS);
    let serve = Job::serve(config, dtype, 8, TOKENS);
    let (mut machine, strategy) = (machine(2), Strategy::new(1, 1, 2, 8));
    let seconds = |machine: &Machine, job| predict(job, machine, &strategy).unwrap().seconds;
    let (trained, served) = (seconds(&machine, &train), seconds(&machine, &serve));
    let parts = parts(&train, &machine, &strategy).unwrap();
    machine.runs = vec![Run::new("a step", &train.goal, parts, 2.0 * trained); 5];
    let calibrated = seconds(&machine, &train) / trained;
    assert!((calibrated / 2.0 - 1.0).abs() < 0.02, "{calibrated}");
    assert_eq!(seconds(&machine, &serve), served);
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
                    // Some microbatches are larger than a replica's batch.
                    let plans = plan_within(&job, &machine, &limits);
                    all.extend(plans.map(|plans| plans.best).unwrap_or_default());
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
    machine.network.as_mut().unwrap().latency = 10.0;
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
    // Generation has no pipelines, so their sizes are not refused.
    assert!(plans.refused.iter().all(|refusal| !refusal.reason.contains("pipeline")), "{:?}", plans.refused);
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
    assert_eq!(
        refused(limits.with_data(1).with_sequences(5)),
        "plan: no strategy keeps the limits: 8 sequences cannot be divided over these replicas and microbatches"
    );
    let serve = Job::serve(config.clone(), dtype, 8, TOKENS);
    for (limits, what) in [
        (limits.with_pipeline(2), "a pipeline"),
        (limits.with_sequences(2), "microbatches"),
        (limits.with_sequence_parallel(true), "sequence parallelism"),
    ] {
        let words = format!("plan: not supported: generation with {what}: use data and tensor parallelism");
        assert_eq!(text(&serve, &machine(4), &limits), words);
    }
    let empty = Job::train(config.clone(), dtype, 0, TOKENS);
    assert_eq!(text(&empty, &machine(1), &limits), "plan: a step of 0 sequences of 48 tokens");
    for (job, words) in [
        (Job::train(config.clone(), dtype, 1 << 40, TOKENS), "1099511627776 sequences; at most 1048576"),
        (Job::train(config.clone(), dtype, 8, 1 << 40), "1099511627776 tokens; at most 4194304"),
        (Job::serve(config.clone(), dtype, 20000, TOKENS), "20000 sequences; at most 16384"),
        (Job::serve(config.clone(), dtype, 8, 1 << 40), "1099511627776 tokens; at most 4194304"),
    ] {
        let got = text(&job, &machine(1), &limits);
        assert!(got.contains(words), "{got}");
    }
    let mut quantized = config.clone();
    quantized.packing = Some(Packing { method: PackingMethod::Awq, tiles: Vec::new() });
    let got = text(&Job::serve(quantized, dtype, 8, TOKENS), &machine(1), &limits);
    assert!(got.contains("the checkpoint is quantized"), "{got}");
    let mut endless = machine(2);
    endless.rates[0].launch = 1e308;
    let serve = Job::serve(config.clone(), dtype, 8, TOKENS);
    let got = text(&serve, &endless, &limits);
    assert!(got.contains("a prefill takes inf seconds"), "{got}");
    let mut slow = machine(2);
    slow.node.bandwidth = 1e-305;
    let got = text(&job, &slow, &limits.with_data(2));
    assert!(got.contains("the reduction of gradients takes inf seconds"), "{got}");
    let mut slow = machine(2);
    slow.network.as_mut().unwrap().bandwidth = -1.0;
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
