//! Helpers of the layers' tests: they shard whole tensors over ranks, run a layer on these ranks
//! with the checks that hold for every layer, and assemble the results.

use crate::dev::{Dev, FEWER, ranks};
use ndarray::{Array2, ArrayD, Axis, IxDyn, Slice, concatenate};
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, Overlap, Transfer, TransferLog},
    device::{Element, Meta},
    kernels::Backend,
    parallel::{BoxLayer, Context, DTensor, Layer},
    reference::worst_relative,
    rng::Philox,
    shard::{Copied, Partial, Partition, Placement, Reduction, Replicated, Sequences, Shape, Shard},
    tensor::{Arrays, ParamRegion, Weights},
};
use std::{collections::BTreeMap, io::Write};

/// Writes to stderr past libtest, which hides the output of tests that pass.
pub(crate) fn say(words: &str) {
    let _ = std::io::stderr().write_all(format!("\n{words}\n").as_bytes());
}

/// Returns normally distributed numbers, a function of the name and the seed.
pub(crate) fn random(seed: u64, name: &str, shape: &[usize]) -> ArrayD<f64> {
    let stream = Philox::named(seed, name);
    let mut index = 0;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        index += 1;
        stream.normal(index)
    })
}

/// Returns a random matrix.
pub(crate) fn matrix(seed: u64, name: &str, rows: usize, cols: usize) -> Array2<f64> {
    random(seed, name, &[rows, cols]).into_dimensionality().unwrap()
}

/// Returns small whole numbers. Sums and products of a few are exact in every element type.
pub(crate) fn integers(seed: u64, name: &str, rows: usize, cols: usize) -> Array2<f64> {
    matrix(seed, name, rows, cols).mapv(|value| value.round().clamp(-2.0, 2.0))
}

/// Returns the largest difference, relative to the largest number of `want` (or 1).
pub(crate) fn difference(got: &ArrayD<f64>, want: &ArrayD<f64>) -> f64 {
    assert_eq!(got.shape(), want.shape());
    // A random size may be 0.
    if want.is_empty() { 0.0 } else { worst_relative(got, want) }
}

/// Asserts that `got` equals `want` up to a relative difference.
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

/// Returns an uneven partition of `len` over `parts` ranks, chosen by the seed. Each rank has at
/// least one index.
pub(crate) fn uneven(seed: u64, len: usize, parts: usize) -> Partition {
    assert!(len >= parts);
    let stream = Philox::stream(seed, 77);
    let mut sizes = vec![1; parts];
    for at in 0..len - parts {
        sizes[(stream.uniform(at as u64) * parts as f64) as usize] += 1;
    }
    Partition::from_sizes(sizes)
}

/// Distributes a whole tensor over the ranks, and assembles a whole tensor from the ranks' local
/// ones.
pub(crate) trait Spread: Placement {
    fn spread<T: Element, B: Backend>(
        group: &Group<B>,
        whole: &Array2<f64>,
        partition: Option<&Partition>,
    ) -> Result<DTensor<Self, T, B>>;

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64>;
}

fn tensor<T: Element, B: Backend>(group: &Group<B>, array: &Array2<f64>) -> Result<Tensor<T, B>> {
    Tensor::from_array(group.device(), &array.mapv(T::from_f64))
}

/// Asserts that all ranks hold the same bits, and returns them.
fn equal(parts: Vec<Array2<f64>>) -> Array2<f64> {
    assert!(parts.iter().all(|part| bits(part) == bits(&parts[0])), "the ranks' values differ");
    parts.into_iter().next().unwrap()
}

fn bits(array: &Array2<f64>) -> Vec<u64> {
    array.iter().map(|value| value.to_bits()).collect()
}

