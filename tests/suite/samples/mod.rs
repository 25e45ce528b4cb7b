//! Norms and clipped sums of the gradients of samples, compared with runs of one sample at a time.

mod bits;
mod edges;
mod layers;
mod models;
mod traffic;

use crate::{
    dev::{DTensor, Dev, Tensor, ranks},
    support::{Assembled, Spread, matrix},
};
use ndarray::{Array2, ArrayD, s};
use shardwise::{
    Result,
    comm::Group,
    device::Element,
    optim::sample_norms,
    parallel::{BoxLayer, Layer},
    rng::Philox,
    shard::{Placement, Reduction, Sequences},
    tensor::{Param, ParamRegion},
};
use std::collections::BTreeMap;

const EXACT: f64 = 1e-12;

/// A microbatch. A model reads the inputs that it needs.
#[derive(Clone)]
struct Batch {
    sequences: Sequences,
    ids: Vec<u32>,
    targets: Vec<u32>,
    x: Array2<f64>,
    /// The gradient of the output.
    dy: Array2<f64>,
}

impl Batch {
    /// Random tokens of a vocabulary, and features. The first token repeats within a sequence and
    /// in every sequence.
    fn random(sequences: &Sequences, vocabulary: usize, [inputs, outputs]: [usize; 2]) -> Self {
        let (rows, stream) = (sequences.rows(), Philox::stream(3, 1));
        let token = |at: usize| (stream.uniform(at as u64) * vocabulary as f64) as u32;
        let mut ids: Vec<u32> = (0..rows).map(token).collect();
        for sequence in sequences.iter() {
            ids[sequence].iter_mut().step_by(2).for_each(|id| *id = 1);
        }
        let mut dy = matrix(3, "dy", rows, outputs);
        // Norms of different sizes, so that some samples are clipped and some are not.
        for (at, sequence) in sequences.iter().enumerate() {
            dy.slice_mut(s![sequence, ..]).mapv_inplace(|dy| dy * (1.0 + (at * 2 % 5) as f64));
        }
        let targets = (rows..2 * rows).map(token).collect();
        Self { sequences: sequences.clone(), ids, targets, x: matrix(3, "x", rows, inputs), dy }
    }

    /// A microbatch of one of the samples.
    fn sample(&self, sample: usize) -> Self {
        let rows = self.sequences.iter().nth(sample).unwrap();
        let one = Sequences::one(rows.len());
        Self {
            sequences: match self.sequences.valid() {
                Some(valid) => one.masked(&valid[rows.clone()]).unwrap(),
                None => one,
            },
            ids: self.ids[rows.clone()].to_vec(),
            targets: self.targets[rows.clone()].to_vec(),
            x: self.x.slice(s![rows.clone(), ..]).to_owned(),
            dy: self.dy.slice(s![rows, ..]).to_owned(),
        }
    }

    fn samples(&self) -> usize {
        self.sequences.len()
    }
}

/// A model on a rank.
trait Model<T: Element> {
    /// Returns each parameter once.
    fn params(&self) -> Vec<Param<T, Dev>>;

    /// Runs the forward and the backward.
    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()>;
}

type BoxModel<T> = Box<dyn Model<T>>;

/// Loads a model on a rank.
type Load<'a, T> = &'a (dyn Fn(&Group<Dev>) -> Result<BoxModel<T>> + Sync);

/// A layer whose output has the gradient `dy`.
struct OfLayer<In: Placement, Out: Placement, T: Element>(BoxLayer<In, Out, T, Dev>);

impl<In, Out, T> Model<T> for OfLayer<In, Out, T>
where
    In: Spread<Dual: Spread>,
    Out: Spread<Dual: Spread>,
    T: Element,
{
    fn params(&self) -> Vec<Param<T, Dev>> {
        self.0.params()
    }

    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()> {
        let x = In::spread::<T, Dev>(group, &batch.x, None)?.with_sequences(batch.sequences.clone())?;
        let (_, saved) = self.0.forward(x)?;
        let dy = <Out as Placement>::Dual::spread::<T, Dev>(group, &batch.dy, None)?;
        self.0.backward(saved, dy.with_sequences(batch.sequences.clone())?)?;
        Ok(())
    }
}

