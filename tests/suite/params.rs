//! Parameters as handles: stores that are not dense, gradient sinks, tied parameters.

use crate::{
    dev::{self, Dev, Tensor, ranks},
    invariant::same_bits,
    support::{Case, Spread, arrays, matrix, random, run_unplanned},
};
use ndarray::{Array2, ArrayD, s};
use proptest::prelude::*;
use shardwise::{
    Result,
    comm::{Group, ReduceOp},
    device::Element,
    kernels::{Activation, Backend, NormKind, Pointwise},
    optim::{AdamW, grad_norm},
    parallel::{
        AddBias, AttentionConfig, Bias, BlockConfig, ColumnLinear, ColumnParallelLinear, Columns, Layer,
        PositionEmbedding, QkvLayout, ResidualStream, RowParallelLinear, TransformerBlock,
        VocabParallelEmbedding,
    },
    reference::worst,
    shard::{Copied, Heads, Placement, Reduction, Replicated, Sequences, Shape, Shard},
    tensor::{Arrays, GradSink, GradSum, GradTerm, Param, ParamRegion, Random, Region, Role, Store, Weights},
    train::{DataParallel, GradReduce},
};
use std::{cell::RefCell, ops::Range, rc::Rc};

/// A matrix of bytes with one scale per row.
struct Bytes<B> {
    codes: Vec<u8>,
    scales: Vec<f64>,
    device: B,
    /// The rows that were decoded, and whether the whole matrix was decoded.
    decoded: Rc<RefCell<(Vec<u32>, bool)>>,
}

/// The byte 128 encodes 0.
const ZERO: f64 = 128.0;

impl<B: Backend> Bytes<B> {
    /// Returns the scale of a row of the tests' weights.
    fn scale(row: &[f64]) -> f64 {
        let largest = row.iter().fold(0.0, |largest, value| f64::max(largest, value.abs()));
        (largest / 127.0).log2().ceil().exp2().max(f64::MIN_POSITIVE)
    }

    fn of<T: Element>(param: &Param<T, B>) -> Result<Self> {
        let (values, cols) = (param.value()?.to_vec()?, param.shape().cols());
        let values: Vec<f64> = values.into_iter().map(T::to_f64).collect();
        let rows = || values.chunks_exact(cols.max(1));
        let scales: Vec<f64> = rows().map(Self::scale).collect();
        let coded = rows().zip(&scales).flat_map(|(row, scale)| row.iter().map(move |x| x / scale + ZERO));
        let codes = coded.map(|code| {
            assert!(code.fract() == 0.0 && (0.0..256.0).contains(&code), "{code} is not a byte");
            code as u8
        });
        Ok(Self { codes: codes.collect(), scales, device: param.device().clone(), decoded: Rc::default() })
    }

    fn decode<T: Element>(
        &self,
        rows: impl ExactSizeIterator<Item = usize>,
    ) -> Result<shardwise::Tensor<T, B>> {
        let (count, cols) = (rows.len(), self.codes.len() / self.scales.len().max(1));
        let row = |row: usize| {
            let codes = self.codes[row * cols..(row + 1) * cols].iter();
            codes.map(move |&code| T::from_f64((f64::from(code) - ZERO) * self.scales[row]))
        };
        shardwise::Tensor::from_slice(&self.device, [count, cols], &rows.flat_map(row).collect::<Vec<_>>())
    }
}

impl<T: Element, B: Backend> Store<T, B> for Bytes<B> {
    fn value(&self) -> Result<shardwise::Tensor<T, B>> {
        self.decoded.borrow_mut().1 = true;
        self.decode(0..self.scales.len())
    }

    fn rows(&self, ids: &[u32]) -> Result<shardwise::Tensor<T, B>> {
        self.decoded.borrow_mut().0.extend(ids);
        let zero = vec![T::default(); self.codes.len() / self.scales.len().max(1)];
        let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
        // The id `NO_ROW` stands for a row that a different rank holds. It gives a row of zeros.
        let mut all = Vec::new();
        for row in rows {
            if row < self.scales.len() {
                all.extend(self.decode::<T>(std::iter::once(row))?.to_vec()?)
            } else {
                all.extend(&zero)
            }
        }
        shardwise::Tensor::from_slice(&self.device, [ids.len(), zero.len()], &all)
    }
}

/// Stores the matrices of a layer as bytes.
fn keep_bytes<T: Element, B: Backend>(params: &[Param<T, B>]) -> Result<()> {
    let mut kept = 0;
    for param in params.iter().filter(|param| param.shape().rank() == 2) {
        param.set_store(Bytes::of(param)?)?;
        kept += 1;
    }
    assert!(kept > 0);
    Ok(())
}