impl Spread for Replicated {
    fn spread<T: Element, B: Backend>(
        group: &Group<B>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T, B>> {
        DTensor::replicated(group, tensor(group, whole)?)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        equal(parts)
    }
}

impl Spread for Copied {
    fn spread<T: Element, B: Backend>(
        group: &Group<B>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T, B>> {
        DTensor::copied(group, tensor(group, whole)?)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        equal(parts)
    }
}

impl<const D: usize> Spread for Shard<D> {
    fn spread<T: Element, B: Backend>(
        group: &Group<B>,
        whole: &Array2<f64>,
        partition: Option<&Partition>,
    ) -> Result<DTensor<Self, T, B>> {
        let even = group.even_partition(whole.shape()[D])?;
        let partition = partition.unwrap_or(&even);
        let shard = whole.slice_axis(Axis(D), Slice::from(partition.range(group.rank()))).to_owned();
        DTensor::shard(group, tensor(group, &shard)?, partition)
    }

    fn collect(parts: Vec<Array2<f64>>) -> Array2<f64> {
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        concatenate(Axis(D), &views).unwrap()
    }
}

impl Spread for Partial {
    /// Every rank but the last holds random whole numbers. The last rank holds the rest of the sum.
    fn spread<T: Element, B: Backend>(
        group: &Group<B>,
        whole: &Array2<f64>,
        _: Option<&Partition>,
    ) -> Result<DTensor<Self, T, B>> {
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

/// A layer's results on all ranks, assembled.
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
    /// The partitions of x and dy if their placement is a shard. `None` means even.
    pub(crate) x_partition: Option<Partition>,
    pub(crate) dy_partition: Option<Partition>,
    pub(crate) sequences: Sequences,
    pub(crate) weights: &'a Arrays,
    pub(crate) reduction: Reduction,
    pub(crate) overlap: Overlap,
}

impl<'a> Case<'a> {
    pub(crate) fn new(world: usize, x: &'a Array2<f64>, dy: &'a Array2<f64>, weights: &'a Arrays) -> Self {
        let sequences = Sequences::one(x.nrows());
        let (reduction, overlap) = (Reduction::Fast, Overlap::Off);
        Self { world, x, dy, x_partition: None, dy_partition: None, sequences, weights, reduction, overlap }
    }
}

/// Runs a layer on `case.world` ranks by [`run_on`], and compares its transfers with the plan. The
/// builder is compiled for the tests' device and for `Meta`. In the builder, `Dev` names the device
/// for which it is compiled.
macro_rules! run {
    ($T:ty, $case:expr, |$group:pat_param, $weights:pat_param| $build:expr) => {
        $crate::support::run_on::<$T, _, _>(
            $case,
            &|$group, $weights| $crate::support::boxed(|| $build),
            Some(&{
                #[allow(dead_code, reason = "a builder need not name its device")]
                type Dev = shardwise::device::Meta;
                |$group: &shardwise::comm::Group<Dev>, $weights: &shardwise::tensor::Weights<'_>| {
                    $crate::support::boxed(|| $build)
                }
            }),
        )
    };
}
pub(crate) use run;

/// Like [`run`], but without a plan. It serves tests that run a layer in many element types. A
/// different test checks the layer's plan in one of these types.
macro_rules! run_unplanned {
    ($T:ty, $case:expr, |$group:pat_param, $weights:pat_param| $build:expr) => {
        $crate::support::run_on::<$T, _, _>(
            $case,
            &|$group, $weights| $crate::support::boxed(|| $build),
            None,
        )
    };
}
pub(crate) use run_unplanned;

/// Erases the type of a layer, so that the code that runs it is compiled once for all layers.
pub(crate) fn boxed<T, L, B>(build: impl FnOnce() -> Result<L>) -> Result<BoxLayer<L::In, L::Out, T, B>>
where
    T: Element,
    B: Backend,
    L: Layer<T, B, Saved: 'static> + 'static,
{
    build().map(BoxLayer::new)
}

/// A function that builds a layer on a rank.
pub(crate) type Build<'a, In, Out, T, B> =
    &'a (dyn Fn(&Group<B>, &Weights<'_>) -> Result<BoxLayer<In, Out, T, B>> + Sync);

