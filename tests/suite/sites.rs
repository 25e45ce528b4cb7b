//! The call sites in errors and records: the layer's path, or a line of the user's program, never a
//! line of the library.

use shardwise::{
    Error, Result, Site, Tensor,
    comm::{DeviceMesh, Group, Overlap, ReduceOp},
    device::Cpu,
    kernels::{Activation, AttentionChoices, NormKind},
    launch::Threads,
    models::{Bert, Decoder, ModelConfig},
    optim::grad_norm,
    parallel::{
        AddBias, AttentionConfig, Bias, BlockConfig, BlockNames, BoxLayer, Chain, ColumnLinear,
        ColumnParallelLinear, Columns, Context, CopyTo, CrossEntropySaved, DTensor, GatherFrom,
        GatherSequence, Layer, MlpNames, Normalize, ParallelAttention, ParallelMlp, QkvLayout, Recompute,
        ReduceFrom, ReduceScatterSequence, ResidualStream, RowParallelLinear, Sampler, ScatterSequence,
        ScatterTo, TransformerBlock, VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    shard::{Copied, Mesh, Partial, Partition, Placement, Reduction, Replicated, Sequences, Shard},
    tensor::{Param, Random, Weights},
    trace,
    train::{DataParallel, GradReduce, Microbatch, Pipeline, PipelineEnds, Schedule, check_replicas},
    weights::{self, Checkpoint},
};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::Duration,
};

type Distributed<P> = DTensor<P, f32, Cpu>;

const HIDDEN: usize = 12;
const TOKENS: usize = 6;

/// Returns the sites of the collectives that this rank makes in `act`, without consecutive
/// duplicates.
fn sites(act: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    let calls = || trace::snapshot().entries.into_iter().filter(|entry| entry.group.is_some());
    let before = calls().count();
    act()?;
    let mut sites: Vec<_> = calls().skip(before).map(|entry| entry.site).collect();
    sites.dedup();
    Ok(sites)
}

fn layer(path: &str) -> String {
    format!("layer `{path}`")
}

fn input<P: Placement>(
    group: &Group<Cpu>,
    rows: usize,
    make: impl Fn(Tensor<f32>) -> Result<Distributed<P>>,
) -> Result<Distributed<P>> {
    make(Tensor::full(group.device(), [rows, HIDDEN], 0.5)?)
}

fn replicated(group: &Group<Cpu>) -> Result<Distributed<Replicated>> {
    input(group, TOKENS, |x| DTensor::replicated(group, x))
}

fn stream<S: ResidualStream>(group: &Group<Cpu>) -> Result<Distributed<S>> {
    let rows = S::local_rows(group, TOKENS)?.len();
    input(group, rows, |x| S::of_local(group, TOKENS, x))
}

/// Returns a tensor with sharded features.
fn features(group: &Group<Cpu>) -> Result<Distributed<Shard<1>>> {
    replicated(group)?.scatter::<1>(&Partition::even(HIDDEN, group.size()))
}

/// The fault of the last rank. It replaces this rank's forward or backward.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Fails,
    Differs,
    IsLate,
}

