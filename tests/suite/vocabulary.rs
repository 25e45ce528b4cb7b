//! Compares embeddings, cross entropy and dropout over ranks with the reference.

use crate::dev::{self, Dev, Tensor, ranks};
use crate::support::{Assembled, Case, arrays, close, difference, grads_close, matrix, random, run};
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    comm::{Group, Transfer, TransferLog},
    device::{Element, Meta},
    kernels::{Activation, Backend, DropoutMask},
    ops,
    parallel::{
        Activate, Bias, BoxLayer, Chain, ColumnParallelLinear, Columns, CopyTo, DTensor, Dropout,
        DropoutState, Layer, Losses, MeanPool, PositionEmbedding, Recompute, ReduceFrom, ResidualStream,
        RowLinear, Smoothing, VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    reference,
    rng::Philox,
    shard::{Partition, Replicated, Sequences, Shard},
    tensor::{Arrays, Param, Weights},
};

const EXACT: f64 = 1e-12;

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

fn ids(seed: u64, tokens: usize, vocabulary: usize) -> Vec<u32> {
    let stream = Philox::stream(seed, 1);
    (0..tokens).map(|at| (stream.uniform(at as u64) * vocabulary as f64) as u32).collect()
}

fn wide<T: Element>(x: &Tensor<T>) -> Array2<f64> {
    x.to_array().unwrap().mapv(T::to_f64).into_dimensionality().unwrap()
}

/// The whole inputs and gradients of an embedding and its tied head.
struct Embed<'a> {
    source: &'a Arrays,
    sizes: [usize; 2],
    padding: Option<u32>,
    ids: &'a [u32],
    dy: &'a Array2<f64>,
    dlogits: &'a Array2<f64>,
}

/// A rank's results.
struct Embedded<S: ResidualStream, B: Backend> {
    y: DTensor<S, f64, B>,
    logits: DTensor<Shard<1>, f64, B>,
    table: Param<f64, B>,
    /// The transfers of the embedding, forward and backward.
    moves: [Vec<Transfer>; 2],
}

impl Embed<'_> {
    fn pass<S: ResidualStream, B: Backend>(
        &self,
        group: &Group<B>,
        record: &TransferLog,
    ) -> Result<Embedded<S, B>> {
        let ([vocabulary, hidden], tokens) = (self.sizes, self.ids.len());
        let weights = Weights::new(self.source);
        let layer = VocabParallelEmbedding::<S, f64, B>::load(group, &weights, vocabulary, hidden)?;
        let layer = layer.with_padding(self.padding)?;
        let head = layer.tied_head();
        record.take();
        let (y, rows) = layer.forward(self.ids, Sequences::one(tokens))?;
        let forward = record.take();
        let own = S::local_rows(group, tokens)?;
        let dy = self.dy.slice(ndarray::s![own, ..]).to_owned();
        let dy = S::of_local(group, tokens, shardwise::Tensor::from_array(group.device(), &dy)?)?;
        let (logits, saved) = head.forward(y.clone())?;
        let dlogits = self.dlogits.slice(ndarray::s![.., logits.local_range(1)]).to_owned();
        let dlogits = shardwise::Tensor::from_array(group.device(), &dlogits)?;
        let dx = head.backward(saved, DTensor::shard(group, dlogits, logits.partition().unwrap())?)?;
        record.take();
        layer.backward(&rows, dy.add(&dx)?)?;
        let table = layer.params().remove(0);
        Ok(Embedded { y, logits, table, moves: [forward, record.take()] })
    }
}

