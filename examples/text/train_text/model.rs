//! A small GPT on a mesh: the crate's decoder, split into pipeline stages, with data parallelism.

use shardwise::{
    Error, Result,
    comm::{DeviceMesh, ReduceOp},
    device::{Cpu, Element},
    kernels::{Activation, AttentionChoices, Backend, NormKind},
    models::{Decoder, DecoderConfig, DecoderEnds, Tokens},
    optim::grad_norm,
    parallel::{AttentionConfig, BlockConfig, DropoutState, ResidualStream, VocabParallelCrossEntropy},
    shard::{Axis, Sequences, blocks},
    tensor::{Param, WeightSource},
    train::{DataParallel, GradReduce, Microbatch, Pipeline, Schedule},
};

/// The sizes of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) vocabulary: usize,
    pub(crate) context: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) ffn: usize,
    pub(crate) layers: usize,
    pub(crate) dropout: f64,
    /// The number of leading blocks that keep only their input and recompute their forward in the
    /// backward.
    pub(crate) recomputed: usize,
}

impl Config {
    /// Returns the configuration of a GPT-2 of these sizes. Its parameter names are not GPT-2's.
    pub(crate) fn decoder(&self) -> DecoderConfig {
        let &Self { vocabulary, context, hidden, heads, ffn, layers, dropout, recomputed } = self;
        let block = BlockConfig::new(
            AttentionConfig::new(hidden, heads)
                .with_choices(AttentionChoices::CAUSAL)
                .with_qkv_bias(true)
                .with_out_bias(true),
            ffn,
            Activation::GeluTanh,
            NormKind::LayerNorm { eps: 1e-5 },
        )
        .with_mlp_bias(true);
        let mut config = DecoderConfig::new(vocabulary, block, layers);
        config.dropout = dropout;
        config.recomputed = recomputed;
        config.positions = Some(context);
        config.context = Some(context);
        config
    }
}

/// This rank's shard of the model, with its pipeline.
pub(crate) struct Gpt<S: ResidualStream, T: Element, B: Backend = Cpu> {
    mesh: DeviceMesh<B>,
    model: Decoder<S, T, B>,
    pipeline: Pipeline<B>,
    replicas: DataParallel<T, B>,
}

/// Tokens and their next tokens. All sequences have `length` tokens, and are stored one after the
/// other.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) length: usize,
}

impl<S: ResidualStream, T: Element, B: Backend> Gpt<S, T, B> {
    /// Reads or initializes this rank's shard of the weights.
    pub(crate) fn load(
        mesh: &DeviceMesh<B>,
        source: &dyn WeightSource,
        config: &Config,
        schedule: Schedule,
    ) -> Result<Self> {
        let (tensor, stages) = (mesh.group(Axis::Tensor), mesh.group(Axis::Pipeline));
        let model = Decoder::load_stages(tensor, source, &config.decoder(), &schedule, stages.rank())?;
        let params = model.params();
        params.iter().for_each(|param| param.set_microbatches(schedule.microbatches()));
        let pipeline = Pipeline::new(stages, tensor, schedule, config.hidden)?;
        let replicas = DataParallel::new(mesh.group(Axis::Data), &params)?;
        Ok(Self { mesh: mesh.clone(), model, pipeline, replicas })
    }

    pub(crate) fn params(&self) -> Vec<Param<T, B>> {
        self.model.params()
    }

    /// Replaces the parameters' gradients by those of `scale` times the mean loss over the whole
    /// batch. Returns the loss and the gradient norm, the same on every rank. Every rank passes the
    /// same batch.
    pub(crate) fn gradients(&self, batch: &Batch, step: u64, scale: f64) -> Result<(f64, f64)> {
        let params = self.params();
        params.iter().for_each(Param::zero_grad);
        self.replicas.begin(GradReduce::Sum)?;
        let loss = self.pass(batch, Some((step, scale)))?;
        self.replicas.finish()?;
        if let Some(table) = self.model.tied() {
            self.pipeline.sum_tied(&table)?;
        }
        let groups = [self.mesh.group(Axis::Tensor), self.mesh.group(Axis::Pipeline)];
        Ok((loss, grad_norm(&params, &groups)?))
    }

    /// Returns the mean loss over a batch, without dropout.
    pub(crate) fn loss(&self, batch: &Batch) -> Result<f64> {
        self.pass(batch, None)
    }

    /// Returns the mean loss over a batch. If `train` gives a step and a scale of the gradient, the
    /// backward runs as well.
    fn pass(&self, batch: &Batch, train: Option<(u64, f64)>) -> Result<f64> {
        let dp = self.mesh.group(Axis::Data);
        // Each replica has a contiguous range of the microbatches of all replicas. How the batch is
        // divided into microbatches depends only on their total number.
        let (count, length) = (self.pipeline.schedule().microbatches(), batch.length);
        let all = blocks(batch.tokens.len() / length.max(1), 1, count * dp.size());
        let (mut described, mut tokens) = (Vec::new(), Vec::new());
        for part in dp.rank() * count..(dp.rank() + 1) * count {
            let range = all.range(part);
            let sequences = Sequences::packed(range.clone().map(|_| length));
            let (row, sequence) = ((range.start * length) as u64, range.start as u64);
            let dropout = train.map(|(step, _)| DropoutState { step, row, sequence });
            described.push(Microbatch { sequences, dropout });
            let rows = range.start * length..range.end * length;
            tokens.push(Tokens { ids: &batch.tokens[rows.clone()], targets: &batch.targets[rows] });
        }
        let part = 1.0 / batch.tokens.len().max(1) as f64;
        let counts: Vec<f64> = tokens.iter().map(|tokens| tokens.ids.len() as f64).collect();
        let (loss, scale) = (VocabParallelCrossEntropy::default(), train.map(|(_, scale)| scale * part));
        let mut ends = DecoderEnds::new(&self.model, tokens, loss, scale);
        match train {
            Some(_) => self.pipeline.run(self.model.chunks(), &described, &mut ends)?,
            None => self.pipeline.evaluate(self.model.chunks(), &described, &mut ends)?,
        }
        // The last stage of each replica has the replica's partial sum. The check of the tokens'
        // number below fails if the replicas have different batches.
        let losses: Vec<f64> = ends.losses().iter().map(|loss| loss * part).collect();
        let own = [self.replicas.sum(&losses)?, self.replicas.sum(&counts)?];
        let own = if self.pipeline.is_last() { own } else { [0.0; 2] };
        let sum = self.mesh.group(Axis::Pipeline).all_reduce_host(ReduceOp::Sum, &own)?;
        let tokens = batch.tokens.len();
        if sum[1] != tokens as f64 {
            let reason =
                format!("the replicas had {} tokens together, but this rank's batch has {tokens}", sum[1]);
            return Err(Error::Invalid { op: "gpt", reason });
        }
        Ok(sum[0])
    }
}
