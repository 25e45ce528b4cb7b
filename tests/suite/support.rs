//! What the tests of layers share: spreading whole tensors over ranks, running a layer there with every check that holds
//! for all layers, and putting the results together again.

use crate::dev::{DTensor, Dev, Tensor, ranks};
use ndarray::{Array2, ArrayD, Axis, IxDyn, Slice, concatenate};
use shardwise::{
    Error, Result,
    comm::{Group, Overlap},
    device::Element,
    parallel::Layer,
    reference::worst_relative,
    rng::Philox,
    shard::{Copied, Partial, Partition, Placement, Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Piece, Weights},
};
use std::{collections::BTreeMap, io::Write};

/// Writes past libtest, which keeps what a test that passes prints.
pub(crate) fn say(words: &str) {
    let _ = std::io::stderr().write_all(format!("\n{words}\n").as_bytes());
}

/// Normally distributed numbers, a function of the name and the seed.
pub(crate) fn random(seed: u64, name: &str, shape: &[usize]) -> ArrayD<f64> {
    let stream = Philox::named(seed, name);
    let mut index = 0;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        index += 1;
        stream.normal(index)
    })
}

/// A random matrix.
pub(crate) fn matrix(seed: u64, name: &str, rows: usize, cols: usize) -> Array2<f64> {
    random(seed, name, &[rows, cols]).into_dimensionality().unwrap()
}

/// Small whole numbers: sums and products of a few are exact in every element.
pub(crate) fn integers(seed: u64, name: &str, rows: usize, cols: usize) -> Array2<f64> {
    matrix(seed, name, rows, cols).mapv(|value| value.round().clamp(-2.0, 2.0))
}

/// The largest difference, relative to the largest number of `want` (or 1).
pub(crate) fn difference(got: &ArrayD<f64>, want: &ArrayD<f64>) -> f64 {
    assert_eq!(got.shape(), want.shape());
    // A random size may be 0.
    if want.is_empty() { 0.0 } else { worst_relative(got, want) }
}

/// Holds `got` to `want` within a relative difference.
#[track_caller]
pub(crate) fn close<D: ndarray::Dimension>(
    what: &str,
    got: &ArrayD<f64>,
    want: &ndarray::Array<f64, D>,
    tolerance: f64,
) {
    let error = difference(got, &want.clone().into_dyn());
    assert!(error <= tolerance, "{what}: relative difference {error:e} > {tolerance:e}");
}

/// A cut of `len` into `parts` parts, uneven in a way that depends on the seed; each part has at least one unit of `unit`.
pub(crate) fn uneven(seed: u64, len: usize, parts: usize) -> Partition {
    assert!(len >= parts);
    let stream = Philox::stream(seed, 77);
    let mut sizes = vec![1; parts];
    for at in 0..len - parts {
        sizes[(stream.uniform(at as u64) * parts as f64) as usize] += 1;
    }
    Partition::from_sizes(sizes)
}

/// How a test makes a sharded tensor of a whole one, and a whole one of the ranks' parts.
pub(crate) trait Spread: Placement {
    fn spread<T: Element>(
        group: &Group<Dev>,
        whole: &Array2<f64>,
        cut: Option<&Partition>,
    ) -> Result<DTensor<Self, T>>;

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64>;
}

fn tensor<T: Element>(group: &Group<Dev>, array: &Array2<f64>) -> Result<Tensor<T>> {
    Tensor::from_array(group.device(), &array.mapv(T::from_f64))
}

/// All ranks hold the same bits.
fn equal(parts: Vec<Array2<f64>>) -> Array2<f64> {
    let bits = |array: &Array2<f64>| array.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(parts.iter().all(|part| bits(part) == bits(&parts[0])), "the ranks' values differ");
    parts.into_iter().next().unwrap()
}