/// Runs an embedding and its tied head, forward and backward. The transfers must match the plan.
fn embeds<S: ResidualStream>(world: usize, vocabulary: usize, hidden: usize, tokens: usize, seed: u64) {
    let table = random(seed, "table", &[vocabulary, hidden]);
    let source = arrays([("weight", table.clone())]);
    let (ids, dy) = (ids(seed, tokens, vocabulary), matrix(seed, "dy", tokens, hidden));
    let dlogits = matrix(seed, "dlogits", tokens, vocabulary);
    // In half of the cases one of the ids is the padding id, which gets no gradient from the
    // lookup.
    let padding = ids.first().copied().filter(|_| seed.is_multiple_of(2));
    let (source, sizes) = (&source, [vocabulary, hidden]);
    let embed = Embed { source, sizes, padding, ids: &ids, dy: &dy, dlogits: &dlogits };
    let outcomes = ranks(world).run(|world| {
        let (group, record) = world.recorded();
        let got = embed.pass::<S, Dev>(&group, &record)?;
        let (alone, record) = Group::planned(&Meta::new(), group.rank(), group.size())?;
        assert_eq!(got.moves, embed.pass::<S, Meta>(&alone, &record)?.moves);
        let table = got.table;
        let values = table.grad().unwrap().to_vec()?;
        let grad = (table.regions().to_vec(), table.shape().dims().to_vec(), values);
        Ok((wide(got.y.local()), S::local_rows(&group, tokens)?, wide(got.logits.local()), [grad]))
    });
    let outcomes = outcomes.unwrap();
    let table: Array2<f64> = table.into_dimensionality().unwrap();
    let index: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    let want = reference::embedding(&index, &table);
    let mut grads = Assembled::default();
    let mut logits = Vec::new();
    for (y, own, part, grad) in &outcomes {
        // The embedding's sum over ranks only adds zeros, so y has the table's bits.
        assert_eq!(*y, want.slice(ndarray::s![own.clone(), ..]));
        grad.iter().for_each(|(regions, shape, values)| grads.add(regions, shape, values));
        logits.push(part.view());
    }
    let logits = ndarray::concatenate(ndarray::Axis(1), &logits).unwrap();
    close("logits", &logits.into_dyn(), &reference::linear(&want, &table, None), EXACT);
    let head = reference::linear_backward(&want, &table, &dlogits);
    let mut looked_up = reference::embedding_backward(&index, vocabulary, &(&dy + &head.dx));
    if let Some(padding) = padding {
        looked_up.row_mut(padding as usize).fill(0.0);
    }
    let dtable = looked_up + head.dw;
    close("dtable", &grads.finish()["weight"], &dtable, EXACT);
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn embeddings_and_tied_heads_agree_with_the_reference(
        world in 1..9usize, extra in 0..20usize, hidden in 1..6usize, tokens in 0..12usize, seed: u64,
    ) {
        embeds::<Replicated>(world, world + extra, hidden, tokens, seed);
        embeds::<Shard<0>>(world, world + extra, hidden, tokens, seed);
    }

    #[test]
    fn positions_agree_with_the_reference(
        world in 1..9usize, lengths in prop::collection::vec(0..5usize, 1..5), hidden in 1..5usize, seed: u64,
    ) {
        let (sequences, tokens) = (Sequences::packed(lengths.clone()), lengths.iter().sum());
        let (x, dy) = (matrix(seed, "x", tokens, hidden), matrix(seed, "dy", tokens, hidden));
        let table = matrix(seed, "positions", 5, hidden);
        let source = arrays([("weight", table.clone().into_dyn())]);
        let places: Vec<usize> = lengths.iter().flat_map(|&length| 0..length).collect();
        let want = &x + &reference::embedding(&places, &table);
        let dtable = reference::embedding_backward(&places, 5, &dy);
        let case = Case { sequences, ..Case::new(world, &x, &dy, &source) };
        let replicated = run!(f64, &case, |group, weights| {
            PositionEmbedding::<Replicated, f64, Dev>::load(group, weights, 5, hidden)
        });
        let sharded = run!(f64, &case, |group, weights| {
            PositionEmbedding::<Shard<0>, f64, Dev>::load(group, weights, 5, hidden)
        });
        for outcome in [replicated.unwrap(), sharded.unwrap()] {
            close("y", &outcome.y.into_dyn(), &want, EXACT);
            close("dx", &outcome.dx.into_dyn(), &dy, 0.0);
            grads_close(&outcome.grads, &[("weight", dtable.clone().into_dyn())], EXACT);
        }
    }
}

