//! A small GPT on a mesh: tied embeddings at the two ends of a pipeline of transformer blocks.

use shardwise::{
    Error, Result, Tensor,
    comm::DeviceMesh,
    device::{Cpu, Element},
    kernels::{Activation, Backend, NormKind},
    optim::grad_norm,
    parallel::{
        AttentionConfig, Bias, BlockConfig, BlockNames, BoxLayer, ColumnParallelLinear, Columns, DTensor,
        Draw, Dropout, Layer, NormPlacement, Normalize, PositionEmbedding, Recompute, Stream,
        TransformerBlock, VocabParallelCrossEntropy, VocabParallelEmbedding,
    },
    shard::{Axis, Partition, Sequences, Shard, blocks},
    tensor::{Param, Weights},
    train::{DataParallel, Ends, GradReduce, Microbatch, Pipeline, Schedule},
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
    /// Whether blocks keep their input only, and compute their forward anew in the backward.
    pub(crate) recompute: bool,
}

type Block<S, T, B> = BoxLayer<S, S, T, B>;

/// This rank's part of the model, and what runs it.
pub(crate) struct Gpt<S: Stream, T: Element, B: Backend = Cpu> {
    mesh: DeviceMesh<B>,
    head_and_tail: HeadAndTail<S, T, B>,
    chunks: Vec<Vec<Block<S, T, B>>>,
    pipeline: Pipeline<B>,
    replicas: DataParallel<T, B>,
}

/// The layers before the first block and behind the last, where this rank has them.
struct HeadAndTail<S: Stream, T: Element, B: Backend> {
    table: Option<VocabParallelEmbedding<S, T, B>>,
    /// It shares the table where this rank has one. Elsewhere it has a copy, which does not count.
    head: Option<ColumnParallelLinear<S, T, B>>,
    positions: Option<PositionEmbedding<S, T, B>>,
    dropout: Dropout<S>,
    norm: Option<Normalize<S, T, B>>,
}

/// Tokens and the tokens that follow them: sequences of one length, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) length: usize,
}

impl Batch {
    /// Some of the sequences.
    fn sequences(&self, range: std::ops::Range<usize>) -> Self {
        let tokens = range.start * self.length..range.end * self.length;
        Self {
            tokens: self.tokens[tokens.clone()].to_vec(),
            targets: self.targets[tokens].to_vec(),
            length: self.length,
        }
    }

    fn count(&self) -> usize {
        self.tokens.len() / self.length.max(1)
    }
}

impl<S: Stream, T: Element, B: Backend> Gpt<S, T, B> {
    /// Reads or draws this rank's part of the weights.
    pub(crate) fn load(
        mesh: &DeviceMesh<B>,
        weights: &Weights<'_>,
        config: &Config,
        schedule: Schedule,
    ) -> Result<Self> {
        let (tp, pp) = (mesh.group(Axis::Tensor), mesh.group(Axis::Pipeline));
        let (first, last) = (pp.rank() == 0, pp.rank() + 1 == pp.size());
        let Config { vocabulary, context, hidden, heads, ffn, layers, dropout, .. } = *config;
        let norm = NormKind::LayerNorm { eps: 1e-5 };
        let block = BlockConfig {
            attention: AttentionConfig {
                causal: true,
                qkv_bias: true,
                out_bias: true,
                ..AttentionConfig::new(hidden, heads)
            },
            ffn,
            activation: Activation::GeluTanh,
            mlp_bias: true,
            norm,
            placement: NormPlacement::Pre,
            names: BlockNames::default(),
        };
        let cut = Partition::by_unit("pipeline", "layers", layers, 1, schedule.stages())?;
        let chunk = |chunk: usize| {
            let layers = cut.range(chunk * pp.size() + pp.rank());
            let load = |layer: usize| {
                let weights = weights.at(&format!("layers.{layer}"));
                let block = TransformerBlock::<S, T, B>::load(tp, &weights, &block)?;
                Ok(if config.recompute { BoxLayer::new(Recompute(block)) } else { BoxLayer::new(block) })
            };
            layers.map(load).collect::<Result<Vec<_>>>()
        };
        let chunks = (0..schedule.chunks()).map(chunk).collect::<Result<Vec<_>>>()?;
        let microbatches = schedule.microbatches();
        let pipeline = Pipeline::new(pp, tp, schedule, &chunks, hidden)?;
        let mut head_and_tail = HeadAndTail {
            table: None,
            head: None,
            positions: None,
            dropout: Dropout::new(dropout, 0, "embedding"),
            norm: None,
        };
        if first {
            let table = VocabParallelEmbedding::load(tp, &weights.at("embedding"), vocabulary, hidden)?;
            head_and_tail.table = Some(table);
            let positions = PositionEmbedding::load(tp, &weights.at("positions"), context, hidden)?;
            head_and_tail.positions = Some(positions);
        }
        if last {
            let head = match &head_and_tail.table {
                Some(table) => table.tied_head(),
                None => {
                    let (weights, columns) = (weights.at("embedding"), Columns::even(tp, vocabulary)?);
                    let head =
                        ColumnParallelLinear::<S, T, B>::load(tp, &weights, hidden, &columns, Bias::None)?;
                    head.weight().disown();
                    head
                }
            };
            head_and_tail.head = Some(head);
            head_and_tail.norm = Some(Normalize::load(tp, &weights.at("norm"), norm, hidden)?);
        }
        let params = params(&head_and_tail, &chunks);
        for param in &params {
            param.set_microbatches(microbatches);
        }
        let replicas = DataParallel::new(mesh.group(Axis::Data), &params)?;
        Ok(Self { mesh: mesh.clone(), head_and_tail, chunks, pipeline, replicas })
    }

