//! Whole models, and chains with the ends of a language model.

use super::{Batch, BoxModel, Each, Load, Model, brute_force, shapes, tensor, together};
use crate::{
    dev::Dev,
    models::{bert, decoder},
    support::Spread,
    training::model::Config,
};
use shardwise::{
    Result,
    comm::Group,
    device::{AnyMut, Element},
    kernels::NormKind,
    models::{Bert, BertConfig, Decoder, DecoderConfig},
    parallel::{
        Bias, ColumnParallelLinear, Columns, Layer, Normalize, PositionEmbedding, ResidualStream,
        VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Param, Random, Region, Role, WeightSource, Weights},
    weights::Checkpoint,
};

const WORLDS: [usize; 3] = [1, 2, 3];
/// The vocabulary of the checkpoints.
pub(super) const VOCABULARY: usize = 591;

/// The losses' gradient: that of Σ wₜ lossₜ, where `x` has the weight wₜ of each token.
fn weighted<T: Element>(
    dlogits: shardwise::parallel::DTensor<Shard<1>, T, Dev>,
    batch: &Batch,
) -> Result<shardwise::parallel::DTensor<Shard<1>, T, Dev>> {
    let mut rows = dlogits.local().to_array()?.into_dimensionality::<ndarray::Ix2>().unwrap();
    for (mut row, weight) in rows.rows_mut().into_iter().zip(batch.x.column(0)) {
        row.mapv_inplace(|dlogit| T::from_f64(dlogit.to_f64() * weight));
    }
    dlogits.with_local(shardwise::Tensor::from_array(dlogits.group().device(), &rows)?)
}

pub(super) struct OfDecoder<S: ResidualStream, T: Element>(Decoder<S, T, Dev>);

impl<S: ResidualStream, T: Element> Model<T> for OfDecoder<S, T> {
    fn params(&self) -> Vec<Param<T, Dev>> {
        self.0.params()
    }

    fn pass(&self, _: &Group<Dev>, batch: &Batch) -> Result<()> {
        let (logits, saved) = self.0.forward(&batch.ids, batch.sequences.clone())?;
        let entropy = VocabParallelCrossEntropy { ignored: Some(7), ..Default::default() };
        let (_, kept) = entropy.forward(logits, &batch.targets)?;
        self.0.backward(saved, weighted(entropy.backward(kept, 1.0)?, batch)?)
    }
}

pub(super) fn of_decoder<S: ResidualStream, T: Element>(
    group: &Group<Dev>,
    source: &dyn WeightSource,
    config: &DecoderConfig,
) -> Result<BoxModel<T>> {
    Ok(Box::new(OfDecoder(Decoder::<S, T, Dev>::load(group, source, config)?)))
}

/// A small GPT-2 of eight heads with random weights. Its first block recomputes its forward.
pub(super) fn gpt() -> (Random, DecoderConfig) {
    let (heads, ffn) = (8, 21);
    let config = Config {
        vocabulary: VOCABULARY,
        context: 5,
        hidden: 16,
        heads,
        ffn,
        layers: 2,
        dropout: 0.0,
        recomputed: 1,
    };
    (Random::normal(3, 0.3), config.decoder())
}

struct OfBert<S: ResidualStream>(Bert<S, f64, Dev>);

impl<S: ResidualStream<Dual: Spread> + Spread> Model<f64> for OfBert<S> {
    fn params(&self) -> Vec<Param<f64, Dev>> {
        self.0.params()
    }

    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()> {
        let types: Vec<u32> = batch.targets.iter().map(|target| target % 2).collect();
        let (_, saved) = self.0.forward(&batch.ids, Some(&types), batch.sequences.clone())?;
        let dy = S::spread::<f64, Dev>(group, &batch.dy, None)?;
        self.0.backward(saved, dy.with_sequences(batch.sequences.clone())?)
    }
}

/// Microbatches of whole models, some of which have a mask.
fn few_shapes() -> Vec<Sequences> {
    vec![
        Sequences::packed([3, 1, 5, 2]),
        Sequences::padded(&[2, 5, 3, 1], 5).unwrap(),
        Sequences::packed([1, 1, 4, 1, 1, 3]),
        Sequences::packed([2, 0, 5, 4]),
    ]
}