/// Returns the same loss options for the crate and for the reference.
fn options(
    smoothing: Smoothing,
    ignored: Option<u32>,
    z: f64,
) -> (VocabParallelCrossEntropy, reference::CrossEntropy) {
    let (over_all, over_others) = match smoothing {
        Smoothing::None => (0.0, 0.0),
        Smoothing::OverAll(alpha) => (alpha, 0.0),
        Smoothing::OverOthers(alpha) => (0.0, alpha),
        other => panic!("{other:?}"),
    };
    (
        VocabParallelCrossEntropy { smoothing, ignored, z },
        reference::CrossEntropy { over_all, over_others, ignored, z },
    )
}

/// Returns the losses and the gradient on `world` ranks. The transfers must match the plan, and the
/// losses must be equal on every rank.
fn entropy<T: Element>(
    world: usize,
    loss: &VocabParallelCrossEntropy,
    x: &Array2<f64>,
    targets: &[u32],
) -> Result<(ArrayD<f64>, Array2<f64>)> {
    type Pass<T, B> = (Losses<<T as Element>::Acc, B>, DTensor<Shard<1>, T, B>, Vec<Transfer>);
    fn pass<T: Element, B: Backend>(
        (group, record): (&Group<B>, &TransferLog),
        loss: &VocabParallelCrossEntropy,
        x: &Array2<f64>,
        targets: &[u32],
    ) -> Result<Pass<T, B>> {
        let partition = Partition::by_unit("test", "classes", x.ncols(), 1, group.size())?;
        let part = x.slice(ndarray::s![.., partition.range(group.rank())]).mapv(T::from_f64);
        let part = shardwise::Tensor::<T, B>::from_array(group.device(), &part)?;
        record.take();
        let (losses, saved) = loss.forward(DTensor::shard(group, part, &partition)?, targets)?;
        let dx = loss.backward(saved, 0.5)?;
        Ok((losses, dx, record.take()))
    }
    let outcomes = ranks(world).run(|world| {
        let (group, record) = world.recorded();
        let (losses, dx, moves) = pass::<T, Dev>((&group, &record), loss, x, targets)?;
        let (alone, record) = Group::planned(&Meta::new(), group.rank(), group.size())?;
        assert_eq!(moves, pass::<T, Meta>((&alone, &record), loss, x, targets)?.2);
        Ok((losses.rows().to_array()?.mapv(Element::to_f64), wide(dx.local()), losses.mean()?))
    })?;
    let bits = |losses: &ArrayD<f64>| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    assert!(outcomes.iter().all(|(losses, ..)| bits(losses) == bits(&outcomes[0].0)));
    let parts: Vec<_> = outcomes.iter().map(|(_, dx, _)| dx.view()).collect();
    Ok((outcomes[0].0.clone(), ndarray::concatenate(ndarray::Axis(1), &parts).unwrap()))
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn cross_entropy_agrees_with_the_reference(
        world in 1..9usize, extra in 0..20usize, tokens in 0..7usize, ignore: bool, z in prop::sample::select(vec![0.0, 1e-3]),
        smoothing in prop::sample::select(vec![Smoothing::None, Smoothing::OverAll(0.1), Smoothing::OverOthers(0.2)]), seed: u64,
    ) {
        let classes = world + extra;
        let (x, targets) = (matrix(seed, "x", tokens, classes) * 3.0, ids(seed, tokens, classes));
        let ignored = if ignore { Some(targets.first().copied().unwrap_or(0)) } else { None };
        let (loss, same) = options(smoothing, ignored, z);
        let (want, grad) = (same.losses(&x, &targets), same.backward(&x, &targets, 0.5));
        let (losses, dx) = entropy::<f64>(world, &loss, &x, &targets).unwrap();
        close("losses", &losses, &want, EXACT);
        close("dx", &dx.into_dyn(), &grad, EXACT);
        // The logits are rounded to bf16, so f32 and bf16 hold them exactly. In f32 the bound
        // covers e^x with |x| up to 15, and sums of as many terms as classes.
        let x = x.mapv(|x| half::bf16::from_f64(x).to_f64());
        let (want, grad) = (same.losses(&x, &targets), same.backward(&x, &targets, 0.5));
        let bound = f64::from(f32::EPSILON) * (classes as f64 + 40.0);
        let (losses, dx) = entropy::<f32>(world, &loss, &x, &targets).unwrap();
        close("f32 losses", &losses, &want, bound);
        close("f32 dx", &dx.into_dyn(), &grad, bound);
        let (losses, dx) = entropy::<half::bf16>(world, &loss, &x, &targets).unwrap();
        close("bf16 losses", &losses, &want, bound);
        close("bf16 dx", &dx.into_dyn(), &grad, half::bf16::EPSILON.to_f64() + bound);
    }
}