/// The last rank has a fault in the forward or the backward. Checks that every other rank's error
/// has this layer's path.
fn reported<L: Layer<f32, Cpu>>(
    path: &str,
    forward: bool,
    load: impl Fn(&Group<Cpu>, &Weights<'_>) -> Result<L> + Sync,
    x: impl Fn(&Group<Cpu>) -> Result<Distributed<L::In>> + Sync,
) where
    L::Out: Placement<Dual = L::Out>,
{
    // A deadline takes time, so it is tested only for the layers of a block.
    let faults = [(2, Fault::Fails), (3, Fault::Differs), (2, Fault::IsLate)];
    let count = if path.contains("layers") { 3 } else { 2 };
    for (world, fault) in faults.into_iter().take(count) {
        let has_error = AtomicBool::new(false);
        let source = Random::normal(1, 0.1);
        let rank = |group: Group<Cpu>| {
            let layer = load(&group, &Weights::new(&source).at("model"))?;
            let x = x(&group)?;
            let pass = |is_forward: bool, act: &mut dyn FnMut(&L) -> Result<()>| {
                if group.rank() + 1 < group.size() || is_forward != forward {
                    return act(&layer);
                }
                match fault {
                    Fault::Fails => Err(Error::invalid("test", "fails")),
                    Fault::Differs => group.barrier(),
                    Fault::IsLate => {
                        while !has_error.load(Ordering::SeqCst) {
                            sleep(Duration::from_millis(1));
                        }
                        Err(Error::invalid("test", "is late"))
                    }
                }
            };
            let mut kept = None;
            let forward = pass(true, &mut |layer| {
                kept = Some(layer.forward(x.clone())?);
                Ok(())
            });
            let outcome = forward.and_then(|()| {
                let (y, saved) = kept.expect("there was a forward");
                let mut saved = Some(saved);
                pass(false, &mut |layer| layer.backward(saved.take().expect("once"), y.clone()).map(drop))
            });
            has_error.store(true, Ordering::SeqCst);
            outcome
        };
        let deadline = Duration::from_millis(if fault == Fault::IsLate { 500 } else { 60_000 });
        let outcomes = Threads::new(world).deadline(deadline).run_each(rank).unwrap();
        let expected = layer(path);
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            if rank + 1 == world && fault != Fault::Differs {
                continue;
            }
            let error = outcome.unwrap_err();
            let right = match fault {
                Fault::Fails => matches!(error, Error::PeerLost { .. }),
                Fault::Differs => matches!(error, Error::Mismatch(_)),
                Fault::IsLate => matches!(error, Error::Deadline { .. }),
            };
            let text = error.to_string();
            assert!(right && text.contains(&expected), "{path}, {fault:?}, rank {rank}: {text}");
            assert!(!text.contains("src/"), "{text}");
        }
    }
}

fn llama() -> BlockConfig {
    let attention = AttentionConfig::new(HIDDEN, 3).with_choices(AttentionChoices::CAUSAL);
    BlockConfig::new(attention, 10, Activation::Silu, NormKind::RmsNorm { eps: 1e-5 })
        .with_gate(true)
        .with_names(BlockNames::llama())
}