fn decoders<S: ResidualStream>() -> usize {
    let mut count = 0;
    for name in ["gpt2", "llama", "qwen2", "qwen3"] {
        let (checkpoint, config) = decoder(name);
        for recomputed in [0, 1] {
            let mut config = config.clone();
            config.recomputed = recomputed;
            let load: Load<'_, f64> = &|group| of_decoder::<S, f64>(group, &checkpoint, &config);
            for sequences in few_shapes() {
                let batch = Batch::random(&sequences, VOCABULARY, [1, 1]);
                count += brute_force(name, load, &batch, &WORLDS);
            }
        }
    }
    count
}

#[test]
fn decoders_have_the_gradients_of_each_sample() {
    assert_eq!(decoders::<Replicated>() + decoders::<Shard<0>>(), 2 * 4 * 2 * 4 * 3);
}

fn berts<S: ResidualStream<Dual: Spread> + Spread>() -> usize {
    let (checkpoint, config): (Checkpoint, BertConfig) = bert();
    let load: Load<'_, f64> =
        &|group| Ok(Box::new(OfBert::<S>(Bert::<S, f64, Dev>::load(group, &checkpoint, &config)?)));
    let run = |sequences: &Sequences| {
        brute_force("bert", load, &Batch::random(sequences, VOCABULARY, [1, 32]), &WORLDS)
    };
    few_shapes().iter().map(run).sum()
}

#[test]
fn bert_has_the_gradients_of_each_sample() {
    assert_eq!(berts::<Replicated>() + berts::<Shard<0>>(), 2 * 4 * 3);
}

/// The ends of a language model: tokens, positions, a normalization, and a head with a loss. The
/// head is the table of tokens, if it is tied.
struct Ends<S: ResidualStream> {
    tokens: VocabParallelEmbedding<S, f64, Dev>,
    positions: PositionEmbedding<S, f64, Dev>,
    norm: Normalize<S, f64, Dev>,
    head: ColumnParallelLinear<S, f64, Dev>,
    tied: bool,
}

const WORDS: usize = 9;
const HIDDEN: usize = 6;

impl<S: ResidualStream> Ends<S> {
    fn load(group: &Group<Dev>, tied: bool, padding: Option<u32>) -> Result<Self> {
        let source = Random::normal(2, 0.5);
        let weights = Weights::new(&source);
        let tokens = VocabParallelEmbedding::load(group, &weights.at("tokens"), WORDS, HIDDEN)?;
        let tokens = tokens.with_padding(padding)?;
        let head = if tied {
            tokens.tied_head()
        } else {
            let columns = Columns::even(group, WORDS)?;
            ColumnParallelLinear::load(group, &weights.at("head"), HIDDEN, &columns, Bias::Add)?
        };
        let kind = NormKind::RmsNorm { eps: 0.1 };
        Ok(Self {
            tokens,
            positions: PositionEmbedding::load(group, &weights.at("positions"), 6, HIDDEN)?,
            norm: Normalize::load(group, &weights.at("norm"), kind, HIDDEN)?,
            head,
            tied,
        })
    }
}

impl<S: ResidualStream> Model<f64> for Ends<S> {
    fn params(&self) -> Vec<Param<f64, Dev>> {
        let head = if self.tied { Vec::new() } else { self.head.params() };
        [self.tokens.params(), self.positions.params(), self.norm.params(), head].concat()
    }

    fn pass(&self, _: &Group<Dev>, batch: &Batch) -> Result<()> {
        let (x, rows) = self.tokens.forward(&batch.ids, batch.sequences.clone())?;
        let (x, positions) = self.positions.forward(x)?;
        let (x, norm) = self.norm.forward(x)?;
        let (logits, head) = self.head.forward(x)?;
        let entropy = VocabParallelCrossEntropy::default();
        let (_, kept) = entropy.forward(logits, &batch.targets)?;
        let dlogits = weighted(entropy.backward(kept, 0.7)?, batch)?;
        let dx = self.norm.backward(norm, self.head.backward(head, dlogits)?)?;
        self.tokens.backward(&rows, self.positions.backward(positions, dx)?)
    }
}