/// Returns a weight that bytes and scales represent exactly, with a different scale for each row.
fn coded(seed: u64, name: &str, shape: &[usize]) -> ArrayD<f64> {
    // Bytes encode only one zero, so adding 0 turns −0 into +0.
    let mut weight = random(seed, name, shape).mapv(|x| (40.0 * x).round().clamp(-127.0, 127.0) + 0.0);
    for (at, mut row) in weight.outer_iter_mut().enumerate() {
        row.mapv_inplace(|x| x * [0.5, 0.125, 0.25][at % 3] / 16.0);
    }
    weight
}

/// Asserts that a layer whose weights are bytes has the bits of the layer with dense weights,
/// gradients included, with each of these reductions. The builder is like that of
/// [`run_unplanned`].
macro_rules! same_on_bytes {
    ($T:ty, $case:expr, $reductions:expr, |$group:pat_param, $weights:pat_param| $build:expr) => {
        for &reduction in $reductions {
            let case = Case { reduction, ..$case.clone() };
            let dense = run_unplanned!($T, &case, |$group, $weights| $build).unwrap();
            let bytes = run_unplanned!($T, &case, |$group, $weights| {
                let layer = $build?;
                keep_bytes(&layer.params())?;
                Ok(layer)
            });
            assert!(!dense.grads.is_empty());
            same_bits("weights kept as bytes", &bytes.unwrap(), &dense);
        }
    };
}

const EITHER: [Reduction; 2] = [Reduction::Fast, Reduction::Invariant { blocks: 8 }];

fn linear_layers<S: ResidualStream + Spread, T: Element>(world: usize, seed: u64) {
    let (tokens, hidden, features) = (5, 7, world + 8);
    let up =
        arrays([("weight", coded(seed, "w", &[features, hidden])), ("bias", random(seed, "b", &[features]))]);
    let (x, dy) = (matrix(seed, "x", tokens, hidden), matrix(seed, "dy", tokens, features));
    same_on_bytes!(T, &Case::new(world, &x, &dy, &up), &EITHER, |group, weights| {
        let columns = Columns::even(group, features)?;
        ColumnParallelLinear::<S, T, Dev>::load(group, weights, hidden, &columns, Bias::Add)
    });
    let down =
        arrays([("weight", coded(seed, "w", &[hidden, features])), ("bias", random(seed, "b", &[hidden]))]);
    same_on_bytes!(T, &Case::new(world, &dy, &x, &down), &EITHER, |group, weights| {
        let partition = group.partition("test", "features", features, 1)?;
        RowParallelLinear::<S, T, Dev>::load(group, weights, &partition, hidden, true)
    });
    let positions = arrays([("weight", coded(seed, "p", &[tokens + 2, hidden]))]);
    same_on_bytes!(T, &Case::new(world, &x, &x, &positions), &EITHER, |group, weights| {
        PositionEmbedding::<S, T, Dev>::load(group, weights, tokens + 2, hidden)
    });
    let config = BlockConfig::new(
        AttentionConfig::new(hidden, 8).with_kv_heads(4).with_head_dim(2).with_qkv_bias(true),
        9,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true);
    let vector = |name: &str, len: usize| (name.to_string(), random(seed, name, &[len]));
    let weight = |name: &str, rows: usize, cols: usize| (name.to_string(), coded(seed, name, &[rows, cols]));
    let block = Arrays(
        [
            vector("norm1.weight", hidden),
            vector("norm2.weight", hidden),
            vector("attention.q.bias", 16),
            vector("attention.k.bias", 8),
            vector("attention.v.bias", 8),
            weight("attention.q.weight", 16, hidden),
            weight("attention.k.weight", 8, hidden),
            weight("attention.v.weight", 8, hidden),
            weight("attention.o.weight", hidden, 16),
            weight("mlp.gate.weight", 9, hidden),
            weight("mlp.up.weight", 9, hidden),
            weight("mlp.down.weight", hidden, 9),
        ]
        .into(),
    );
    let dy = matrix(seed, "dh", tokens, hidden);
    same_on_bytes!(T, &Case::new(world, &x, &dy, &block), &EITHER, |group, weights| {
        TransformerBlock::<S, T, Dev>::load(group, weights, &config)
    });
}