#[test]
fn cross_entropy_of_extreme_logits() {
    let inf = f64::INFINITY;
    // Large logits do not overflow. A class with logit −∞ is impossible, and adds no loss unless it
    // is the target. NaN affects only its row. The loss of a row of −∞ is NaN.
    let x = ndarray::array![
        [1e30, 0.0, -1e30, 5.0],
        [-inf, 1.0, 1.0, -inf],
        [0.0, f64::NAN, 0.0, 0.0],
        [-inf, -inf, -inf, -inf],
        [-1e3, -1e3, -1e3, -1e3],
    ];
    let loss = VocabParallelCrossEntropy::default();
    for world in [1, 2, 4] {
        let (losses, dx) = entropy::<f32>(world, &loss, &x, &[0, 2, 0, 0, 3]).unwrap();
        let losses: Vec<f64> = losses.iter().copied().collect();
        assert_eq!(losses[0], 0.0);
        assert!((losses[1] - 2f64.ln()).abs() < 1e-6 && losses[2].is_nan() && losses[3].is_nan());
        assert!((losses[4] - 4f64.ln()).abs() < 1e-6);
        assert_eq!(dx.row(1).to_vec(), [0.0, 0.25, -0.25, 0.0]);
        assert!(dx.row(2).iter().all(|dx| dx.is_nan()) && dx.row(4).iter().all(|dx| dx.is_finite()));
    }
}

/// An offset common to all logits changes neither the softmax nor the gradient. This holds even for
/// an offset of 1e8 in f32, where neighbouring numbers differ by 8.
#[test]
fn cross_entropy_of_logits_with_a_large_common_offset_is_right() {
    fn shifted<T: Element>(offsets: &[f64], bound: f64) {
        for (&offset, world) in offsets.iter().flat_map(|offset| [1, 2, 3].map(|world| (offset, world))) {
            // The offset and the steps are numbers of the element type.
            let offset = T::from_f64(offset).to_f64();
            let spacing = 2f64.powi(offset.log2().floor() as i32) * T::EPSILON.to_f64();
            let step = spacing.max(0.5);
            let steps = ndarray::array![[0.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, -2.0], [-3.0, 0.0, -1.0, 0.0]];
            let (x, targets) = (steps.mapv(|at| offset + at * step), [1, 1, 3]);
            assert!(x.iter().all(|&x| T::from_f64(x).to_f64() == x));
            let plain = (Smoothing::None, 0.0);
            for (smoothing, z) in [
                plain,
                (Smoothing::OverAll(0.1), 0.0),
                (Smoothing::None, 1e-3),
                (Smoothing::OverOthers(0.2), 1e-3),
            ] {
                let (loss, same) = options(smoothing, None, z);
                let (losses, dx) = entropy::<T>(world, &loss, &x, &targets).unwrap();
                let what = format!("{} + {offset:e} on {world}, {smoothing:?}, z {z}", T::DTYPE);
                // The reference would round the offset in f64. Only z-loss depends on the offset,
                // so without z-loss the reference gets the logits without the offset.
                let seen = if z == 0.0 { steps.mapv(|at| at * step) } else { x.clone() };
                close(&what, &losses, &same.losses(&seen, &targets), bound);
                close(&what, &dx.into_dyn(), &same.backward(&seen, &targets, 0.5), bound);
            }
        }
    }
    let offsets = [1e4, 1e6, 1e8];
    shifted::<f64>(&offsets, 1e-7);
    shifted::<f32>(&offsets, 1e-6);
    shifted::<half::bf16>(&offsets, half::bf16::EPSILON.to_f64());
    shifted::<half::f16>(&[1e4], half::f16::EPSILON.to_f64());
}