fn ends<S: ResidualStream>() -> usize {
    let mut count = 0;
    for sequences in shapes() {
        let batch = Batch::random(&sequences, WORDS, [1, 1]);
        // Token 1 repeats within samples and over them.
        let repeats = sequences.iter().filter(|rows| batch.ids[rows.clone()].contains(&1)).count();
        assert!(repeats > 1);
        for (tied, padding) in [(false, None), (true, None), (true, Some(1)), (false, Some(1))] {
            let load: Load<'_, f64> = &|group| Ok(Box::new(Ends::<S>::load(group, tied, padding)?));
            count += brute_force(&format!("tied {tied}, {padding:?}"), load, &batch, &[1, 2, 3, 4]);
        }
    }
    count
}

#[test]
fn the_ends_of_a_model_have_the_gradients_of_each_sample() {
    assert_eq!(ends::<Replicated>() + ends::<Shard<0>>(), 2 * 4 * 6 * 4);
}

/// An embedding whose gradient is given, without other layers.
struct Words<S: ResidualStream>(VocabParallelEmbedding<S, f64, Dev>);

impl<S: ResidualStream> Model<f64> for Words<S> {
    fn params(&self) -> Vec<Param<f64, Dev>> {
        self.0.params()
    }

    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()> {
        let (x, rows) = self.0.forward(&batch.ids, batch.sequences.clone())?;
        let own = S::local_rows(group, batch.ids.len())?;
        let dy = batch.dy.slice(ndarray::s![own, ..]).to_owned();
        self.0.backward(&rows, x.with_local(tensor(group, &dy)?)?)
    }
}

#[test]
fn embeddings_have_the_gradients_of_each_sample() {
    fn check<S: ResidualStream>() -> usize {
        let load: Load<'_, f64> = &|group| {
            let source = Random::normal(2, 0.5);
            let table = VocabParallelEmbedding::load(group, &Weights::new(&source), 5, HIDDEN)?;
            Ok(Box::new(Words::<S>(table)))
        };
        let run = |sequences: &Sequences| {
            brute_force("embedding", load, &Batch::random(sequences, 5, [1, HIDDEN]), &[1, 2, 3, 4])
        };
        shapes().iter().map(run).sum()
    }
    assert_eq!(check::<Replicated>() + check::<Shard<0>>(), 2 * 6 * 4);
}

/// The checkpoint's tensors, rounded to an element type.
fn rounded<T: Element>(checkpoint: &Checkpoint) -> Arrays {
    let read = |name: &str| {
        let shape = checkpoint.shape(name).unwrap().to_vec();
        let mut values = vec![0.0; shape.iter().product()];
        let whole = Region::whole(&shape[..]);
        checkpoint.read(name, Role::Weight, &whole, AnyMut::F64(values.as_mut_slice())).unwrap();
        values.iter_mut().for_each(|value| *value = T::from_f64(*value).to_f64());
        (name.to_string(), ndarray::ArrayD::from_shape_vec(shape, values).unwrap())
    };
    Arrays(checkpoint.names().map(read).collect())
}

/// The norms of a model in a narrow type are those of the same model in f64 up to a few roundings
/// of the activations: 4 ε. The largest difference was 2.4 ε.
fn narrow<T: Element>(name: &str) -> f64 {
    let (checkpoint, config) = decoder(name);
    let source = rounded::<T>(&checkpoint);
    let mut worst = 0.0f64;
    for sequences in few_shapes() {
        let batch = Batch::random(&sequences, VOCABULARY, [1, 1]);
        let want = Each::run::<f64>(&|group| of_decoder::<Replicated, f64>(group, &source, &config), &batch);
        for world in [1, 3] {
            let load: Load<'_, T> = &|group| of_decoder::<Shard<0>, T>(group, &source, &config);
            let got = together(load, &batch, (world, Reduction::Fast), &|norms| vec![1.0; norms.len()]);
            assert_eq!(got.norms.len(), want.norms.len());
            for (got, want) in got.norms.iter().zip(&want.norms).filter(|(_, want)| **want > 0.0) {
                let error = (got - want).abs() / want / T::EPSILON;
                assert!(error <= 4.0, "{name} in {}: {got} {want}: {error} ε", T::DTYPE);
                worst = worst.max(error);
            }
        }
    }
    worst
}