    pub(crate) fn params(&self) -> Vec<Param<T, B>> {
        params(&self.head_and_tail, &self.chunks)
    }

    /// Leaves the gradient of `scale` times the mean loss over the whole batch in the parameters, and returns the loss and
    /// the norm of what was left, the same on every rank. Every rank is given the same batch.
    pub(crate) fn gradients(&self, batch: &Batch, step: u64, scale: f64) -> Result<(f64, f64)> {
        let params = self.params();
        for param in &params {
            param.zero_grad();
        }
        self.replicas.begin(GradReduce::Sum)?;
        let loss = self.pass(batch, Some(step), Some(scale))?;
        self.replicas.finish()?;
        if let Some(table) = self.head_and_tail.tied() {
            self.pipeline.sum_tied(&table)?;
        }
        let groups = [self.mesh.group(Axis::Tensor).clone(), self.mesh.group(Axis::Pipeline).clone()];
        let norm = grad_norm(&params, &groups.each_ref())?;
        Ok((loss, norm))
    }

    /// The mean loss over a batch, without dropout.
    pub(crate) fn loss(&self, batch: &Batch) -> Result<f64> {
        self.pass(batch, None, None)
    }

    /// The logits of the token behind the last one, on a mesh of one rank.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let described = [Microbatch { sequences: Sequences::one(tokens.len()), draw: None }];
        let batch = Batch { tokens: tokens.to_vec(), targets: Vec::new(), length: tokens.len() };
        let mut ends = Pass::new(&self.head_and_tail, &described, vec![batch], 1.0, None);
        self.pipeline.evaluate(&self.chunks, &described, &mut ends)?;
        let logits = ends.logits.take().ok_or_else(|| invalid("the last stage is elsewhere"))?;
        let all = logits.into_local().to_vec()?;
        let last =
            all.len() - self.head_and_tail.table.as_ref().map_or(0, VocabParallelEmbedding::vocabulary);
        Ok(all[last..].iter().map(|x| x.to_f64() as f32).collect())
    }

    fn pass(&self, batch: &Batch, step: Option<u64>, train: Option<f64>) -> Result<f64> {
        let dp = self.mesh.group(Axis::Data);
        // The microbatches of all replicas, of which each has a run: the same for as many in all.
        let count = self.pipeline.schedule().microbatches();
        let all = blocks(batch.count(), 1, count * dp.size());
        let draw = |start: usize| step.map(|step| Draw { step, row: (start * batch.length) as u64 });
        let (mut described, mut microbatches) = (Vec::new(), Vec::new());
        for part in dp.rank() * count..(dp.rank() + 1) * count {
            let range = all.range(part);
            let sequences = Sequences::packed(range.clone().map(|_| batch.length));
            described.push(Microbatch { sequences, draw: draw(range.start) });
            microbatches.push(batch.sequences(range));
        }
        let part = 1.0 / batch.tokens.len().max(1) as f64;
        let mut ends = Pass::new(&self.head_and_tail, &described, microbatches, part, train);
        match train {
            Some(_) => self.pipeline.run(&self.chunks, &described, &mut ends)?,
            None => self.pipeline.evaluate(&self.chunks, &described, &mut ends)?,
        }
        // The last stage of each replica knows its part of the sum. Replicas that were given other batches notice here.
        let losses = std::mem::take(&mut ends.losses);
        let tokens: Vec<f64> = ends.microbatches.iter().map(|part| part.tokens.len() as f64).collect();
        let own = [self.replicas.sum(&losses)?, self.replicas.sum(&tokens)?];
        let own = if self.pipeline.is_last() { own } else { [0.0; 2] };
        let mut sum = Tensor::from_slice(dp.device(), [2], &own)?;
        self.mesh.group(Axis::Pipeline).all_reduce(shardwise::comm::ReduceOp::Sum, &mut sum)?;
        let sum = sum.to_vec()?;
        if sum[1] != batch.tokens.len() as f64 {
            let reason = format!(
                "the replicas had {} tokens together, but this rank's batch has {}",
                sum[1],
                batch.tokens.len()
            );
            return Err(invalid(&reason));
        }
        Ok(sum[0])
    }
}

