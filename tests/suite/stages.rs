//! Compares a decoder split into pipeline stages with the whole decoder.

use crate::{
    dev::{self, Dev, ranks},
    models::{DECODERS, decoder},
    support::{Assembled, difference},
};
use ndarray::ArrayD;
use shardwise::{
    Result,
    comm::{DeviceMesh, Group},
    kernels::{Activation, AttentionChoices, NormKind},
    models::{Decoder, DecoderConfig, DecoderEnds, Tokens},
    parallel::{AttentionConfig, BlockConfig, ResidualStream, Smoothing, VocabParallelCrossEntropy},
    shard::{Axis, Mesh, Replicated, Sequences, Shard},
    tensor::{Arrays, ParamRegion, Random, WeightSource},
    train::{Microbatch, Pipeline, Schedule},
};
use std::collections::BTreeMap;

const LOSS: VocabParallelCrossEntropy =
    VocabParallelCrossEntropy { smoothing: Smoothing::None, ignored: None, z: 1e-4 };
const SCALE: f64 = 1.0 / 24.0;

/// Returns the tokens of microbatch `at`: sequences of varying lengths.
fn batch(at: u32, words: usize) -> (Vec<u32>, Vec<u32>, Sequences) {
    let token = |place: u32| (at * 31 + place * place * 7 + 3) % words as u32;
    (
        (0..6).map(token).collect(),
        (1..7).map(token).collect(),
        Sequences::packed([at as usize % 3 + 2, 4 - at as usize % 3]),
    )
}

/// The loss of each microbatch, and the gradients of the model's tensors.
type Step = (Vec<f64>, BTreeMap<String, ArrayD<f64>>);

fn gradients(
    params: &[shardwise::tensor::Param<f64, Dev>],
) -> Result<Vec<(Vec<ParamRegion>, Vec<usize>, Vec<f64>)>> {
    let grad = |param: &shardwise::tensor::Param<f64, Dev>| {
        let grad = param.grad().unwrap_or_else(|| panic!("{} has no gradient", param.name()));
        Ok((param.regions().to_vec(), param.shape().dims().to_vec(), grad.to_vec()?))
    };
    params.iter().map(grad).collect()
}

fn assembled(
    ranks: impl IntoIterator<Item = Vec<(Vec<ParamRegion>, Vec<usize>, Vec<f64>)>>,
) -> BTreeMap<String, ArrayD<f64>> {
    let mut all = Assembled::default();
    for (regions, shape, values) in ranks.into_iter().flatten() {
        all.add(&regions, &shape, &values);
    }
    all.finish()
}

/// Runs the whole model on one rank.
fn whole(source: &(dyn WeightSource + Sync), config: &DecoderConfig, count: usize) -> Step {
    let steps = ranks(1).run(|group| {
        let model = Decoder::<Replicated, f64, Dev>::load(&group, source, config)?;
        let params = model.params();
        params.iter().for_each(|param| param.set_microbatches(count));
        let mut losses = Vec::new();
        for at in 0..count {
            let (ids, targets, sequences) = batch(at as u32, config.vocabulary);
            let (logits, saved) = model.forward(&ids, sequences)?;
            let (loss, of_loss) = LOSS.forward(logits, &targets)?;
            losses.push(loss.sum()?);
            model.backward(saved, LOSS.backward(of_loss, SCALE)?)?;
        }
        Ok((losses, gradients(&params)?))
    });
    let (losses, grads) = steps.unwrap().remove(0);
    (losses, assembled([grads]))
}

/// Runs the stages on `pp` pipeline ranks of `tp` tensor-parallel ranks each.
fn staged<S: ResidualStream>(
    source: &(dyn WeightSource + Sync),
    config: &DecoderConfig,
    (pp, tp): (usize, usize),
    schedule: &Schedule,
) -> Step {
    let steps = ranks(pp * tp).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, pp, tp)?)?;
        let (stages, tensor) = (mesh.group(Axis::Pipeline), mesh.group(Axis::Tensor));
        let model = Decoder::<S, f64, Dev>::load_stages(tensor, source, config, schedule, stages.rank())?;
        let (params, count) = (model.params(), schedule.microbatches());
        params.iter().for_each(|param| param.set_microbatches(count));
        let pipeline = Pipeline::new(stages, tensor, schedule.clone(), config.hidden())?;
        let batches: Vec<_> = (0..count).map(|at| batch(at as u32, config.vocabulary)).collect();
        let described: Vec<_> = batches
            .iter()
            .map(|(.., sequences)| Microbatch { sequences: sequences.clone(), dropout: None })
            .collect();
        let tokens = || batches.iter().map(|(ids, targets, _)| Tokens { ids, targets }).collect();
        let mut seen = DecoderEnds::new(&model, tokens(), LOSS, None);
        pipeline.evaluate(model.chunks(), &described, &mut seen)?;
        let mut ends = DecoderEnds::new(&model, tokens(), LOSS, Some(SCALE));
        pipeline.run(model.chunks(), &described, &mut ends)?;
        if let Some(table) = model.tied() {
            pipeline.sum_tied(&table)?;
        }
        let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(seen.losses()), bits(ends.losses()), "evaluation");
        Ok((pipeline.is_last().then(|| ends.losses().to_vec()), gradients(&params)?))
    });
    let steps = steps.unwrap();
    let losses = steps.iter().find_map(|(losses, _)| losses.clone()).unwrap();
    (losses, assembled(steps.into_iter().map(|(_, grads)| grads)))
}