/// Makes a model of a layer.
fn of_layer<T, L>(layer: L) -> BoxModel<T>
where
    T: Element,
    L: Layer<T, Dev, In: Spread<Dual: Spread>, Out: Spread<Dual: Spread>, Saved: 'static> + 'static,
{
    Box::new(OfLayer(BoxLayer::new(layer)))
}

/// The regions, the shape and the values of a parameter's gradient on a rank.
type Grad = (Vec<ParamRegion>, Vec<usize>, Vec<f64>);

/// Removes the gradients of the parameters. One that was not computed is 0.
fn take_grads<T: Element>(params: &[Param<T, Dev>]) -> Result<Vec<Grad>> {
    let mut grads = Vec::new();
    for param in params {
        let values: Vec<f64> = match param.grad() {
            Some(grad) => grad.to_vec()?.into_iter().map(Element::to_f64).collect(),
            None => vec![0.0; param.shape().len()],
        };
        param.zero_grad();
        grads.push((param.regions().to_vec(), param.shape().dims().to_vec(), values));
    }
    Ok(grads)
}

/// The gradients of the model's tensors, by name.
type Grads = BTreeMap<String, ArrayD<f64>>;

fn assembled(ranks: impl IntoIterator<Item = Vec<Grad>>) -> Grads {
    let mut whole = Assembled::default();
    for (regions, shape, values) in ranks.into_iter().flatten() {
        whole.add(&regions, &shape, &values);
    }
    whole.finish()
}

/// The whole gradient of each sample, and its norm over all tensors.
struct Each {
    grads: Vec<Grads>,
    norms: Vec<f64>,
}

impl Each {
    /// Runs the model on one rank, one sample at a time, without kept terms.
    fn run<T: Element>(load: Load<'_, T>, batch: &Batch) -> Self {
        let grads = ranks(1).run(|group| {
            let model = load(&group)?;
            let mut grads = Vec::new();
            for sample in 0..batch.samples() {
                // The gradient of a sample without rows is 0.
                let batch = batch.sample(sample);
                if batch.sequences.rows() > 0 {
                    model.pass(&group, &batch)?;
                }
                grads.push(take_grads(&model.params())?);
            }
            Ok(grads)
        });
        let grads: Vec<_> = grads.unwrap().remove(0).into_iter().map(|grads| assembled([grads])).collect();
        let norm = |grads: &Grads| grads.values().flatten().map(|grad| grad * grad).sum::<f64>().sqrt();
        Self { norms: grads.iter().map(norm).collect(), grads }
    }

    /// Returns Σ cᵢ gᵢ.
    fn sum(&self, factors: &[f64]) -> Grads {
        assert_eq!(self.grads.len(), factors.len());
        let mut sum: Grads =
            self.grads[0].iter().map(|(name, grad)| (name.clone(), ArrayD::zeros(grad.shape()))).collect();
        for (grads, factor) in self.grads.iter().zip(factors) {
            sum.iter_mut().for_each(|(name, sum)| *sum += &(&grads[name] * *factor));
        }
        sum
    }

    /// Returns a bound above which about half of the norms are.
    fn median(&self) -> f64 {
        let mut norms = self.norms.clone();
        norms.sort_by(f64::total_cmp);
        let middle = norms.len() / 2;
        (norms[middle - 1] + norms[middle]) / 2.0
    }
}

/// Returns min(1, C / n).
fn clipped(norms: &[f64], bound: f64) -> Vec<f64> {
    norms.iter().map(|norm| (bound / norm).min(1.0)).collect()
}

/// The norms that every rank computes, and the clipped sum.
#[derive(Clone)]
struct Together {
    norms: Vec<f64>,
    sum: Grads,
}

/// Runs all samples in one microbatch with kept terms. `factors` makes the factors from the norms.
fn together<T: Element>(
    load: Load<'_, T>,
    batch: &Batch,
    (world, reduction): (usize, Reduction),
    factors: &(dyn Fn(&[f64]) -> Vec<f64> + Sync),
) -> Together {
    let outcomes = ranks(world).run(|world| {
        let group = world.with_reduction(reduction);
        let model = load(&group)?;
        let params = model.params();
        let norms = step(&*model, &group, batch, factors)?;
        Ok((norms, take_grads(&params)?))
    });
    let outcomes = outcomes.unwrap_or_else(|error| panic!("{world} ranks: {error}"));
    let norms = outcomes[0].0.clone();
    for (other, _) in &outcomes {
        assert_eq!(bits(other), bits(&norms), "every rank has the same norms");
    }
    Together { norms, sum: assembled(outcomes.into_iter().map(|(_, grads)| grads)) }
}