/// Runs q, k and v as one merged layer and as three layers. Neighbouring ranks hold the same
/// key/value heads.
fn qkv<S: ResidualStream + Spread>(world: usize, seed: u64) {
    let (tokens, hidden, layout) = (4, 5, QkvLayout::separate("q", "k", "v"));
    let source = arrays([
        ("q.weight", coded(seed, "q", &[18, hidden])),
        ("k.weight", coded(seed, "k", &[6, hidden])),
        ("v.weight", coded(seed, "v", &[6, hidden])),
    ]);
    let heads = Heads::new(9, 3, 2, world).unwrap();
    let partition = heads.qkv_features();
    let (x, dy) = (matrix(seed, "x", tokens, hidden), matrix(seed, "dy", tokens, partition.total()));
    let case = Case { dy_partition: Some(partition), ..Case::new(world, &x, &dy, &source) };
    same_on_bytes!(f64, &case, &[Reduction::Fast], |group, weights| {
        let columns = Columns::qkv(group, &heads, &layout)?;
        ColumnParallelLinear::<S, f64, Dev>::load(group, weights, hidden, &columns, Bias::None)
    });
    same_on_bytes!(f64, &case, &[Reduction::Fast], |group, weights| {
        let columns = Columns::separate_qkv(group, &heads, &layout)?;
        let load = |columns: &Columns| ColumnLinear::load(group, weights, hidden, columns, Bias::None);
        ColumnParallelLinear::<S, f64, Dev>::concat(columns.iter().map(load).collect::<Result<Vec<_>>>()?)
    });
}

/// A rank's results of an embedding and its tied head: embeddings, logits, dx, and the table's
/// gradient.
type Embedded = [Vec<u64>; 4];

/// Runs an embedding and its tied head on a table of bytes, or a dense one.
fn embeds<S: ResidualStream>(world: usize, seed: u64, reduction: Reduction, bytes: bool) -> Vec<Embedded> {
    let (vocabulary, hidden, ids) = (world + 5, 3, [0_u32, 4, 2, 4, 1, 5]);
    let source = arrays([("weight", coded(seed, "table", &[vocabulary, hidden]))]);
    let bits = |tensor: &Tensor<f64>| -> Result<Vec<u64>> {
        let values = tensor.to_vec()?;
        assert!(values.iter().all(|value| value.is_finite()));
        Ok(values.into_iter().map(f64::to_bits).collect())
    };
    let outcomes = ranks(world).run(|group| {
        let group = group.with_reduction(reduction);
        let weights = Weights::new(&source);
        let table = VocabParallelEmbedding::<S, f64, Dev>::load(&group, &weights, vocabulary, hidden)?;
        let head = table.tied_head();
        let params = table.params();
        assert!(params.len() == 1 && head.weight().is_same(&params[0]));
        let decoded = if bytes {
            let store = Bytes::of(&params[0])?;
            let decoded = store.decoded.clone();
            params[0].set_store(store)?;
            *decoded.borrow_mut() = (Vec::new(), false);
            Some(decoded)
        } else {
            None
        };
        let (y, rows) = table.forward(&ids, Sequences::one(ids.len()))?;
        if let Some(decoded) = decoded {
            let (asked, whole) = &*decoded.borrow();
            assert!(asked.len() == ids.len() && !whole, "a lookup decodes rows, not the table");
        }
        let (logits, saved) = head.forward(y.clone())?;
        let dx = head.backward(saved, logits.clone())?;
        // With an invariant reduction the gradient is available as soon as both uses have added to
        // it.
        assert_eq!(params[0].grad().is_some(), reduction == Reduction::Fast);
        table.backward(&rows, dx.clone())?;
        let grad = params[0].grad().expect("two uses have added to it");
        Ok([bits(y.local())?, bits(logits.local())?, bits(dx.local())?, bits(&grad)?])
    });
    outcomes.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8 / dev::FEWER, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_run_on_weights_that_are_kept_as_bytes(world in 1..9usize, seed: u64) {
        linear_layers::<Replicated, f64>(world, seed);
        linear_layers::<Shard<0>, f32>(world, seed);
        qkv::<Replicated>(world, seed);
        qkv::<Shard<0>>(world, seed);
        for reduction in EITHER {
            for stream in [embeds::<Replicated>, embeds::<Shard<0>>] {
                assert_eq!(stream(world, seed, reduction, true), stream(world, seed, reduction, false));
            }
        }
    }
}