impl<S: Stream, T: Element, B: Backend> HeadAndTail<S, T, B> {
    /// The weight of the table and the head, where this rank has either.
    fn tied(&self) -> Option<Param<T, B>> {
        match (&self.table, &self.head) {
            (_, Some(head)) => Some(head.weight().clone()),
            (Some(table), None) => table.params().pop(),
            (None, None) => None,
        }
    }
}

/// Every parameter once, in the order of a forward.
fn params<S: Stream, T: Element, B: Backend>(
    head_and_tail: &HeadAndTail<S, T, B>,
    chunks: &[Vec<Block<S, T, B>>],
) -> Vec<Param<T, B>> {
    let HeadAndTail { positions, norm, .. } = head_and_tail;
    let mut params: Vec<_> = head_and_tail.tied().into_iter().collect();
    params.extend(positions.iter().flat_map(Layer::params));
    params.extend(chunks.iter().flat_map(Layer::params));
    params.extend(norm.iter().flat_map(Layer::params));
    params
}

fn invalid(reason: &str) -> Error {
    Error::Invalid { op: "gpt", reason: reason.into() }
}

/// A batch on its way through the ends of the model.
struct Pass<'a, S: Stream, T: Element, B: Backend> {
    model: &'a HeadAndTail<S, T, B>,
    described: &'a [Microbatch],
    microbatches: Vec<Batch>,
    embedded: Vec<Option<Embedded<S, T, B>>>,
    /// A token's part of the mean.
    part: f64,
    /// The scale of the gradient; none when nothing is trained.
    train: Option<f64>,
    /// The loss of each microbatch.
    losses: Vec<f64>,
    /// Those of a microbatch without targets.
    logits: Option<DTensor<Shard<1>, T, B>>,
}

impl<'a, S: Stream, T: Element, B: Backend> Pass<'a, S, T, B> {
    fn new(
        model: &'a HeadAndTail<S, T, B>,
        described: &'a [Microbatch],
        microbatches: Vec<Batch>,
        part: f64,
        train: Option<f64>,
    ) -> Self {
        let embedded = microbatches.iter().map(|_| None).collect();
        let losses = vec![0.0; described.len()];
        Self { model, described, microbatches, embedded, part, train, losses, logits: None }
    }
}

/// What the backward of an embedded microbatch needs.
struct Embedded<S: Stream, T: Element, B: Backend> {
    rows: Vec<u32>,
    positions: <PositionEmbedding<S, T, B> as Layer<T, B>>::Saved,
    dropout: <Dropout<S> as Layer<T, B>>::Saved,
}

impl<S: Stream, T: Element, B: Backend> Ends<S, T, B> for Pass<'_, S, T, B> {
    fn input(&mut self, at: usize) -> Result<DTensor<S, T, B>> {
        let Microbatch { sequences, draw } = &self.described[at];
        let HeadAndTail { table: Some(table), positions: Some(positions), dropout, .. } = self.model else {
            return Err(invalid("the first stage lacks its embeddings"));
        };
        let (x, rows) = table.forward(&self.microbatches[at].tokens, sequences.clone())?;
        let x = match draw {
            Some(draw) => x.with_draw(*draw),
            None => x,
        };
        let (x, positions) = positions.forward(&x)?;
        let (x, dropout) = dropout.forward(&x)?;
        self.embedded[at] = Some(Embedded { rows, positions, dropout });
        Ok(x)
    }

    fn input_grad(&mut self, at: usize, dx: DTensor<S, T, B>) -> Result<()> {
        let saved = self.embedded[at].take().ok_or_else(|| invalid("a gradient without its input"))?;
        let dx = self.model.dropout.backward(saved.dropout, &dx)?;
        if let HeadAndTail { table: Some(table), positions: Some(positions), .. } = self.model {
            let dx = positions.backward(saved.positions, &dx)?;
            table.backward(&saved.rows, &dx)?;
        }
        Ok(())
    }

    fn loss(&mut self, at: usize, y: DTensor<S, T, B>) -> Result<Option<DTensor<S, T, B>>> {
        let HeadAndTail { head: Some(head), norm: Some(norm), .. } = self.model else {
            return Err(invalid("the last stage lacks its head"));
        };
        let (normed, saved_norm) = norm.forward(&y)?;
        let (logits, saved_head) = head.forward(&normed)?;
        if self.microbatches[at].targets.is_empty() && self.train.is_none() {
            self.logits = Some(logits);
            return Ok(None);
        }
        let entropy = VocabParallelCrossEntropy::default();
        let (losses, saved) = entropy.forward(&logits, &self.microbatches[at].targets)?;
        self.losses[at] = losses.sum()? * self.part;
        let Some(scale) = self.train else { return Ok(None) };
        let dlogits = entropy.backward(&saved, scale * self.part)?;
        let dnormed = head.backward(saved_head, &dlogits)?;
        Ok(Some(norm.backward(saved_norm, &dnormed)?))
    }
}