/// Runs a backward with kept terms, and adds them with the factors that `factors` makes of the
/// norms. Returns the norms.
fn step<T: Element>(
    model: &dyn Model<T>,
    group: &Group<Dev>,
    batch: &Batch,
    factors: &dyn Fn(&[f64]) -> Vec<f64>,
) -> Result<Vec<f64>> {
    let params = model.params();
    params.iter().for_each(|param| param.keep_terms(true));
    model.pass(group, batch)?;
    for param in params.iter().filter(|param| !param.is_quantized()) {
        assert!(param.kept() > 0, "{} keeps no term", param.name());
    }
    let norms = sample_norms(&params, &[group], batch.samples())?;
    let factors = factors(&norms);
    params.iter().try_for_each(|param| param.add_kept(&factors))?;
    assert!(params.iter().all(|param| param.kept() == 0), "terms are added once");
    Ok(norms)
}

fn bits<'a>(values: impl IntoIterator<Item = &'a f64>) -> Vec<u64> {
    values.into_iter().map(|value| value.to_bits()).collect()
}

/// Asserts that each norm equals the expected one up to a relative difference.
#[track_caller]
fn norms_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: the number of norms");
    for (sample, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * want, "{what}: the norm of sample {sample}: {got} {want}");
    }
}

/// Asserts that sums are equal up to a difference relative to their largest number. A tensor's own
/// largest number is no measure, because the gradient of a key's bias is rounding error.
#[track_caller]
fn sums_close(what: &str, got: &Grads, want: &Grads, tolerance: f64) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    let largest = want.values().flatten().fold(0.0, |largest: f64, want| largest.max(want.abs()));
    assert!(largest > 0.0, "{what}: the expected sum is 0");
    for (name, want) in want {
        assert_eq!(got[name].shape(), want.shape(), "{what}: {name}");
        for (got, want) in got[name].iter().zip(want) {
            assert!((got - want).abs() <= tolerance * largest, "{what}: {name}: {got} {want}");
        }
    }
}

/// Compares all samples in one microbatch on several ranks with one sample at a time on one rank.
/// Returns the number of comparisons.
fn brute_force(what: &str, load: Load<'_, f64>, batch: &Batch, worlds: &[usize]) -> usize {
    let each = Each::run(load, batch);
    let bound = each.median();
    let over = each.norms.iter().filter(|norm| **norm > bound).count();
    assert!(over > 0 && over < batch.samples(), "{what}: {over} samples of {:?} are clipped", each.norms);
    let want = each.sum(&clipped(&each.norms, bound));
    for &world in worlds {
        let what = format!("{what}, {:?}, {world} ranks", batch.sequences);
        let got = together(load, batch, (world, Reduction::Fast), &|norms| clipped(norms, bound));
        norms_close(&what, &got.norms, &each.norms, EXACT);
        sums_close(&what, &got.sum, &want, EXACT);
    }
    worlds.len()
}

/// Samples of equal and of different lengths, of one token, padded, and one without tokens.
fn shapes() -> Vec<Sequences> {
    vec![
        Sequences::packed([4, 4, 4]),
        Sequences::packed([3, 1, 5, 2]),
        Sequences::padded(&[2, 5, 3, 1], 5).unwrap(),
        Sequences::packed([1; 6]),
        Sequences::packed([1, 1, 4, 1, 1, 1, 3]),
        Sequences::packed([3, 0, 2, 4]),
    ]
}

/// Makes the tensor of a matrix.
fn tensor<T: Element>(group: &Group<Dev>, array: &Array2<f64>) -> Result<Tensor<T>> {
    Tensor::from_array(group.device(), &array.mapv(T::from_f64))
}

/// Makes a replicated tensor with the samples of a microbatch.
fn replicated<T: Element>(
    group: &Group<Dev>,
    array: &Array2<f64>,
    sequences: &Sequences,
) -> Result<DTensor<shardwise::shard::Replicated, T>> {
    DTensor::replicated(group, tensor(group, array)?)?.with_sequences(sequences.clone())
}