/// The two conventions of smoothing, PyTorch's and Megatron-LM's, differ.
#[test]
fn smoothing_conventions_differ() {
    let x = ndarray::array![[2.0, 0.0, -1.0]];
    let loss = |smoothing| entropy::<f64>(3, &options(smoothing, None, 0.0).0, &x, &[0]).unwrap().0[[0]];
    let lse = (2f64.exp() + 1.0 + (-1f64).exp()).ln();
    let (all, others) = (loss(Smoothing::OverAll(0.3)), loss(Smoothing::OverOthers(0.3)));
    assert!((all - (0.8 * (lse - 2.0) + 0.1 * lse + 0.1 * (lse + 1.0))).abs() < 1e-14);
    assert!((others - (0.7 * (lse - 2.0) + 0.15 * lse + 0.15 * (lse + 1.0))).abs() < 1e-14);
}

#[test]
fn bad_targets_and_ids_are_named() {
    let x = Array2::zeros((2, 5));
    let loss = VocabParallelCrossEntropy { ignored: Some(9), ..VocabParallelCrossEntropy::default() };
    let message = |error: Error| match error {
        Error::RankFailed { source, .. } => source.to_string(),
        error => error.to_string(),
    };
    let error = entropy::<f32>(2, &loss, &x, &[9, 5]).unwrap_err();
    assert_eq!(message(error), "cross entropy: target 5 is none of the 5 classes");
    let error = entropy::<f32>(2, &loss, &x, &[0]).unwrap_err();
    assert_eq!(message(error), "cross entropy: the number of targets is 1, but the number of rows is 2");
    let wrong = VocabParallelCrossEntropy { smoothing: Smoothing::OverAll(1.5), ..loss };
    let error = entropy::<f32>(2, &wrong, &x, &[0, 0]).unwrap_err();
    assert_eq!(message(error), "cross entropy: a smoothing of 1.5 is not between 0 and 1");
    let source = arrays([("weight", random(1, "w", &[5, 2]))]);
    let group = Group::solo(&dev::fresh());
    let table =
        VocabParallelEmbedding::<Replicated, f32, Dev>::load(&group, &Weights::new(&source), 5, 2).unwrap();
    let error = table.forward(&[0, 5], Sequences::one(2)).unwrap_err();
    assert_eq!(error.to_string(), "embedding: id 5 is beyond a vocabulary of 5 words");
    let error = table.with_padding(Some(5)).unwrap_err();
    assert_eq!(error.to_string(), "embedding: the padding 5 is beyond a vocabulary of 5 words");
}

/// Returns the result of dropout on ones on one device.
fn mask(dropout: &Dropout<Replicated>, rows: usize, cols: usize, draw: DropoutState) -> Array2<f64> {
    let group = Group::solo(&dev::fresh());
    let ones = DTensor::replicated(&group, Tensor::full(group.device(), [rows, cols], 1.0).unwrap()).unwrap();
    wide(Layer::<f64, Dev>::forward(dropout, ones.with_dropout_state(draw)).unwrap().0.local())
}

