//! The models and data of these tests.

use shardwise::{prelude::*, privacy::*, rng::Philox};
use std::collections::BTreeMap;

pub(crate) const FEATURES: usize = 5;
pub(crate) const HIDDEN: usize = 6;
pub(crate) const CLASSES: usize = 4;

/// Features → hidden → ReLU → classes. Logits are sharded by class.
pub(crate) fn classifier<T: Element>(
    tensor: &Group<Cpu>,
) -> Result<impl Layer<T, Cpu, In = Replicated, Out = Shard<1>> + use<T>> {
    let source = Random::normal(5, 0.7);
    let weights = Weights::new(&source);
    let (hidden, classes) = (Columns::even(tensor, HIDDEN)?, Columns::even(tensor, CLASSES)?);
    let up = ColumnParallelLinear::<Replicated, T, Cpu>::load(
        tensor,
        &weights.at("up"),
        FEATURES,
        &hidden,
        Bias::Add,
    )?;
    let head = ColumnParallelLinear::load(tensor, &weights.at("head"), HIDDEN, &classes, Bias::Add)?;
    Ok(up.then(Activate::new(Activation::Relu)).then(GatherFrom::<1>).then(head))
}

/// The features and the class of a sample.
pub(crate) fn sample(at: usize) -> (Vec<f64>, u32) {
    let stream = Philox::stream(9, at as u64);
    let x = (0..FEATURES as u64).map(|feature| 2.0 * stream.normal(feature)).collect();
    (x, (stream.uniform(99) * CLASSES as f64) as u32)
}

/// Runs a forward and a backward of samples, each of which is a row. `padding` rows follow.
pub(crate) fn backward<T: Element>(
    model: &impl Layer<T, Cpu, In = Replicated, Out = Shard<1>>,
    tensor: &Group<Cpu>,
    samples: &[usize],
    padding: usize,
) -> Result<()> {
    let mut rows: Vec<_> = samples.iter().map(|&at| sample(at)).collect();
    // What is in padding must not matter.
    rows.extend((0..padding).map(|at| sample(1000 + at)));
    let count = rows.len();
    let x: Vec<T> = rows.iter().flat_map(|(x, _)| x).map(|&x| T::from_f64(x)).collect();
    let targets: Vec<u32> = rows.iter().map(|(_, class)| *class).collect();
    let x = Tensor::from_vec(tensor.device(), [count, FEATURES], x)?;
    let x = DTensor::replicated(tensor, x)?.with_sequences(Sequences::packed(vec![1; count]))?;
    let loss = VocabParallelCrossEntropy::default();
    let (logits, saved) = model.forward(x)?;
    let (_, of_loss) = loss.forward(logits, &targets)?;
    model.backward(saved, loss.backward(of_loss, 1.0)?)?;
    Ok(())
}

/// Returns a ledger that no test exhausts, not even without noise.
pub(crate) fn ledger() -> Result<Ledger> {
    Ledger::new(Budget { epsilon: f64::INFINITY, delta: 1e-5 })
}

/// The gradients of whole tensors, by name.
pub(crate) type Gradients = BTreeMap<String, Vec<f64>>;

/// Returns the gradients of all tensors of which this rank holds elements. The elements that this
/// rank owns are at their places, others are 0.
pub(crate) fn owned_gradients<T: Element>(params: &[Param<T, Cpu>]) -> Result<Gradients> {
    let mut whole = Gradients::new();
    for param in params {
        let grad = param.grad().expect("a gradient").to_vec()?;
        let width = param.shape().dims()[1..].iter().product::<usize>();
        for own in param.regions().iter() {
            let len = own.region.shape().len();
            let values = whole.entry(own.tensor.clone()).or_insert_with(|| vec![0.0; len]);
            if own.owned {
                let elements = own.region.runs().into_iter().flatten();
                elements.zip(&grad[own.row * width..]).for_each(|(to, from)| values[to] = from.to_f64());
            }
        }
    }
    Ok(whole)
}

/// Returns the whole gradients of all tensors, in the order of their names.
pub(crate) fn gradients<T: Element>(tensor: &Group<Cpu>, params: &[Param<T, Cpu>]) -> Result<Vec<f64>> {
    let own: Vec<f64> = owned_gradients(params)?.into_values().flatten().collect();
    tensor.all_reduce_host(ReduceOp::Sum, &own)
}

/// The number of samples of [`MECHANISM`].
pub(crate) const SAMPLES: usize = 6;

/// Every sample is in every batch, so that the tests need no luck.
pub(crate) const MECHANISM: DpSgd =
    DpSgd { samples: SAMPLES, rate: 1.0, clip: 1.0, noise: 1.0, loss_scale: 1.0 };

/// Runs `f` with a private classifier on each rank of a mesh. Returns the message of its error on
/// the first rank that has one of its own.
#[track_caller]
pub(crate) fn refused(
    [dp, tp]: [usize; 2],
    f: impl Fn(&DeviceMesh<Cpu>, &[Param<f64, Cpu>], &dyn Fn(&[usize]) -> Result<()>) -> Result<()> + Sync,
) -> String {
    let threads = launch::Threads::new(dp * tp);
    let results = threads.run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, tp)?)?;
        let tensor = mesh.group(Axis::Tensor);
        let model = classifier::<f64>(tensor)?;
        let params = model.params();
        f(&mesh, &params, &|samples| backward(&model, tensor, samples, 0))
    });
    let errors: Vec<_> = results.expect("the ranks start").into_iter().filter_map(Result::err).collect();
    let own = |error: &&Error| !matches!(error, Error::PeerLost { .. });
    errors.iter().find(own).expect("no rank has an error of its own").to_string()
}

pub(crate) fn private(mesh: &DeviceMesh<Cpu>, params: &[Param<f64, Cpu>]) -> Result<Private<f64, Cpu>> {
    Private::new(mesh, [params.to_vec()], MECHANISM, RunKey::agree(mesh.world())?, ledger()?)
}

pub(crate) const ALL: [usize; SAMPLES] = [0, 1, 2, 3, 4, 5];