/// A rank's transfers, and the shapes of its y and dx.
#[derive(Debug, PartialEq)]
pub(crate) struct Moves {
    pub(crate) forward: Vec<Transfer>,
    pub(crate) backward: Vec<Transfer>,
    shapes: [Shape; 4],
}

/// The results of a forward and a backward of a layer.
pub(crate) struct Pass<L: Layer<T, B>, T: Element, B: Backend> {
    y: DTensor<L::Out, T, B>,
    dx: DTensor<<L::In as Placement>::Dual, T, B>,
    pub(crate) moves: Moves,
}

impl<L, T, B> Pass<L, T, B>
where
    T: Element,
    B: Backend,
    L: Layer<T, B, In: Spread<Dual: Spread>, Out: Spread<Dual: Spread>>,
{
    fn input(case: &Case<'_>, group: &Group<B>) -> Result<DTensor<L::In, T, B>> {
        let x = L::In::spread::<T, B>(group, case.x, case.x_partition.as_ref())?;
        x.with_sequences(case.sequences.clone())
    }

    pub(crate) fn new(case: &Case<'_>, group: &Group<B>, record: &TransferLog, layer: &L) -> Result<Self> {
        let x = Self::input(case, group)?;
        record.take();
        let (y, saved) = layer.forward(x)?;
        let forward = record.take();
        let dy = <L::Out as Placement>::Dual::spread::<T, B>(group, case.dy, case.dy_partition.as_ref())?;
        record.take();
        let dx = layer.backward(saved, dy)?;
        let shapes = [y.shape(), y.local().shape(), dx.shape(), dx.local().shape()];
        let moves = Moves { forward, backward: record.take(), shapes };
        Ok(Self { y, dx, moves })
    }
}

/// Runs a layer forward and backward twice on `case.world` ranks, and checks the properties that
/// hold for every layer:
///
/// * the transfers and every shape equal those of a plan that each rank makes alone, without data;
/// * a second run gives the same bits and adds the same gradients again;
/// * inference gives the forward's bits and makes the forward's transfers;
/// * replicated values are equal on all ranks;
/// * every element of every tensor of the model is owned by exactly one rank.
pub(crate) fn run_on<T, In, Out>(
    case: &Case<'_>,
    build: Build<'_, In, Out, T, Dev>,
    plan: Option<Build<'_, In, Out, T, Meta>>,
) -> Result<Outcome>
where
    T: Element,
    In: Spread<Dual: Spread>,
    Out: Spread<Dual: Spread>,
{
    let outcomes = ranks(case.world).run(|world| {
        let (group, record) = world.with_reduction(case.reduction).with_overlap(case.overlap).recorded();
        let weights = Weights::new(case.weights);
        let layer = build(&group, &weights)?;
        let mut steps = Vec::new();
        for _ in 0..2 {
            let pass = Pass::<_, T, Dev>::new(case, &group, &record, &layer)?;
            assert_eq!(pass.dx.shape().dims(), case.x.shape(), "the shape of the input's gradient");
            steps.push((wide(pass.y.local())?, wide(pass.dx.local())?, pass.moves));
        }
        let (y, dx, moves) = steps.swap_remove(0);
        assert_eq!(bits(&y), bits(&steps[0].0), "the second run's output");
        assert_eq!(bits(&dx), bits(&steps[0].1), "the second run's gradient");
        assert_eq!(moves, steps[0].2, "the second run's transfers");
        // On slow devices only the tests of models check inference.
        if FEWER == 1 {
            let x = Pass::<BoxLayer<In, Out, T, Dev>, T, Dev>::input(case, &group)?;
            record.take();
            let inferred = layer.infer(x, &mut Context::default())?;
            assert_eq!(record.take(), moves.forward, "inference's transfers");
            assert_eq!(bits(&wide(inferred.local())?), bits(&y), "inference");
        }

        if let Some(plan) = plan {
            let (alone, record) = Group::planned(&Meta::new(), group.rank(), group.size())?;
            let alone = alone.with_reduction(case.reduction).with_overlap(case.overlap);
            let planned = Pass::<_, T, Meta>::new(case, &alone, &record, &plan(&alone, &weights)?)?;
            assert_eq!(moves, planned.moves, "the transfers and shapes, and their plan");
        }

        let mut grads: Vec<(Vec<ParamRegion>, Vec<usize>, Vec<f64>)> = Vec::new();
        for param in layer.params() {
            let grad = param.grad().ok_or_else(|| Error::Invalid {
                op: "test",
                reason: format!("{} has no gradient", param.name()),
            })?;
            assert_eq!(grad.shape(), param.shape());
            let values = grad.to_vec()?.into_iter().map(|value| value.to_f64() / 2.0).collect();
            grads.push((param.regions().to_vec(), grad.shape().dims().to_vec(), values));
            param.zero_grad();
            assert!(param.grad().is_none());
        }
        Ok((y, dx, grads))
    })?;
    let mut ys = Vec::new();
    let mut dxs = Vec::new();
    let mut grads = Assembled::default();
    for (y, dx, params) in outcomes {
        ys.push(y);
        dxs.push(dx);
        for (regions, shape, values) in params {
            grads.add(&regions, &shape, &values);
        }
    }
    Ok(Outcome { y: Out::collect(ys), dx: In::Dual::collect(dxs), grads: grads.finish() })
}