proptest! {
    #![proptest_config(cases(16))]

    /// The same elements are dropped at every size, placement and partition of the batch, also in
    /// the backward.
    #[test]
    fn dropout_does_not_depend_on_the_sharding(
        world in 1..9usize, rows in 1..10usize, cols in 1..30usize, p in 0.0..0.9, step: u64, seed: u64,
    ) {
        let draw = DropoutState { step, row: 3, sequence: 0 };
        let want = mask(&Dropout::new(p, seed, "d"), rows, cols, draw);
        prop_assert!(want.iter().all(|&y| y == 0.0 || (y - 1.0 / (1.0 - p)).abs() < 1e-15));
        // The matrix with three more rows, starting three rows earlier, drops the same elements.
        let whole = mask(&Dropout::new(p, seed, "d"), rows + 3, cols, DropoutState { row: 0, ..draw });
        prop_assert_eq!(whole.slice(ndarray::s![3.., ..]), &want);
        let (x, dy) = (matrix(seed, "x", rows, cols), matrix(seed, "dy", rows, cols));
        ranks(world).run(|group| {
            let tensor = |part: ndarray::ArrayView2<'_, f64>| Tensor::from_array(group.device(), &part.to_owned());
            fn both<P: shardwise::shard::Elementwise + shardwise::shard::Placement<Dual = P>>(
                layer: Dropout<P>, x: DTensor<P, f64, Dev>, dy: DTensor<P, f64, Dev>, draw: DropoutState,
            ) -> Result<(Array2<f64>, Array2<f64>)> {
                let (same, _) = layer.forward(x.clone())?;
                assert_eq!(wide(same.local()), wide(x.local()), "nothing is dropped outside of training");
                let (y, saved) = layer.forward(x.with_dropout_state(draw))?;
                let dx: DTensor<P, f64, Dev> = layer.backward(saved, dy)?;
                Ok((wide(y.local()), wide(dx.local())))
            }
            let near = |(y, dx): (Array2<f64>, Array2<f64>), rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| {
                let part = |x: &Array2<f64>| (x * &want).slice(ndarray::s![rows.clone(), cols.clone()]).to_owned();
                assert!(difference(&y.into_dyn(), &part(&x).into_dyn()) <= 1e-15);
                assert!(difference(&dx.into_dyn(), &part(&dy).into_dyn()) <= 1e-15);
            };
            let layer = Dropout::<Replicated>::new(p, seed, "d");
            let whole = |x: &Array2<f64>| DTensor::replicated(&group, tensor(x.view())?);
            near(both(layer, whole(&x)?, whole(&dy)?, draw)?, 0..rows, 0..cols);
            let partition = Partition::even(rows, group.size());
            let own = partition.range(group.rank());
            let part = |x: &Array2<f64>| DTensor::<Shard<0>, f64, Dev>::shard(&group, tensor(x.slice(ndarray::s![own.clone(), ..]))?, &partition);
            near(both(Dropout::new(p, seed, "d"), part(&x)?, part(&dy)?, draw)?, own.clone(), 0..cols);
            let partition = Partition::even(cols, group.size());
            let own = partition.range(group.rank());
            let part = |x: &Array2<f64>| DTensor::<Shard<1>, f64, Dev>::shard(&group, tensor(x.slice(ndarray::s![.., own.clone()]))?, &partition);
            near(both(Dropout::new(p, seed, "d"), part(&x)?, part(&dy)?, draw)?, 0..rows, own.clone());
            Ok(())
        }).unwrap();
    }
}