#[track_caller]
fn agree(what: &str, (losses, grads): &Step, (want_losses, want): &Step) {
    assert_eq!(losses.len(), want_losses.len());
    for (got, want) in losses.iter().zip(want_losses) {
        assert!((got - want).abs() <= 1e-12 * want.abs(), "{what}: loss {got}, not {want}");
    }
    assert_eq!(grads.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    for (name, want) in want {
        let error = difference(&grads[name], want);
        assert!(error <= 1e-11, "{what}, {name}: {error:e}");
    }
}

/// Compares checkpoints of every family: tied and untied, with transposed weights, and with a
/// prefix.
#[test]
fn every_family_is_split_into_stages() {
    for name in DECODERS {
        let (checkpoint, config) = decoder(name);
        let want = whole(&checkpoint, &config, 4);
        let one = Schedule::one_forward_one_backward(2, 4);
        agree(name, &staged::<Replicated>(&checkpoint, &config, (2, 1), &one), &want);
        agree(name, &staged::<Shard<0>>(&checkpoint, &config, (2, 3), &one), &want);
        let chunks = Schedule::interleaved(1, 2, 4).unwrap();
        agree(name, &staged::<Replicated>(&checkpoint, &config, (1, 2), &chunks), &want);
    }
}

/// Returns a configuration of seven blocks with different options.
fn config() -> DecoderConfig {
    let block = BlockConfig::new(
        AttentionConfig::new(8, 2).with_choices(AttentionChoices::CAUSAL),
        6,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-3 },
    )
    .with_gate(true);
    let mut config = DecoderConfig::new(13, block, 7);
    config.positions = Some(9);
    for (at, layer) in config.layers.iter_mut().enumerate().skip(1) {
        layer.attention.window = Some(at % 3 + 1);
        layer.attention.scale = (at % 2 == 0).then_some(0.3);
    }
    config
}

#[test]
fn stages_of_any_number_are_the_whole() {
    let source = Random::normal(2, 0.4);
    for tied in [true, false] {
        let mut config = config();
        (config.tied, config.recomputed) = (tied, 3);
        let want = whole(&source, &config, 6);
        for (pp, tp, schedule) in [
            (2, 1, Schedule::gpipe(2, 6)),
            (3, 2, Schedule::one_forward_one_backward(3, 6)),
            (3, 1, Schedule::interleaved(3, 2, 6).unwrap()),
            (7, 1, Schedule::one_forward_one_backward(7, 6)),
        ] {
            let what = format!("tied {tied}, {pp} x {tp}");
            agree(&what, &staged::<Replicated>(&source, &config, (pp, tp), &schedule), &want);
        }
    }
    // Without one of the blocks' options the loss differs, so the comparison above would detect a
    // stage with wrong options.
    let mut other = config();
    other.layers[5].attention.window = None;
    assert!((whole(&source, &other, 1).0[0] - whole(&source, &config(), 1).0[0]).abs() > 1e-9);
}