fn wide<T: Element>(tensor: &Tensor<T, Dev>) -> Result<Array2<f64>> {
    let array = tensor.to_array()?.mapv(T::to_f64);
    Ok(array.into_dimensionality().unwrap())
}

/// The tensors of the model, assembled from the ranks' regions.
#[derive(Default)]
pub(crate) struct Assembled(BTreeMap<String, (ArrayD<f64>, ArrayD<u32>, ArrayD<u32>)>);

impl Assembled {
    pub(crate) fn add(&mut self, regions: &[ParamRegion], shape: &[usize], values: &[f64]) {
        let width: usize = shape[1..].iter().product();
        for rows in regions {
            let whole = rows.region.shape().dims().to_vec();
            let (sum, held, owned) = self.0.entry(rows.tensor.clone()).or_insert_with(|| {
                let zeros = ArrayD::zeros(IxDyn(&whole));
                (ArrayD::zeros(IxDyn(&whole)), zeros.clone(), zeros)
            });
            let extent = rows.region.extent();
            let start = rows.row * width;
            let own = values[start..start + extent.len()].to_vec();
            let own = ArrayD::from_shape_vec(IxDyn(extent.dims()), own).unwrap();
            let ranges = rows.region.ranges();
            let region = |axis: ndarray::AxisDescription| Slice::from(ranges[axis.axis.index()].clone());
            let mut at = sum.slice_each_axis_mut(region);
            let mut held = held.slice_each_axis_mut(region);
            // All ranks that hold an element have the same gradient for it.
            for ((sum, own), held) in at.iter_mut().zip(&own).zip(held.iter_mut()) {
                assert!(*held == 0 || sum.to_bits() == own.to_bits(), "holders of {} differ", rows.tensor);
                *sum = *own;
                *held += 1;
            }
            if rows.owned {
                owned.slice_each_axis_mut(region).iter_mut().for_each(|owned| *owned += 1);
            }
        }
    }

    pub(crate) fn finish(self) -> BTreeMap<String, ArrayD<f64>> {
        let tensors = self.0.into_iter().map(|(name, (sum, _, owned))| {
            assert!(
                owned.iter().all(|&owners| owners == 1),
                "an element of {name} is not owned by exactly one rank"
            );
            (name, sum)
        });
        tensors.collect()
    }
}

/// Returns arrays by name.
pub(crate) fn arrays<const N: usize>(tensors: [(&str, ArrayD<f64>); N]) -> Arrays {
    Arrays(tensors.into_iter().map(|(name, array)| (name.to_string(), array)).collect())
}

/// Asserts that every gradient equals the reference's up to a relative difference.
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
