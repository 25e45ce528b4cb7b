//! Pipeline parallelism: trains the network 10 → 5 → ReLU → 1, whose layers are on different ranks.
//! The losses equal those of one device up to rounding.
//!
//! `cargo run --release --bin pipeline_parallel [-- --ranks 3] [--schedule gpipe]`

use clap::{Parser, ValueEnum};
use shardwise::{
    Error, Result, Tensor,
    comm::Group,
    device::Cpu,
    kernels::Activation,
    launch, ops,
    optim::Sgd,
    parallel::{Activate, Bias, BoxLayer, ColumnParallelLinear, Columns, DTensor, GatherFrom, Layer},
    reference::worst,
    rng::Philox,
    shard::{Partition, Replicated},
    tensor::{Random, Weights},
    train::{Microbatch, Pipeline, PipelineEnds, Schedule},
};

const SAMPLES: usize = 64;
const STEPS: u64 = 50;

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    /// All forwards, then all backwards.
    Gpipe,
    /// Alternating forwards and backwards.
    OneForwardOneBackward,
}

/// Trains a pipeline of three layers.
#[derive(Parser)]
struct Args {
    /// The number of stages, 1 to 3.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// The number of microbatches per step.
    #[arg(long, default_value_t = 4)]
    microbatches: usize,
    /// The order of forwards and backwards.
    #[arg(long, value_enum, default_value_t = Order::OneForwardOneBackward)]
    schedule: Order,
}

type Stage = Vec<BoxLayer<Replicated, Replicated, f64>>;

/// Builds the layers of one stage.
fn stage(layers: std::ops::Range<usize>, group: &Group<Cpu>) -> Result<Stage> {
    let source = Random::normal(3, 0.5);
    let weights = Weights::new(&source);
    let linear = |name: &str, inputs, outputs| {
        let columns = Columns::even(group, outputs)?;
        let linear = ColumnParallelLinear::<Replicated, f64, Cpu>::load(
            group,
            &weights.at(name),
            inputs,
            &columns,
            Bias::Add,
        )?;
        Ok::<_, Error>(BoxLayer::new(Layer::<f64, Cpu>::then(linear, GatherFrom::<1>)))
    };
    layers
        .map(|layer| match layer {
            0 => linear("first", 10, 5),
            1 => Ok(BoxLayer::new(Activate::<Replicated>::new(Activation::Relu))),
            _ => linear("second", 5, 1),
        })
        .collect()
}

/// The pipeline's ends: they supply the samples of the first stage and compute the loss of the last
/// stage.
struct Data {
    group: Group<Cpu>,
    partition: Partition,
    loss: f64,
}

impl Data {
    /// Returns the features or the targets of a microbatch, one row per sample.
    fn rows(
        &self,
        microbatch: usize,
        columns: usize,
        f: impl Fn(&Philox, u64) -> f64,
    ) -> Result<Tensor<f64>> {
        let rows = self.partition.range(microbatch);
        let values: Vec<f64> = rows
            .clone()
            .flat_map(|row| (0..columns as u64).map(move |column| (row as u64, column)))
            .map(|(row, column)| f(&Philox::stream(5, row), column))
            .collect();
        Tensor::from_slice(self.group.device(), [rows.len(), columns], &values)
    }
}

impl PipelineEnds<Replicated, f64, Cpu> for Data {
    fn input(&mut self, microbatch: usize, _: &Microbatch) -> Result<DTensor<Replicated, f64>> {
        DTensor::replicated(&self.group, self.rows(microbatch, 10, |stream, column| stream.normal(column))?)
    }

    fn input_grad(&mut self, _: usize, _: DTensor<Replicated, f64>) -> Result<()> {
        Ok(())
    }

    fn loss(
        &mut self,
        microbatch: usize,
        y: DTensor<Replicated, f64>,
    ) -> Result<Option<DTensor<Replicated, f64>>> {
        let target = self.rows(microbatch, 1, |stream, _| (stream.normal(0) * stream.normal(1)).tanh())?;
        self.loss += ops::squared_error(y.local(), &target)? / SAMPLES as f64;
        let dy = ops::squared_error_backward(y.local(), &target, 1.0 / SAMPLES as f64)?;
        DTensor::replicated(&self.group, dy).map(Some)
    }
}

/// Trains on `ranks` stages. Returns the loss of each step.
fn train(ranks: usize, microbatches: usize, order: Order) -> Result<Vec<f64>> {
    let all = launch::threads(ranks, |world| {
        // Each stage runs on one device, so its operators are not sharded.
        let alone = Group::solo(world.device());
        let layers = Partition::balanced("pipeline", "layers", &[50.0, 5.0, 5.0], ranks)?;
        let model = [stage(layers.range(world.rank()), &alone)?];
        let schedule = match order {
            Order::Gpipe => Schedule::gpipe(ranks, microbatches),
            Order::OneForwardOneBackward => Schedule::one_forward_one_backward(ranks, microbatches),
        };
        // The input width of each stage.
        let widths = (0..ranks).map(|stage| [10, 5, 5][layers.range(stage).start]).collect();
        let pipeline = Pipeline::with_widths(&world, &alone, schedule, widths)?;
        let partition = Partition::even(SAMPLES, microbatches);
        let described: Vec<_> = partition.sizes().map(Microbatch::rows).collect();
        let (mut sgd, mut curve) = (Sgd::default(), Vec::new());
        for _ in 0..STEPS {
            for param in model[0].params() {
                param.zero_grad();
            }
            let mut data = Data { group: alone.clone(), partition: partition.clone(), loss: 0.0 };
            pipeline.run(&model, &described, &mut data)?;
            sgd.step(&model[0].params(), 0.1, 1.0)?;
            curve.push(data.loss);
        }
        Ok(curve)
    })?;
    // Only the last stage has the loss.
    Ok(all.into_iter().next_back().unwrap_or_default())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (one, many) = (train(1, 1, args.schedule)?, train(args.ranks, args.microbatches, args.schedule)?);
    println!("{:>6} {:>22} {:>22}", "step", "loss on one device", format!("in {} stages", args.ranks));
    for step in (0..STEPS as usize).step_by(7) {
        println!("{step:>6} {:>22.16} {:>22.16}", one[step], many[step]);
    }
    let difference = worst(&many, &one);
    println!("largest difference of a loss over {STEPS} steps: {difference:.1e}");
    if difference > 1e-12 {
        return Err(Error::Invalid { op: "pipeline_parallel", reason: "the losses differ".into() });
    }
    Ok(())
}