#[test]
fn what_is_no_part_of_the_model_is_refused() {
    let group = Group::solo(&dev::fresh());
    let source = Random::normal(1, 0.1);
    let load = |config: &DecoderConfig, schedule: &Schedule, rank: usize| {
        Decoder::<Replicated, f64, Dev>::load_stages(&group, &source, config, schedule, rank)
    };
    let refused = |config: &DecoderConfig, schedule: Schedule, rank: usize| {
        load(config, &schedule, rank).err().unwrap().to_string()
    };
    assert_eq!(
        refused(&config(), Schedule::gpipe(2, 1), 2),
        "decoder: the rank in the pipeline is 2, but the number of ranks is 2"
    );
    let many = refused(&config(), Schedule::gpipe(8, 1), 0);
    assert_eq!(many, "decoder: the number of blocks is 7, but that of stages is 8");
    let none = refused(&config(), Schedule::custom(0, 1, vec![vec![]]), 0);
    assert_eq!(none, "decoder: the schedule has no ranks, or its ranks have no chunks");
    let mut changed = config();
    changed.block.attention.choices.scale = Some(2.0);
    let unused = refused(&changed, Schedule::gpipe(1, 1), 0);
    assert_eq!(
        unused,
        "decoder: no layer has the choices and the rope of `block.attention`: change `layers` too"
    );

    let first = load(&config(), &Schedule::gpipe(2, 1), 0).unwrap();
    let elsewhere = "decoder: this rank does not hold the last stage of the model: run it by a `Pipeline`";
    let ids = [1, 2];
    assert_eq!(first.forward(&ids, Sequences::one(2)).err().unwrap().to_string(), elsewhere);
    assert_eq!(first.infer(&ids, Sequences::one(2)).err().unwrap().to_string(), elsewhere);
    let mut cache = first.cache(1, 4).unwrap();
    assert_eq!(first.step(&ids, &[0], &[2], &mut cache).err().unwrap().to_string(), elsewhere);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(first.save(folder.path()).unwrap_err().to_string(), elsewhere);
    let all = load(&config(), &Schedule::gpipe(1, 1), 0).unwrap();
    let unread = all.save(folder.path()).unwrap_err().to_string();
    assert!(unread.contains("was not read from a `config.json`"), "{unread}");
    let mut dropping = config();
    dropping.dropout = 0.1;
    let drops = load(&dropping, &Schedule::gpipe(1, 1), 0).unwrap();
    let drawn = drops.forward(&ids, Sequences::one(2)).err().unwrap().to_string();
    assert!(drawn.contains("has dropout, but `forward` draws no masks"), "{drawn}");

    // First the ends have tokens for too few microbatches. Then the stages pass on a width that
    // differs from the announced one.
    let schedule = Schedule::gpipe(1, 2);
    let described = [Microbatch::rows(2), Microbatch::rows(2)];
    let tokens = || vec![Tokens { ids: &ids, targets: &ids }];
    let pipeline = Pipeline::new(&group, &group, schedule, 8).unwrap();
    let mut ends = DecoderEnds::new(&all, tokens(), LOSS, Some(1.0));
    let missing = pipeline.run(all.chunks(), &described, &mut ends).unwrap_err().to_string();
    assert_eq!(
        missing,
        "decoder: the number of the microbatch is 1, but the number of microbatches with tokens is 1"
    );
    let chunks = Schedule::interleaved(1, 2, 1).unwrap();
    let halves = load(&config(), &chunks, 0).unwrap();
    let pipeline = Pipeline::new(&group, &group, chunks, 9).unwrap();
    let mut ends = DecoderEnds::new(&halves, tokens(), LOSS, Some(1.0));
    let wide = pipeline.run(halves.chunks(), &described[..1], &mut ends).unwrap_err().to_string();
    assert_eq!(
        wide,
        "pipeline: the features of a stage's output is 8, but those of the next stage's input is 9"
    );
}

/// Every rank rejects a tensor of a block that the configuration does not have, whichever stages
/// the rank holds.
#[test]
fn a_checkpoint_of_more_blocks_is_refused_on_every_rank() {
    let (checkpoint, config) = decoder("llama");
    let mut all = Arrays::default();
    for name in checkpoint.names() {
        all.0.insert(name.into(), ArrayD::zeros(checkpoint.shape(name).unwrap()));
    }
    let load = |all: &Arrays, rank: usize| {
        let group = Group::solo(&dev::fresh());
        Decoder::<Replicated, f32, Dev>::load_stages(&group, all, &config, &Schedule::gpipe(2, 1), rank)
            .map(drop)
    };
    for rank in 0..2 {
        load(&all, rank).unwrap();
        for name in
            ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.sinks", "model.norm.scale"]
        {
            let mut more = all.clone();
            more.0.insert(name.into(), ArrayD::zeros(vec![2, 2]));
            let found = load(&more, rank).err().map(|error| error.to_string());
            // An unknown tensor of an existing block is rejected only by the rank that holds the
            // block.
            if name.contains("layers.0") && rank == 1 {
                assert_eq!(found, None);
                continue;
            }
            assert!(found.as_ref().is_some_and(|found| found.contains(name)), "{name} on {rank}: {found:?}");
        }
    }
}