#[test]
fn a_fault_in_a_layer_is_reported_by_its_path_on_every_rank() {
    type Column<S> = ColumnParallelLinear<S, f32, Cpu>;
    fn column<S: ResidualStream>(group: &Group<Cpu>, weights: &Weights<'_>) -> Result<Column<S>> {
        let columns = Columns::even(group, 9)?;
        ColumnParallelLinear::load(group, &weights.at("up"), HIDDEN, &columns, Bias::Add)
    }
    reported("model.up", false, column::<Replicated>, stream::<Replicated>);
    reported("model.up", true, column::<Shard<0>>, stream::<Shard<0>>);
    reported("model.up", false, column::<Shard<0>>, stream::<Shard<0>>);

    fn row<S: ResidualStream>(
        group: &Group<Cpu>,
        weights: &Weights<'_>,
    ) -> Result<RowParallelLinear<S, f32, Cpu>> {
        let partition = Partition::even(HIDDEN, group.size());
        RowParallelLinear::load(group, &weights.at("down"), &partition, 8, true)
    }
    reported("model.down", true, row::<Replicated>, features);
    reported("model.down", true, row::<Shard<0>>, features);
    reported("model.down", false, row::<Shard<0>>, features);

    fn norm<S: ResidualStream>(group: &Group<Cpu>, weights: &Weights<'_>) -> Result<Normalize<S, f32, Cpu>> {
        Normalize::load(group, &weights.at("norm"), NormKind::LayerNorm { eps: 1e-5 }, HIDDEN)
    }
    reported("model.norm", false, norm::<Shard<0>>, stream::<Shard<0>>);
    fn bias<S: ResidualStream>(group: &Group<Cpu>, weights: &Weights<'_>) -> Result<AddBias<S, f32, Cpu>> {
        AddBias::load(group, &weights.at("add"), HIDDEN)
    }
    reported("model.add", false, bias::<Shard<0>>, stream::<Shard<0>>);

    fn attention<S: ResidualStream>(
        group: &Group<Cpu>,
        weights: &Weights<'_>,
    ) -> Result<ParallelAttention<S, f32, Cpu>> {
        let layout = QkvLayout::separate("attn.q", "attn.k", "attn.v");
        ParallelAttention::load(group, weights, &layout, "attn.o", &AttentionConfig::new(HIDDEN, 3))
    }
    reported("model.attn.o", true, attention::<Replicated>, stream::<Replicated>);
    reported("model.attn", false, attention::<Replicated>, stream::<Replicated>);
    reported("model.attn", true, attention::<Shard<0>>, stream::<Shard<0>>);
    reported("model.attn.o", false, attention::<Shard<0>>, stream::<Shard<0>>);

    fn mlp<S: ResidualStream>(group: &Group<Cpu>, weights: &Weights<'_>) -> Result<ParallelMlp<S, f32, Cpu>> {
        let (names, sizes) = (MlpNames::default(), (HIDDEN, 10));
        ParallelMlp::load(group, &weights.at("mlp"), &names, sizes, Activation::GeluTanh, true)
    }
    reported("model.mlp.down", true, mlp::<Replicated>, stream::<Replicated>);
    reported("model.mlp.up", false, mlp::<Replicated>, stream::<Replicated>);
    reported("model.mlp.up", true, mlp::<Shard<0>>, stream::<Shard<0>>);
    reported("model.mlp.down", false, mlp::<Shard<0>>, stream::<Shard<0>>);
    fn gated<S: ResidualStream>(
        group: &Group<Cpu>,
        weights: &Weights<'_>,
    ) -> Result<ParallelMlp<S, f32, Cpu>> {
        let (names, sizes) = (MlpNames::default(), (HIDDEN, 10));
        ParallelMlp::load_gated(group, &weights.at("mlp"), &names, sizes, Activation::Silu, false)
    }
    reported("model.mlp", false, gated::<Replicated>, stream::<Replicated>);

    fn concatenated<S: ResidualStream>(
        group: &Group<Cpu>,
        weights: &Weights<'_>,
    ) -> Result<ColumnParallelLinear<S, f32, Cpu>> {
        let columns = Columns::even(group, 9)?;
        let load = |name| ColumnLinear::load(group, &weights.at(name), HIDDEN, &columns, Bias::Add);
        ColumnParallelLinear::concat(vec![load("first")?, load("second")?])
    }
    reported("model.first", true, concatenated::<Shard<0>>, stream::<Shard<0>>);
    reported("model.first", false, concatenated::<Replicated>, stream::<Replicated>);

    type Block<S> = TransformerBlock<S, f32, Cpu>;
    fn block<S: ResidualStream>(group: &Group<Cpu>, weights: &Weights<'_>) -> Result<Block<S>> {
        TransformerBlock::load(group, &weights.at("layers.3"), &llama())
    }
    reported("model.layers.3.self_attn.o_proj", true, block::<Replicated>, stream::<Replicated>);
    reported("model.layers.3.mlp", false, block::<Replicated>, stream::<Replicated>);
    reported("model.layers.3.self_attn", true, block::<Shard<0>>, stream::<Shard<0>>);
    reported("model.layers.3.mlp.down_proj", false, block::<Shard<0>>, stream::<Shard<0>>);
}

fn folder(name: &str) -> std::path::PathBuf {
    shardwise_tests::root().join("tests/data").join(name)
}