/// A parameter whose store is not dense can be neither set nor trained. The error leaves everything
/// unchanged.
#[test]
fn a_store_that_is_not_dense_is_not_written() {
    let outcomes = ranks(1).run(|group| {
        let source = arrays([("w.weight", coded(1, "w", &[4, 3])), ("w.bias", coded(1, "b", &[4]))]);
        let (columns, weights) = (Columns::even(&group, 4)?, Weights::new(&source));
        let layer = ColumnLinear::<f64, Dev>::load(&group, &weights.at("w"), 3, &columns, Bias::Add)?;
        let params = layer.params();
        let [weight, bias] = &params[..] else { panic!("{params:?}") };
        let other = Tensor::<f64>::zeros(group.device(), [4, 2])?;
        let set = weight.set(other.clone()).unwrap_err().to_string();
        let stored = weight.set_store(other).unwrap_err().to_string();
        let values = || -> Result<_> { Ok([weight.value()?.to_vec()?, bias.value()?.to_vec()?]) };
        let before = values()?;
        weight.set_store(Bytes::of(weight)?)?;
        assert_eq!(values()?, before);
        let replaced = weight.set(Tensor::zeros(group.device(), [4, 3])?).unwrap_err().to_string();
        for param in &params {
            param.set_grad(Tensor::full(group.device(), param.shape(), 1.0)?)?;
        }
        let mut optimizer = AdamW::default();
        // The bias could be trained and comes first, but stays unchanged.
        let listed = [bias.clone(), weight.clone()];
        let stepped = optimizer.step(&listed, 0.1, 1.0).unwrap_err().to_string();
        assert_eq!((values()?, optimizer.steps()), (before, 0));
        weight.zero_grad();
        optimizer.step(&listed, 0.1, 1.0)?;
        assert_eq!(optimizer.steps(), 1);
        Ok([set, stored, replaced, stepped])
    });
    let read = "parameter: not supported: w.weight has no dense store, so it cannot be written";
    assert_eq!(
        outcomes.unwrap()[0],
        [
            "parameter: w.weight has shape [4, 3], but its new value has shape [4, 2]",
            "parameter: w.weight has shape [4, 3], but its new store has shape [4, 2]",
            read,
            read,
        ]
    );
}

/// The gradient of an embedding must have as many features as its table.
#[test]
fn an_embedding_refuses_a_gradient_of_another_width() {
    let outcomes = ranks(2).run(|group| {
        let source = Random::normal(1, 1.0);
        let weights = Weights::new(&source).at("table");
        let table = VocabParallelEmbedding::<Replicated, f64, Dev>::load(&group, &weights, 5, 4)?;
        let (_, rows) = table.forward(&[1, 4], Sequences::one(2))?;
        let dy = Replicated::spread(&group, &matrix(1, "dy", 2, 6), None)?;
        let refused = table.backward(&rows, dy).unwrap_err().to_string();
        assert!(table.params()[0].grad().is_none());
        Ok(refused)
    });
    let says = "embedding backward: features of dy is 6, but those of the table is 4";
    assert_eq!(outcomes.unwrap(), [says, says]);
}

fn linear<S: ResidualStream>(
    group: &Group<Dev>,
    source: &Arrays,
) -> Result<ColumnParallelLinear<S, f64, Dev>> {
    let (columns, weights) = (Columns::even(group, 4)?, Weights::new(source));
    ColumnParallelLinear::load(group, &weights.at("w"), 3, &columns, Bias::None)
}

