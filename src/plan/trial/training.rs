//! Timed training steps.

use super::{random_tokens, seconds};
use crate::{
    comm::{DeviceMesh, Group},
    device::Element,
    error::Result,
    kernels::Backend,
    models::{Decoder, DecoderConfig, DecoderEnds, Tokens},
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{DropoutState, ResidualStream, VocabParallelCrossEntropy},
    plan::Strategy,
    shard::{Axis, Sequences},
    tensor::{Param, Random},
    train::{DataParallel, GradReduce, Microbatch, Pipeline},
};

/// So small that weights and gradients stay finite in any number of steps.
const RATE: f64 = 1e-6;

/// Trains one step and `steps` more, of sequences of `tokens` tokens. Returns the seconds of each.
pub(super) fn run<S: ResidualStream, T: Element, B: Backend>(
    world: &Group<B>,
    model: &DecoderConfig,
    strategy: &Strategy,
    tokens: usize,
    steps: usize,
) -> Result<Vec<f64>> {
    let mesh = DeviceMesh::new(world, strategy.mesh()?)?;
    let [replicas, stages, tensor] = [Axis::Data, Axis::Pipeline, Axis::Tensor].map(|axis| mesh.group(axis));
    let (schedule, source) = (strategy.schedule()?, Random::normal(1, 0.02));
    let mut config = model.clone();
    config.recomputed = strategy.recomputed;
    let model = Decoder::<S, T, B>::load_stages(tensor, &source, &config, &schedule, stages.rank())?;
    let params = model.params();
    params.iter().for_each(|param| param.set_microbatches(schedule.microbatches()));
    let pipeline = Pipeline::new(stages, tensor, schedule, config.hidden())?;
    let parallel = DataParallel::new(replicas, &params)?;

    let &Strategy { microbatches: count, sequences, .. } = strategy;
    let rows = sequences * tokens;
    let ids = random_tokens(&config, replicas.rank(), count * rows + 1);
    let of_microbatch = |number: usize| {
        let start = number * rows;
        Tokens { ids: &ids[start..start + rows], targets: &ids[start + 1..start + 1 + rows] }
    };
    let batch: Vec<_> = (0..count).map(of_microbatch).collect();
    let describe = |number: usize| {
        let sequence = ((replicas.rank() * count + number) * sequences) as u64;
        let dropout = DropoutState { step: 0, row: sequence * tokens as u64, sequence };
        let dropout = (config.dropout > 0.0).then_some(dropout);
        Microbatch { sequences: Sequences::packed(vec![tokens; sequences]), dropout }
    };
    let microbatches: Vec<_> = (0..count).map(describe).collect();

    let mut adamw = AdamW::default();
    let mut step = || {
        params.iter().for_each(Param::zero_grad);
        parallel.begin(GradReduce::Sum)?;
        let loss = VocabParallelCrossEntropy::default();
        let mut ends = DecoderEnds::new(&model, batch.clone(), loss, Some(1.0));
        pipeline.run(model.chunks(), &microbatches, &mut ends)?;
        parallel.finish()?;
        if let Some(table) = model.tied() {
            pipeline.sum_tied(&table)?;
        }
        let norm = grad_norm(&params, &[tensor, stages])?;
        adamw.step(&params, RATE, clip_scale(norm, 1.0)?)
    };
    (0..=steps).map(|_| seconds(world, &mut step)).collect()
}