/// Returns the call sites of a model's forward and backward on 2 ranks. `change` may change the
/// group's reduction or overlap settings.
fn of_model<S: ResidualStream>(name: &str, change: impl Fn(Group<Cpu>) -> Group<Cpu> + Sync) -> Vec<String> {
    let (config, checkpoint) =
        (ModelConfig::read(folder(name)).unwrap(), Checkpoint::open(folder(name)).unwrap());
    let ids: Vec<u32> = (0..300).map(|at| at % 30 + 3).collect();
    let sequences = || Sequences::packed([30; 10]);
    let rank = |group: Group<Cpu>| {
        let group = change(group);
        match &config {
            ModelConfig::Decoder(config) => {
                let model = Decoder::<S, f32, Cpu>::load(&group, &checkpoint, config)?;
                sites(|| {
                    let (logits, saved) = model.forward(&ids, sequences())?;
                    model.backward(saved, logits)
                })
            }
            ModelConfig::Bert(config) => {
                let model = Bert::<S, f32, Cpu>::load(&group, &checkpoint, config)?;
                sites(|| {
                    let (y, saved) = model.forward(&ids, None, sequences())?;
                    model.backward(saved, y)
                })
            }
            other => panic!("{other:?}"),
        }
    };
    let mut ranks = Threads::new(2).run(rank).unwrap();
    let (second, first) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    assert_eq!(first, second, "{name}");
    first
}

#[test]
fn every_call_of_a_model_is_made_by_a_layer_of_the_checkpoint() {
    for name in ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bert"] {
        let checkpoint = Checkpoint::open(folder(name)).unwrap();
        let check = |sites: Vec<String>| {
            assert!(sites.len() > 5, "{sites:?}");
            for site in sites {
                let path = site.strip_prefix("layer `").and_then(|rest| rest.strip_suffix('`'));
                let path = format!("{}.", path.unwrap_or_else(|| panic!("{name}: {site}")));
                assert!(checkpoint.names().any(|name| name.starts_with(&path)), "{name}: {site}");
            }
        };
        check(of_model::<Replicated>(name, |group| group));
        check(of_model::<Shard<0>>(name, |group| group));
        check(of_model::<Shard<0>>(name, |group| group.with_overlap(Overlap::Chunks(2))));
        check(of_model::<Replicated>(name, |group| group.with_overlap(Overlap::Chunks(2))));
        check(of_model::<Shard<0>>(name, |group| group.with_reduction(Reduction::Invariant { blocks: 4 })));
        check(of_model::<Replicated>(name, |group| group.with_reduction(Reduction::Invariant { blocks: 4 })));
    }
    let layers = |paths: &[&str]| -> Vec<String> { paths.iter().map(|path| layer(path)).collect() };
    assert_eq!(
        of_model::<Replicated>("llama", |group| group),
        layers(&[
            "model.embed_tokens",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
            "model.layers.1.mlp",
            "model.layers.1.self_attn",
            "model.layers.0.mlp",
            "model.layers.0.self_attn",
        ])
    );
}

/// A layer that calls its group directly and through its residual stream.
struct Own;

impl Layer<f32, Cpu> for Own {
    type In = Shard<0>;
    type Out = Shard<0>;
    type Saved = ();

    fn forward(&self, x: Distributed<Shard<0>>) -> Result<(Distributed<Shard<0>>, ())> {
        let (group, mut sum) = (x.group().clone(), x.local().clone());
        group.all_reduce(ReduceOp::Sum, &mut sum)?;
        let entered = x.enter()?;
        let partial = DTensor::<Partial, f32, Cpu>::partial(&group, entered.into_local())?;
        Ok((partial.leave()?, ()))
    }

    fn backward(&self, (): (), dy: Distributed<Shard<0>>) -> Result<Distributed<Shard<0>>> {
        Ok(self.forward(dy)?.0)
    }
}