/// Adds the gradients of samples, each scaled to a norm of at most `max`, and records their norms.
#[derive(Clone)]
struct Clip {
    max: f64,
    norms: Rc<RefCell<Vec<f64>>>,
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn clipped(values: &[f64], max: f64) -> Vec<f64> {
    let scale = (max / norm(values)).min(1.0);
    values.iter().map(|value| value * scale).collect()
}

impl GradSink<f64, Dev> for Clip {
    fn add(&mut self, mut grad: GradTerm<'_, f64, Dev>, sum: &mut GradSum<f64, Dev>) -> Result<()> {
        let tokens = grad.tokens();
        assert!(tokens.is_none_or(|tokens| tokens == 6 || tokens == 7), "{}: {tokens:?}", grad.name());
        for sample in SAMPLES {
            let mut one = None;
            grad.add_tokens(sample, &mut one)?;
            let one = one.expect("`add_to` sets the sum");
            let values = one.to_vec()?;
            self.norms.borrow_mut().push(norm(&values));
            let one = Tensor::from_slice(one.device(), one.shape(), &clipped(&values, self.max))?;
            sum.total = Some(match sum.total.take() {
                Some(sum) => shardwise::ops::add(sum, &one)?,
                None => one,
            });
        }
        Ok(())
    }
}

/// A sink that discards the gradient, so that the parameter is frozen.
struct Frozen;

impl GradSink<f64, Dev> for Frozen {
    fn add(&mut self, _: GradTerm<'_, f64, Dev>, _: &mut GradSum<f64, Dev>) -> Result<()> {
        Ok(())
    }
}

const SAMPLES: [Range<usize>; 3] = [0..2, 2..3, 3..7];

/// Checks that a sink that clips per sample gives the same sum as running the samples one at a time
/// and clipping each gradient. Returns the number of clipped gradients.
fn clips<L: Layer<f64, Dev>>(
    group: &Group<Dev>,
    load: impl Fn() -> Result<L>,
    (x, dy): (&Array2<f64>, &Array2<f64>),
) -> Result<usize>
where
    L::In: Spread,
    <L::Out as Placement>::Dual: Spread,
{
    const MAX: f64 = 3.0;
    let backward = |layer: &L, rows: Range<usize>| {
        let part = |whole: &Array2<f64>| whole.slice(s![rows.clone(), ..]).to_owned();
        // Each sample is one sequence.
        let samples = SAMPLES.iter().filter(|sample| rows.contains(&sample.start)).map(Range::len);
        let x = L::In::spread(group, &part(x), None)?.with_sequences(Sequences::packed(samples))?;
        let (_, saved) = layer.forward(x)?;
        layer.backward(saved, <L::Out as Placement>::Dual::spread(group, &part(dy), None)?)
    };
    let (layer, one) = (load()?, load()?);
    let norms = Rc::new(RefCell::new(Vec::new()));
    for param in layer.params() {
        drop(param.set_sink(Box::new(Clip { max: MAX, norms: norms.clone() }))?);
    }
    backward(&layer, 0..x.nrows())?;
    let (mut clipped_samples, mut wanted) = (0, Vec::<Vec<f64>>::new());
    for sample in SAMPLES {
        one.params().iter().for_each(Param::zero_grad);
        backward(&one, sample)?;
        for (at, param) in one.params().iter().enumerate() {
            let grad = param.grad().expect("a gradient").to_vec()?;
            clipped_samples += usize::from(norm(&grad) > MAX);
            let grad = clipped(&grad, MAX);
            match wanted.get_mut(at) {
                Some(sum) => *sum = Vec::from_iter(std::iter::zip(sum.iter(), &grad).map(|(a, b)| a + b)),
                None => wanted.push(grad),
            }
        }
    }
    assert_eq!(norms.borrow().len(), SAMPLES.len() * layer.params().len());
    assert_eq!(wanted.len(), layer.params().len());
    for (param, want) in layer.params().iter().zip(&wanted) {
        let got = param.grad().expect("a gradient").to_vec()?;
        let worst = worst(&got, want);
        assert!(worst <= 1e-12, "{} on {group:?}: {worst:e}", param.name());
    }
    Ok(clipped_samples)
}

#[test]
fn a_sink_clips_the_gradient_of_each_sample() {
    for world in [1, 2, 3] {
        let outcomes = ranks(world).run(|group| {
            let (source, partition) = (Random::normal(3, 1.0), group.even_partition(7)?);
            let weights = Weights::new(&source);
            let [x, h] = [("x", 5), ("h", 7)].map(|(name, width)| matrix(5, name, 7, width));
            let columns = Columns::even(&group, 7)?;
            let up = || {
                ColumnParallelLinear::<Replicated, f64, Dev>::load(&group, &weights, 5, &columns, Bias::Add)
            };
            let mut clipped = clips(&group, up, (&x, &h))?;
            let down =
                || RowParallelLinear::<Replicated, f64, Dev>::load(&group, &weights, &partition, 5, true);
            clipped += clips(&group, down, (&h, &x))?;
            let positions = || PositionEmbedding::<Replicated, f64, Dev>::load(&group, &weights, 9, 5);
            clipped += clips(&group, positions, (&x, &x))?;
            let separate = || {
                let load = |name: &str| {
                    ColumnLinear::<f64, Dev>::load(&group, &weights.at(name), 5, &columns, Bias::Add)
                };
                ColumnParallelLinear::<Replicated, f64, Dev>::concat(vec![load("a")?, load("b")?])
            };
            let both = ndarray::concatenate![ndarray::Axis(1), h, h];
            if world == 1 {
                clipped += clips(&group, separate, (&x, &both))?;
            }
            Ok(clipped)
        });
        let least = outcomes.unwrap().into_iter().min();
        assert!(least > Some(5), "too few samples were clipped: {least:?}");
    }
}

/// An all-reduced sum over the tokens of all ranks cannot be split into gradients per sample.
#[test]
fn a_sum_over_ranks_is_not_split() {
    let outcomes = ranks(2).run(|group| {
        let source = Random::normal(1, 1.0);
        let layer = AddBias::<Shard<0>, f64, Dev>::load(&group, &Weights::new(&source).at("row"), 3)?;
        let sink = Clip { max: 1.0, norms: Rc::default() };
        for param in layer.params() {
            drop(param.set_sink(Box::new(sink.clone()))?);
        }
        let (y, saved) = layer.forward(Shard::<0>::spread(&group, &matrix(1, "x", 7, 3), None)?)?;
        Ok(layer.backward(saved, y).map(drop).unwrap_err().to_string())
    });
    let refused = "gradient: not supported: the gradient of row.bias cannot be split by tokens";
    assert_eq!(outcomes.unwrap(), [refused, refused]);
}

/// A sink may discard its gradient; the other parameters and the input still get theirs.
#[test]
fn a_frozen_weight_gets_no_gradient() {
    let outcomes = ranks(2).run(|group| {
        let (source, columns) = (Random::normal(1, 1.0), Columns::even(&group, 5)?);
        let load = || {
            let weights = Weights::new(&source);
            ColumnParallelLinear::<Replicated, f64, Dev>::load(&group, &weights, 3, &columns, Bias::Add)
        };
        let run = |layer: &ColumnParallelLinear<Replicated, f64, Dev>| -> Result<_> {
            let (y, saved) = layer.forward(Replicated::spread(&group, &matrix(1, "x", 9, 3), None)?)?;
            let dx = layer.backward(saved, y)?.into_local().to_vec()?;
            let grads = [Some(layer.weight()), layer.bias()].map(|param| param.and_then(Param::grad));
            Ok((dx, grads.map(|grad| grad.map(|grad| grad.to_vec().unwrap()))))
        };
        let (trained, frozen) = (load()?, load()?);
        let before = frozen.weight().set_sink(Box::new(Frozen))?;
        let ((dx, [weight, bias]), (frozen_dx, [none, frozen_bias])) = (run(&trained)?, run(&frozen)?);
        assert!(weight.is_some() && none.is_none());
        assert_eq!((dx, bias), (frozen_dx, frozen_bias));
        // Restoring the earlier sink unfreezes the weight.
        drop(frozen.weight().set_sink(before)?);
        assert_eq!(run(&frozen)?.1[0], weight);
        Ok(())
    });
    outcomes.unwrap();
}

/// A sink that splits a gradient by tokens must name tokens of the gradient.
#[test]
fn tokens_beyond_a_gradient_are_refused() {
    let outcomes = ranks(1).run(|group| {
        let layer = linear::<Replicated>(&group, &arrays([("w.weight", coded(1, "w", &[4, 3]))]))?;
        drop(layer.weight().set_sink(Box::new(Clip { max: 1.0, norms: Rc::default() }))?);
        let (y, saved) = layer.forward(Replicated::spread(&group, &matrix(1, "x", 6, 3), None)?)?;
        Ok(layer.backward(saved, y).map(drop).unwrap_err().to_string())
    });
    assert_eq!(
        outcomes.unwrap()[0],
        "gradient: tokens 3..7 are not a range of the 6 tokens of the gradient of w.weight"
    );
}

/// Replicas leave a frozen weight unchanged and train the other parameters. A sink that cannot sum
/// along a tree is rejected with an invariant reduction.
#[test]
fn replicas_keep_a_sink() {
    let outcomes = ranks(2).run(|group| {
        let source = Random::normal(1, 1.0);
        let load = |alone: &Group<Dev>| {
            let (columns, weights) = (Columns::even(alone, 4)?, Weights::new(&source).at("w"));
            let layer = ColumnLinear::<f64, Dev>::load(alone, &weights, 3, &columns, Bias::Add)?;
            drop(layer.params()[0].set_sink(Box::new(Frozen))?);
            Ok(layer)
        };
        let alone = Group::solo(group.device());
        let layer = load(&alone)?;
        let replicas = DataParallel::with_buckets(&group, &layer.params(), 1)?;
        let x = Copied::spread(&alone, &matrix(group.rank() as u64, "x", 5, 3), None)?;
        replicas.begin(GradReduce::Sum)?;
        let (y, saved) = layer.forward(x)?;
        layer.backward(saved, y.clone())?;
        replicas.finish()?;
        let [weight, bias] = [0, 1].map(|at| layer.params()[at].grad());
        assert!(weight.is_none());
        // Each rank's output was its own gradient, so the bias's gradient is the sum of all
        // outputs.
        let mut sum = Tensor::zeros(group.device(), [4])?;
        group.device().sum_rows(y.local().mat(), sum.slice_mut()?)?;
        group.all_reduce(ReduceOp::Sum, &mut sum)?;
        assert_eq!(bias.expect("a gradient").to_vec()?, sum.to_vec()?);
        let fixed = group.with_reduction(Reduction::Invariant { blocks: 4 });
        Ok(DataParallel::new(&fixed, &load(&alone)?.params()).map(drop).unwrap_err().to_string())
    });
    let refused = "gradient: not supported: the sink of w.weight cannot sum along a tree, which an invariant reduction needs";
    assert_eq!(outcomes.unwrap(), [refused, refused]);
}

/// An unfinished step does not prevent new replicas from being created.
#[test]
fn replicas_may_be_made_anew() {
    let outcomes = ranks(2).run(|group| {
        let alone = Group::solo(group.device());
        let layer = linear::<Replicated>(&alone, &arrays([("w.weight", coded(1, "w", &[4, 3]))]))?;
        let backward = || {
            let (y, saved) = layer.forward(Replicated::spread(&alone, &matrix(1, "x", 6, 3), None)?)?;
            layer.backward(saved, y).map(drop)
        };
        backward()?;
        let one = layer.weight().grad().expect("a gradient").to_vec()?;
        layer.weight().zero_grad();
        let lost = DataParallel::new(&group, &layer.params())?;
        lost.begin(GradReduce::Sum)?;
        drop(lost);
        let replicas = DataParallel::new(&group, &layer.params())?;
        for _ in 0..2 {
            layer.weight().zero_grad();
            replicas.begin(GradReduce::Sum)?;
            backward()?;
            replicas.finish()?;
            let sum = layer.weight().grad().expect("a gradient").to_vec()?;
            assert_eq!(sum, one.iter().map(|grad| 2.0 * grad).collect::<Vec<_>>());
        }
        Ok(())
    });
    outcomes.unwrap();
}

/// A handle and its clones count as one use of the parameter, and a tied handle counts as a second
/// use. With an invariant reduction the gradient is available as soon as all uses have added to it.
#[test]
fn a_tie_is_another_use() {
    let outcomes = ranks(1).run(|group| {
        let group = group.with_reduction(Reduction::Invariant { blocks: 2 });
        let layer = linear::<Replicated>(&group, &arrays([("w.weight", coded(1, "w", &[4, 3]))]))?;
        let x = Replicated::spread(&group, &matrix(1, "x", 6, 3), None)?;
        let backward = |layer: &ColumnParallelLinear<Replicated, f64, Dev>| {
            let (y, saved) = layer.forward(x.clone())?;
            layer.backward(saved, y)
        };
        let grads = || layer.weight().grad().map(|grad| grad.to_vec().unwrap());
        let handle = layer.weight().clone();
        backward(&layer)?;
        let once = grads().expect("the only use has added to it");
        handle.zero_grad();
        assert_eq!(grads(), None);
        let tied = layer.tied();
        assert!(tied.weight().is_same(&handle));
        backward(&tied)?;
        assert_eq!(grads(), None);
        backward(&layer)?;
        assert_eq!(grads().unwrap(), once.iter().map(|grad| 2.0 * grad).collect::<Vec<_>>());
        // The gradient does not wait for a dropped use.
        handle.zero_grad();
        backward(&layer)?;
        assert_eq!(grads(), None);
        handle.zero_grad();
        let again = layer.tied();
        drop((tied, again));
        backward(&layer)?;
        assert_eq!(grads().as_ref(), Some(&once));
        // A value set by one handle is visible through all.
        let tied = layer.tied();
        handle.set(Tensor::zeros(group.device(), [4, 3])?)?;
        assert_eq!(tied.forward(x)?.0.into_local().to_vec()?, [0.0; 24]);
        Ok(())
    });
    outcomes.unwrap();
}

/// Returns a parameter of ones with this shape.
fn ones(group: &Group<Dev>, shape: [usize; 2]) -> Result<Param<f64, Dev>> {
    let source = arrays([("w", ArrayD::ones(shape.to_vec()))]);
    let (weights, region) = (Weights::new(&source), Region::whole(shape));
    Param::load_region(group.device(), &weights, "w", Role::Weight, region, true)
}

fn add_ones(param: &Param<f64, Dev>, times: usize) -> Result<()> {
    (0..times).try_for_each(|_| param.add_grad(Tensor::full(param.device(), param.shape(), 1.0)?))
}

/// A sink that forwards every call to another sink and counts the gradients.
struct Wrap(Box<dyn GradSink<f64, Dev>>, Rc<RefCell<usize>>);

impl GradSink<f64, Dev> for Wrap {
    fn add(&mut self, grad: GradTerm<'_, f64, Dev>, sum: &mut GradSum<f64, Dev>) -> Result<()> {
        *self.1.borrow_mut() += 1;
        self.0.add(grad, sum)
    }