impl Spread for Replicated {
    fn spread<T: Element>(
        group: &Group<Dev>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T>> {
        DTensor::replicated(group, tensor(group, whole)?)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        equal(parts)
    }
}

impl Spread for Copied {
    fn spread<T: Element>(
        group: &Group<Dev>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T>> {
        DTensor::copied(group, tensor(group, whole)?)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        equal(parts)
    }
}

impl<const D: usize> Spread for Shard<D> {
    fn spread<T: Element>(
        group: &Group<Dev>,
        whole: &Array2<f64>,
        cut: Option<&Partition>,
    ) -> Result<DTensor<Self, T>> {
        let even = group.even_cut(whole.shape()[D])?;
        let cut = cut.unwrap_or(&even);
        let part = whole.slice_axis(Axis(D), Slice::from(cut.range(group.rank()))).to_owned();
        DTensor::shard(group, tensor(group, &part)?, cut)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        concatenate(Axis(D), &views).unwrap()
    }
}

impl Spread for Partial {
    /// Every rank but the last holds whole numbers of its own; the last holds the rest.
    fn spread<T: Element>(
        group: &Group<Dev>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T>> {
        let term = |rank: usize| integers(rank as u64, "term", whole.nrows(), whole.ncols());
        let last = group.size() - 1;
        let own = match group.rank() {
            rank if rank == last => (0..last).fold(whole.clone(), |rest, rank| rest - term(rank)),
            rank => term(rank),
        };
        DTensor::partial(group, tensor(group, &own)?)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        parts.into_iter().reduce(|sum, part| sum + part).unwrap()
    }
}

/// What a layer gave on all ranks, put together.
pub(crate) struct Outcome {
    pub(crate) y: Array2<f64>,
    pub(crate) dx: Array2<f64>,
    /// The gradients of the model's tensors, by name.
    pub(crate) grads: BTreeMap<String, ArrayD<f64>>,
}

/// A case for [`run`].
#[derive(Clone)]
pub(crate) struct Case<'a> {
    pub(crate) world: usize,
    pub(crate) x: &'a Array2<f64>,
    pub(crate) dy: &'a Array2<f64>,
    /// How x and dy are cut, where their placement is a shard; evenly if not given.
    pub(crate) x_cut: Option<Partition>,
    pub(crate) dy_cut: Option<Partition>,
    pub(crate) sequences: Sequences,
    pub(crate) weights: &'a Arrays,
    pub(crate) reduction: Reduction,
    pub(crate) overlap: Overlap,
}

impl<'a> Case<'a> {
    pub(crate) fn new(world: usize, x: &'a Array2<f64>, dy: &'a Array2<f64>, weights: &'a Arrays) -> Self {
        let sequences = Sequences::one(x.nrows());
        let (reduction, overlap) = (Reduction::Fast, Overlap::Off);
        Self { world, x, dy, x_cut: None, dy_cut: None, sequences, weights, reduction, overlap }
    }
}

/// Runs a layer forward and backward, twice over, on `case.world` ranks and checks what holds for every layer: recorded
/// traffic equals declared traffic, a second run gives the same bits and adds the same gradients once more, replicated
/// values are equal on all ranks, and every element of every tensor of the model is owned by exactly one rank.
pub(crate) fn run<T, L>(
    case: &Case<'_>,
    build: impl Fn(&Group<Dev>, &Weights<'_>) -> Result<L> + Sync,
) -> Result<Outcome>
where
    T: Element,
    L: Layer<T, Dev>,
    L::In: Spread,
    L::Out: Spread,
    <L::In as Placement>::Dual: Spread,
    <L::Out as Placement>::Dual: Spread,
{
    let outcomes = ranks(case.world).run(|world| {
        let (group, record) = world.with_reduction(case.reduction).with_overlap(case.overlap).recorded();
        let layer = build(&group, &Weights::new(case.weights))?;
        let mut steps = Vec::new();
        for _ in 0..2 {
            let x = L::In::spread::<T>(&group, case.x, case.x_cut.as_ref())?;
            let x = x.with_sequences(case.sequences.clone())?;
            record.take();
            let (y, saved) = layer.forward(&x)?;
            let forward = record.take();
            let dy = <L::Out as Placement>::Dual::spread::<T>(&group, case.dy, case.dy_cut.as_ref())?;
            record.take();
            let dx = layer.backward(saved, &dy)?;
            let backward = record.take();
            let (declared, shape) = layer.traffic(&group, x.shape());
            assert_eq!(forward, declared.forward, "the forward's traffic");
            assert_eq!(backward, declared.backward, "the backward's traffic");
            assert_eq!(shape, y.shape(), "the shape of the output");
            assert_eq!(x.shape(), dx.shape(), "the shape of the input's gradient");
            steps.push((wide(y.local())?, wide(dx.local())?));
        }
        let bits = |(y, dx): &(Array2<f64>, Array2<f64>)| {
            y.iter().chain(dx).map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(bits(&steps[0]), bits(&steps[1]), "the second run's bits");
        let mut grads: Vec<(Vec<Piece>, Vec<usize>, Vec<f64>)> = Vec::new();
        for param in layer.params() {
            let grad = param.grad().ok_or_else(|| Error::Invalid {
                op: "test",
                reason: format!("{} has no gradient", param.name()),
            })?;
            assert_eq!(grad.shape(), param.shape());
            let values = grad.to_vec()?.into_iter().map(|value| value.to_f64() / 2.0).collect();
            grads.push((param.pieces().to_vec(), grad.shape().dims().to_vec(), values));
            param.zero_grad();
            assert!(param.grad().is_none());
        }
        let (y, dx) = steps.swap_remove(0);
        Ok((y, dx, grads))
    })?;
    let mut ys = Vec::new();
    let mut dxs = Vec::new();
    let mut grads = Assembled::default();
    for (y, dx, params) in outcomes {
        ys.push(y);
        dxs.push(dx);
        for (pieces, shape, values) in params {
            grads.add(&pieces, &shape, &values);
        }
    }
    Ok(Outcome {
        y: L::Out::collect(ys),
        dx: <L::In as Placement>::Dual::collect(dxs),
        grads: grads.finish(),
    })
}

fn wide<T: Element>(tensor: &Tensor<T>) -> Result<Array2<f64>> {
    let array = tensor.to_array()?.mapv(T::to_f64);
    Ok(array.into_dimensionality().unwrap())
}

/// The tensors of the model, put together from the ranks' pieces.
#[derive(Default)]
pub(crate) struct Assembled(BTreeMap<String, (ArrayD<f64>, ArrayD<u32>, ArrayD<u32>)>);

impl Assembled {
    pub(crate) fn add(&mut self, pieces: &[Piece], shape: &[usize], values: &[f64]) {
        let width: usize = shape[1..].iter().product();
        for piece in pieces {
            let whole = piece.region.shape().dims().to_vec();
            let (sum, held, owned) = self.0.entry(piece.tensor.clone()).or_insert_with(|| {
                let zeros = ArrayD::zeros(IxDyn(&whole));
                (ArrayD::zeros(IxDyn(&whole)), zeros.clone(), zeros)
            });
            let extent = piece.region.extent();
            let start = piece.row * width;
            let part =
                ArrayD::from_shape_vec(IxDyn(extent.dims()), values[start..start + extent.len()].to_vec());
            let (part, ranges) = (part.unwrap(), piece.region.ranges());
            let region = |axis: ndarray::AxisDescription| Slice::from(ranges[axis.axis.index()].clone());
            let mut at = sum.slice_each_axis_mut(region);
            let mut held = held.slice_each_axis_mut(region);
            // Whoever holds an element has the same gradient for it.
            for ((sum, part), held) in at.iter_mut().zip(&part).zip(held.iter_mut()) {
                assert!(*held == 0 || sum.to_bits() == part.to_bits(), "holders of {} differ", piece.tensor);
                *sum = *part;
                *held += 1;
            }
            if piece.owned {
                owned.slice_each_axis_mut(region).iter_mut().for_each(|owned| *owned += 1);
            }
        }
    }

    pub(crate) fn finish(self) -> BTreeMap<String, ArrayD<f64>> {
        let tensors = self.0.into_iter().map(|(name, (sum, _, owned))| {
            assert!(owned.iter().all(|&owners| owners == 1), "{name} is not owned by exactly one rank each");
            (name, sum)
        });
        tensors.collect()
    }
}

/// Arrays by name.
pub(crate) fn arrays<const N: usize>(tensors: [(&str, ArrayD<f64>); N]) -> Arrays {
    Arrays(tensors.into_iter().map(|(name, array)| (name.to_string(), array)).collect())
}

/// Holds every gradient to the reference's.
#[track_caller]
pub(crate) fn grads_close(got: &BTreeMap<String, ArrayD<f64>>, want: &[(&str, ArrayD<f64>)], tolerance: f64) {
    let names: Vec<_> = got.keys().map(String::as_str).collect();
    let mut wanted: Vec<_> = want.iter().map(|(name, _)| *name).collect();
    wanted.sort_unstable();
    assert_eq!(names, wanted);
    for (name, want) in want {
        close(name, &got[*name], want, tolerance);
    }
}