fn pass<L: Layer<f32, Cpu>>(layer: L, x: Distributed<L::In>) -> Result<()>
where
    L::Out: Placement<Dual = L::Out>,
{
    layer.infer(x.clone(), &mut Context::default())?;
    let (y, saved) = layer.forward(x)?;
    layer.backward(saved, y).map(drop)
}

/// Checks that every direct call in `act`, on a group of 2, has the site of the call.
fn calls(group: &Group<Cpu>, act: fn(&Group<Cpu>) -> Result<()>) -> Result<()> {
    let found = sites(|| act(group))?;
    assert!(!found.is_empty(), "there was no call");
    for site in found {
        assert!(site.starts_with("tests/suite/sites.rs:"), "{site}");
    }
    Ok(())
}

#[test]
fn calls_without_a_layer_are_reported_by_the_programs_line() {
    let run = |group: Group<Cpu>| {
        // Mappings: alone, in chains, lists and boxes, and recomputed.
        calls(&group, |group| {
            let sum = || CopyTo.then(AsTerm).then(ReduceFrom);
            pass(sum(), replicated(group)?)?;
            pass(Recompute::new(sum()), replicated(group)?)?;
            pass(Chain(ScatterTo::<1>::even(), GatherFrom::<1>), replicated(group)?)?;
            let rows = Chain(GatherSequence, AsTerm).then(ReduceScatterSequence);
            pass(Chain(ScatterSequence::even(), rows), replicated(group)?)?;
            pass(vec![sum()], replicated(group)?)?;
            pass(vec![BoxLayer::<Replicated, Replicated>::new(sum())], replicated(group)?)
        })?;
        calls(&group, |group| pass(Own, stream(group)?))?;
        // Sums and shards of distributed tensors.
        calls(&group, |group| {
            let x = replicated(group)?;
            let x = x.scatter::<0>(&group.even_partition(TOKENS)?)?.all_gather()?;
            DTensor::<Partial, f32, Cpu>::partial(group, x.into_local())?.start_all_reduce()?.wait().map(drop)
        })?;
        // Losses and samples.
        calls(&group, |group| {
            let loss = VocabParallelCrossEntropy::default();
            let (_, saved): (_, CrossEntropySaved<f32, Cpu>) =
                loss.forward(features(group)?, &[1; TOKENS])?;
            loss.backward(saved, 1.0)?;
            let random = Sampler { temperature: 1.0, ..Sampler::greedy() };
            for sampler in [
                Sampler::greedy(),
                Sampler { top_k: Some(3), ..random.clone() },
                Sampler { top_p: Some(0.5), ..random },
            ] {
                sampler.sample(&features(group)?, &[0; TOKENS])?;
            }
            Sampler::log_probabilities(&features(group)?, &[1; TOKENS]).map(drop)
        })?;
        // Training.
        for group in [group.clone(), group.with_reduction(Reduction::Invariant { blocks: 4 })] {
            calls(&group, |group| {
                let (source, weights) = (Random::normal(1, 0.1), |source| Weights::new(source).at("l"));
                let solo = Group::solo(group.device()).with_reduction(group.reduction());
                let columns = Columns::even(&solo, 8)?;
                let model =
                    ColumnLinear::<f32, Cpu>::load(&solo, &weights(&source), HIDDEN, &columns, Bias::Add)?;
                let replicas = DataParallel::new(group, &model.params())?;
                replicas.begin(GradReduce::Sum)?;
                let x = replicated(&solo)?.copy_to();
                let (y, saved) = model.forward(x)?;
                model.backward(saved, y)?;
                replicas.finish()?;
                replicas.sum(&[1.0])?;
                check_replicas(&model.params(), group)
            })?;
            calls(&group, |group| {
                let (source, columns) = (Random::normal(1, 0.1), Columns::even(group, 8)?);
                let weights = Weights::new(&source).at("l");
                let model = ColumnLinear::<f32, Cpu>::load(group, &weights, HIDDEN, &columns, Bias::Add)?;
                grad_norm(&model.params(), &[group])?;
                let folder = if group.rank() == 0 { Some(tempfile::tempdir().unwrap()) } else { None };
                let path = folder.as_ref().map_or(Path::new("none"), |folder| folder.path());
                weights::save(group, &model.params(), path)
            })?;
        }
        calls(&group, |group| {
            let source = Random::normal(1, 0.1);
            let weights = Weights::new(&source).at("l");
            let region = shardwise::tensor::Region::whole([3]);
            let param = Param::<f32, Cpu>::load_region(
                group.device(),
                &weights,
                "bias",
                shardwise::tensor::Role::Bias,
                region,
                true,
            )?;
            let replicas = DataParallel::central(group, &[param], 1)?;
            replicas.begin(GradReduce::Mean { weight: 1.0 })?;
            replicas.finish()?;
            replicas.publish()
        })?;
        calls(&group, |group| {
            let chunks = [Vec::<BoxLayer<Replicated, Replicated>>::new()];
            let schedule = Schedule::gpipe(group.size(), 2);
            let solo = Group::solo(group.device());
            let pipeline = Pipeline::new(group, &solo, schedule, HIDDEN)?;
            pipeline.run(&chunks, &[Microbatch::rows(TOKENS), Microbatch::rows(TOKENS)], &mut Through(solo))
        })?;
        calls(&group, |group| DeviceMesh::new(group, Mesh::new(1, 1, 2)?).map(drop))?;
        Ok(())
    };
    Threads::new(2).run(run).unwrap();
}