    fn finish(&mut self, sum: &mut GradSum<f64, Dev>) -> Result<()> {
        self.0.finish(sum)
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn replicated(&self, param: &str, rank: usize, size: usize) -> Result<Box<dyn GradSink<f64, Dev>>> {
        Ok(Box::new(Self(self.0.replicated(param, rank, size)?, self.1.clone())))
    }
}

/// A sink around another sink changes no sum, whether it is set before or after the replicas are
/// created.
#[test]
fn replicas_sum_through_a_sink_around_theirs() {
    for (world, microbatches) in [(2, 1), (2, 3), (3, 2), (4, 3)] {
        for reduction in [Reduction::Fast, Reduction::Invariant { blocks: 8 }] {
            for before in [true, false] {
                let outcomes = ranks(world).run(|group| {
                    let (group, param) = (group.with_reduction(reduction), ones(&group, [2, 3])?);
                    let count = Rc::new(RefCell::new(0));
                    let wrap = || -> Result<()> {
                        let inner = param.set_sink(Box::new(Frozen))?;
                        param.set_sink(Box::new(Wrap(inner, count.clone()))).map(drop)
                    };
                    param.set_microbatches(microbatches);
                    if before {
                        wrap()?;
                    }
                    let replicas = DataParallel::new(&group, std::slice::from_ref(&param))?;
                    if !before {
                        wrap()?;
                    }
                    replicas.begin(GradReduce::Sum)?;
                    add_ones(&param, microbatches)?;
                    replicas.finish()?;
                    assert_eq!(*count.borrow(), microbatches);
                    param.grad().expect("all have added").to_vec()
                });
                let sum = vec![(world * microbatches) as f64; 6];
                assert_eq!(outcomes.unwrap(), vec![sum; world], "{world} x {microbatches}");
            }
        }
    }
}

/// A replica may have fewer microbatches than announced. With fast reductions the replica gets its
/// gradient, and with invariant reductions an error.
#[test]
fn a_step_of_replicas_may_end_early() {
    let run = |reduction: Reduction| {
        ranks(2).run(|group| {
            let (group, param) = (group.with_reduction(reduction), ones(&group, [2, 3])?);
            param.set_microbatches(2);
            let replicas = DataParallel::new(&group, std::slice::from_ref(&param))?;
            replicas.begin(GradReduce::Sum)?;
            add_ones(&param, 2 - group.rank())?;
            replicas.finish()?;
            param.grad().expect("a gradient").to_vec()
        })
    };
    assert_eq!(run(Reduction::Fast).unwrap(), [[3.0; 6], [3.0; 6]]);
    let error = run(Reduction::Invariant { blocks: 4 }).unwrap_err().to_string();
    assert!(error.contains("w has received 1 of the 2 terms of an invariant reduction"), "{error}");
}

/// A gradient that still waits for other replicas is not treated as absent: a norm or a step over
/// it is an error. Errors also name a parameter that is listed twice, or whose shape differs from
/// that of its gradient or its region.
#[test]
fn gradients_that_are_no_gradient_are_refused() {
    let outcomes = ranks(2).run(|group| {
        let group = group.with_reduction(Reduction::Invariant { blocks: 8 });
        let param = ones(&group, [2, 3])?;
        param.set_microbatches(3);
        drop(DataParallel::new(&group, std::slice::from_ref(&param))?);
        param.zero_grad();
        add_ones(&param, 3)?;
        let listed = [param.clone()];
        let open = [
            grad_norm(&listed, &[]).unwrap_err().to_string(),
            AdamW::default().step(&listed, 0.1, 1.0).unwrap_err().to_string(),
        ];
        let other = ones(&group, [2, 3])?;
        let twice = [other.clone(), other.clone()];
        let double = [
            grad_norm(&twice, &[]).unwrap_err().to_string(),
            AdamW::default().step(&twice, 0.1, 1.0).unwrap_err().to_string(),
        ];
        drop(other.set_sink(Box::new(Replace))?);
        let shape = add_ones(&other, 1).unwrap_err().to_string();
        let wide = ParamRegion { tensor: "w".into(), region: Region::whole([2, 2]), row: 0, owned: true };
        let source = arrays([("w", ArrayD::ones(vec![2, 2]))]);
        let load = |shape: &[usize], regions: Vec<ParamRegion>| {
            let (weights, shape) = (Weights::new(&source), Shape::new(shape));
            let load = Param::<f64, Dev>::load(group.device(), &weights, "w", Role::Weight, shape, regions);
            load.unwrap_err().to_string()
        };
        Ok([open, double, [shape, load(&[2, 3], vec![wide])], [load(&[], Vec::new()), String::new()]])
    });
    let says = [
        [
            "gradient norm: terms of w are not summed over its replicas yet",
            "adamw: terms of w are not summed over its replicas yet",
        ],
        [
            "gradient norm: w is listed twice: list a shared parameter only once",
            "adamw: w is listed twice: list a shared parameter only once",
        ],
        [
            "gradient: w has shape [2, 3], but its gradient has shape [3, 2]",
            "parameter: the width of the region of `w` is 2, but that of the parameter is 3",
        ],
        ["parameter: `w` has no dimension: give it a dimension of size 1", ""],
    ];
    let says = says.map(|lines| lines.map(str::to_string));
    assert_eq!(outcomes.unwrap(), [says.clone(), says]);
}

/// A sink whose gradient does not have the shape of the parameter.
struct Replace;

impl GradSink<f64, Dev> for Replace {
    fn add(&mut self, grad: GradTerm<'_, f64, Dev>, sum: &mut GradSum<f64, Dev>) -> Result<()> {
        let mut own = None;
        grad.add_to(&mut own)?;
        let own = own.expect("`add_to` sets the sum");
        sum.total = Some(own.reshape([3, 2])?);
        Ok(())
    }
}