#[test]
fn narrow_elements_have_the_norms_up_to_rounding() {
    for name in ["gpt2", "llama", "qwen3"] {
        let errors = [narrow::<half::bf16>(name), narrow::<half::f16>(name)];
        // The types differ, so an error of 0 would show that the model ran in f64.
        assert!(errors.iter().all(|error| *error > 0.0), "{name}: {errors:?}");
    }
}

/// A term reads the rows of its own samples: with the samples in another order, the norms are in
/// that order, too.
#[test]
fn the_order_of_samples_is_that_of_the_norms() {
    let (source, config) = gpt();
    let load: Load<'_, f64> = &|group| of_decoder::<Shard<0>, f64>(group, &source, &config);
    let batch = Batch::random(&Sequences::packed([5, 2, 4]), VOCABULARY, [1, 1]);
    let one =
        |batch: &Batch| together(load, batch, (2, Reduction::Fast), &|norms| vec![1.0; norms.len()]).norms;
    let norms = one(&batch);
    let order = [2, 0, 1];
    let samples: Vec<Batch> = order.iter().map(|&at| batch.sample(at)).collect();
    let x: Vec<_> = samples.iter().map(|sample| sample.x.view()).collect();
    let other = Batch {
        sequences: Sequences::packed(samples.iter().map(|sample| sample.ids.len())),
        ids: samples.iter().flat_map(|sample| sample.ids.clone()).collect(),
        targets: samples.iter().flat_map(|sample| sample.targets.clone()).collect(),
        x: ndarray::concatenate(ndarray::Axis(0), &x).unwrap(),
        dy: batch.dy.clone(),
    };
    let want: Vec<f64> = order.iter().map(|&at| norms[at]).collect();
    super::norms_close("another order", &one(&other), &want, super::EXACT);
}

/// Parameters that keep terms and others in one model: each has the gradient that it has alone.
#[test]
fn parameters_that_keep_no_terms_add_as_usual() {
    fn check<S: ResidualStream>(
        source: &(dyn WeightSource + Sync),
        config: &DecoderConfig,
        world: usize,
        parity: Option<usize>,
    ) -> super::Grads {
        let batch = Batch::random(&Sequences::packed([5, 2, 4]), VOCABULARY, [1, 1]);
        let grads = crate::dev::ranks(world).run(|group| {
            let model = of_decoder::<S, f64>(&group, source, config)?;
            let params = model.params();
            let kept = || params.iter().enumerate().filter(|(at, _)| parity == Some(at % 2));
            kept().for_each(|(_, param)| param.keep_terms(true));
            model.pass(&group, &batch)?;
            assert!(kept().all(|(_, param)| param.kept() > 0 && param.grad().is_none()));
            kept().try_for_each(|(_, param)| param.add_kept(&[1.0; 3]))?;
            assert!(params.iter().all(|param| param.grad().is_some()));
            super::take_grads(&params)
        });
        super::assembled(grads.unwrap())
    }
    let ((source, gpt), (checkpoint, qwen)) = (gpt(), decoder("qwen3"));
    let models: [(&(dyn WeightSource + Sync), _); 2] = [(&source, gpt), (&checkpoint, qwen)];
    for (source, config) in models {
        for world in [1, 2] {
            let plain = check::<Shard<0>>(source, &config, world, None);
            for parity in [0, 1] {
                let what = format!("parameters {parity} of 2, {world} ranks");
                let got = check::<Shard<0>>(source, &config, world, Some(parity));
                super::sums_close(&what, &got, &plain, super::EXACT);
                let got = check::<Replicated>(source, &config, world, Some(parity));
                super::sums_close(&what, &got, &plain, super::EXACT);
            }
        }
    }
}