/// Interprets each rank's tensor as its term of a sum.
struct AsTerm;

impl Layer<f32, Cpu> for AsTerm {
    type In = Copied;
    type Out = Partial;
    type Saved = ();

    fn forward(&self, x: Distributed<Copied>) -> Result<(Distributed<Partial>, ())> {
        let group = x.group().clone();
        Ok((DTensor::partial(&group, x.into_local())?, ()))
    }

    fn backward(&self, (): (), dy: Distributed<Copied>) -> Result<Distributed<Partial>> {
        Ok(self.forward(dy)?.0)
    }
}

/// Pipeline ends that return the pipeline's output as the gradient of the output.
struct Through(Group<Cpu>);

impl PipelineEnds<Replicated, f32, Cpu> for Through {
    fn input(&mut self, _: usize, _: &Microbatch) -> Result<Distributed<Replicated>> {
        replicated(&self.0)
    }

    fn input_grad(&mut self, _: usize, _: Distributed<Replicated>) -> Result<()> {
        Ok(())
    }

    fn loss(&mut self, _: usize, y: Distributed<Replicated>) -> Result<Option<Distributed<Replicated>>> {
        Ok(Some(y))
    }
}

#[test]
fn own_layers_and_embeddings_say_where_they_are() {
    let source = Random::normal(1, 0.1);
    let run = |group: Group<Cpu>| {
        let weights = Weights::new(&source).at("model.wte");
        let table = VocabParallelEmbedding::<Shard<0>, f32, Cpu>::load(&group, &weights, 11, HIDDEN)?;
        let found = sites(|| {
            let (y, rows) = table.forward(&[3; TOKENS], Sequences::one(TOKENS))?;
            table.backward(&rows, y)
        })?;
        assert_eq!(found, [layer("model.wte")]);
        let found = sites(|| {
            let _site = Site::InLayer("mine").enter();
            pass(Own, stream(&group)?)
        })?;
        assert_eq!(found, [layer("mine")]);
        // A started collective keeps the site of its start.
        let x = Tensor::<f32>::zeros(group.device(), [2 + group.rank()])?;
        let site = Site::InLayer("start").enter();
        let pending = group.start_all_reduce(ReduceOp::Sum, x)?;
        drop(site);
        let error = pending.wait().unwrap_err().to_string();
        assert_eq!(error.matches("at layer `start`").count(), 2, "{error}");
        Ok(())
    };
    Threads::new(2).run(run).unwrap();
}