/// Each replica has some sequences of a batch. After a mean over sequences, a replica's sequences
/// have the dropout masks that they have in the whole batch.
#[test]
fn dropout_of_means_does_not_depend_on_the_partition_of_the_batch() {
    let lens = [3, 1, 4, 2];
    let layer = || Chain(MeanPool, Dropout::<Replicated>::new(0.5, 1, "d"));
    let masks = |sequences: std::ops::Range<usize>| {
        let group = Group::solo(&dev::fresh());
        let own = Sequences::packed(lens[sequences.clone()].iter().copied());
        let (row, sequence) = (lens[..sequences.start].iter().sum::<usize>() as u64, sequences.start as u64);
        let ones = Tensor::full(group.device(), [own.rows(), 40], 1.0).unwrap();
        let x = DTensor::replicated(&group, ones).unwrap().with_sequences(own).unwrap();
        let x = x.with_dropout_state(DropoutState { step: 3, row, sequence });
        wide(Layer::<f64, Dev>::forward(&layer(), x).unwrap().0.local())
    };
    let whole = masks(0..4);
    assert!(whole.rows().into_iter().any(|row| row != whole.row(0)));
    assert_eq!(masks(0..2), whole.slice(ndarray::s![..2, ..]));
    assert_eq!(masks(2..4), whole.slice(ndarray::s![2.., ..]));
}

/// A tensor of more than two dimensions has the mask of the matrix with the same rows, whichever
/// dimension is sharded.
#[test]
fn dropout_of_any_rank_draws_by_the_index_in_the_whole() {
    fn part<const D: usize>(group: &Group<Dev>, whole: &ArrayD<f64>) -> Result<ArrayD<f64>> {
        let partition = Partition::even(whole.shape()[D], group.size());
        let own = |x: &ArrayD<f64>| {
            x.slice_axis(ndarray::Axis(D), ndarray::Slice::from(partition.range(group.rank()))).to_owned()
        };
        let ones = Tensor::from_array(group.device(), &own(&ArrayD::ones(whole.raw_dim())))?;
        let x = DTensor::<Shard<D>, f64, Dev>::shard(group, ones, &partition)?
            .with_dropout_state(DropoutState { step: 7, row: 3, sequence: 0 });
        let layer = Dropout::<Shard<D>>::new(0.5, 1, "d");
        let (y, saved) = layer.forward(x.clone())?;
        let dx: DTensor<Shard<D>, f64, Dev> = layer.backward(saved, x)?;
        assert_eq!(y.local().to_array()?, own(whole), "sharded along {D}");
        assert_eq!(dx.local().to_array()?, own(whole), "the gradient, sharded along {D}");
        Ok(own(whole))
    }
    for dims in [vec![4, 2, 3], vec![5, 3, 4, 3], vec![2, 1, 5], vec![3, 0, 2]] {
        let (rows, cols) = (dims[..dims.len() - 1].iter().product(), dims[dims.len() - 1]);
        let whole =
            mask(&Dropout::new(0.5, 1, "d"), rows, cols, DropoutState { step: 7, row: 3, sequence: 0 });
        let whole = whole.into_dyn().into_shape_with_order(ndarray::IxDyn(&dims)).unwrap();
        for world in 1..4 {
            ranks(world)
                .run(|group| {
                    part::<0>(&group, &whole)?;
                    part::<1>(&group, &whole)?;
                    part::<2>(&group, &whole)?;
                    if dims.len() > 3 {
                        part::<3>(&group, &whole)?;
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn dropout_drops_as_often_as_asked_and_anew_at_each_step() {
    let dropout = Dropout::new(0.3, 1, "d");
    let at = |step| mask(&dropout, 100, 100, DropoutState { step, row: 0, sequence: 0 });
    let share = at(0).iter().filter(|&&y| y == 0.0).count() as f64 / 1e4;
    // The bound is four standard deviations.
    assert!((share - 0.3).abs() < 4.0 * (0.3 * 0.7 / 1e4_f64).sqrt(), "{share}");
    assert!(
        at(0) != at(1)
            && at(0)
                != mask(&Dropout::new(0.3, 1, "e"), 100, 100, DropoutState { step: 0, row: 0, sequence: 0 })
    );
    // The mask follows from Philox's outputs, whichever code generates them.
    let mask = DropoutMask { probability: 0.5, stream: Philox::stream(1, 2), row: 0, column: 1, width: 3 };
    let x = Tensor::<f64>::full(&dev::poisoned(), [4, 2], 1.0).unwrap();
    let y = wide(&ops::dropout(&[(4, mask)], &x).unwrap());
    for ((row, col), &y) in y.indexed_iter() {
        let kept = Philox::stream(1, 2).uniform((row * 3 + col + 1) as u64) >= 0.5;
        assert_eq!(y, if kept { 2.0 } else { 0.0 });
    }
    let error = |mask| ops::dropout(&[(1, mask), (3, mask)], &x).unwrap_err().to_string();
    assert_eq!(
        error(DropoutMask { probability: 1.0, ..mask }),
        "dropout: the probability is 1, but must be in 0 ≤ p < 1"
    );
    assert_eq!(
        error(DropoutMask { column: 2, ..mask }),
        "dropout: the column after the shard's last is 4, but the width of the whole matrix is 3"
    );
    let error = ops::dropout(&[(1, mask), (2, mask)], &x).unwrap_err().to_string();
    assert_eq!(error, "dropout: rows of the masks is 3, but rows of x is 4");
}

/// Lists, boxes and recomputation around a feed-forward layer keep its bits. `run!` compares their
/// transfers with the plan.
#[test]
fn wrapped_layers_give_the_bits_of_the_layer() {
    let (x, dy) = (matrix(1, "x", 5, 4), matrix(1, "dy", 5, 4));
    let source = arrays([
        ("up.weight", random(1, "up", &[6, 4])),
        ("up.bias", random(1, "b", &[6])),
        ("down.weight", random(1, "down", &[4, 6])),
        ("down.bias", random(1, "c", &[4])),
    ]);
    type Plain<B> = BoxLayer<Replicated, Replicated, f64, B>;
    fn plain<B: Backend>(group: &Group<B>, weights: &Weights<'_>) -> Result<Plain<B>> {
        let columns = Columns::even(group, 6)?;
        let up = ColumnParallelLinear::<Replicated, f64, B>::load(
            group,
            &weights.at("up"),
            4,
            &columns,
            Bias::Add,
        )?;
        let down = RowLinear::load(group, &weights.at("down"), columns.partition(), 4)?;
        let layer = Layer::<f64, B>::then(up, Activate::new(Activation::Silu));
        let layer = Layer::<f64, B>::then(layer, down);
        Ok(BoxLayer::new(Layer::<f64, B>::then(layer, ReduceFrom)))
    }
    let source =
        shardwise::tensor::Arrays(source.0.into_iter().filter(|(name, _)| name != "down.bias").collect());
    let case = Case::new(2, &x, &dy, &source);
    let want = run!(f64, &case, |group, weights| plain(group, weights)).unwrap();
    let recomputed = run!(f64, &case, |group, weights| Ok(Recompute::new(plain(group, weights)?))).unwrap();
    let listed = run!(f64, &case, |group, weights| Ok(vec![plain(group, weights)?])).unwrap();
    for got in [&recomputed, &listed] {
        assert_eq!((&got.y, &got.dx, &got.grads), (&want.y, &want.dx, &want.grads));
    }
    let nothing = run!(f64, &case, |_, _| Ok(Vec::<Plain<Dev>>::new())).unwrap();
    assert_eq!((&nothing.y, &nothing.dx), (&x, &dy));
    // A layer rejects another layer's saved tensors.
    let group = Group::solo(&dev::fresh());
    let boxed = BoxLayer::<Replicated, shardwise::shard::Copied, f64, Dev>::new(CopyTo);
    let x = DTensor::replicated(&group, Tensor::from_array(group.device(), &x).unwrap()).unwrap();
    let error =
        boxed.backward(Box::new(1_u8), DTensor::partial(&group, x.local().clone()).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "backward: the saved values belong to a forward of another layer");
}
