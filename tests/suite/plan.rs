//! Models without data: what one rank plans alone equals the transfers and the memory of that rank
//! in a job with data.

use crate::dev::{self, Dev, ranks};
use shardwise::{
    Result, Tensor,
    comm::{Group, Op, Transfer, TransferLog},
    device::{Device, Element, Meta},
    kernels::{Activation, AttentionChoices, Backend, NormKind},
    models::{Bert, BertConfig, Decoder, DecoderConfig, ModelConfig},
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{
        AttentionConfig, Bias, BlockConfig, ColumnLinear, Columns, Context, DTensor, Layer, ResidualStream,
        TransformerBlock,
    },
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Random, WeightSource, Weights},
    train::{DataParallel, GradReduce},
};

/// A rank's transfers since the previous entry, and the bytes that the rank holds.
type Observed = Vec<(Vec<Transfer>, usize)>;

struct Watch<'a, B: Backend> {
    group: &'a Group<B>,
    record: &'a TransferLog,
    observed: Observed,
}

impl<'a, B: Backend> Watch<'a, B> {
    fn new(group: &'a Group<B>, record: &'a TransferLog) -> Self {
        record.take();
        Self { group, record, observed: Vec::new() }
    }

    fn observe(&mut self) -> Result<()> {
        let moved = self.record.take();
        // After the barrier the other ranks have read this rank's started transfers, which then
        // hold no memory.
        self.group.barrier()?;
        self.observed.push((moved, self.group.device().memory().live));
        Ok(())
    }
}

/// Runs inference and a training step.
fn trains<S: ResidualStream, T: Element, B: Backend>(
    group: &Group<B>,
    record: &TransferLog,
    source: &dyn WeightSource,
    config: &DecoderConfig,
) -> Result<Observed> {
    let mut watch = Watch::new(group, record);
    let model = Decoder::<S, T, B>::load(group, source, config)?;
    watch.observe()?;
    let ids: Vec<u32> = (0..11).map(|at| (at * 5 + 1) % config.vocabulary as u32).collect();
    let sequences = Sequences::packed([7, 4]);
    let inferred = model.infer(&ids, sequences.clone())?;
    watch.observe()?;
    drop(inferred);
    let (logits, saved) = model.forward(&ids, sequences)?;
    watch.observe()?;
    model.backward(saved, logits)?;
    watch.observe()?;
    let params = model.params();
    let norm = grad_norm(&params, &[group])?;
    AdamW::default().step(&params, 1e-3, clip_scale(norm, 1.0)?)?;
    watch.observe()?;
    Ok(watch.observed)
}

/// Decodes a prompt in two slots, and one more token in each slot.
fn generates<T: Element, B: Backend>(
    group: &Group<B>,
    record: &TransferLog,
    source: &dyn WeightSource,
    config: &DecoderConfig,
) -> Result<Observed> {
    let model = Decoder::<Replicated, T, B>::load(group, source, config)?;
    let mut watch = Watch::new(group, record);
    let mut cache = model.cache(3, 9)?;
    for (ids, counts) in [(&[1, 2, 3, 4, 5][..], [3, 2]), (&[6, 7], [1, 1])] {
        let logits = model.step(ids, &[2, 0], &counts, &mut cache)?;
        watch.observe()?;
        drop(logits);
    }
    Ok(watch.observed)
}

fn encodes<S: ResidualStream, B: Backend>(
    group: &Group<B>,
    record: &TransferLog,
    source: &dyn WeightSource,
    config: &BertConfig,
) -> Result<Observed> {
    let mut watch = Watch::new(group, record);
    let model = Bert::<S, f32, B>::load(group, source, config)?;
    watch.observe()?;
    let (ids, types, sequences) = ([2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 1, 1], Sequences::packed([4, 2]));
    drop(model.infer(&ids, Some(&types), sequences.clone())?);
    watch.observe()?;
    let (y, saved) = model.forward(&ids, Some(&types), sequences)?;
    model.backward(saved, y)?;
    watch.observe()?;
    Ok(watch.observed)
}

/// Compares the results of a function on ranks with data with the results that each rank plans
/// without data.
macro_rules! same {
    ($what:expr, $world:expr, $reduction:expr, $pass:ident::<$($T:ty),*>($($given:expr),*)) => {
        ranks($world)
            .run(|world| {
                let (group, record) = world.with_reduction($reduction).recorded();
                let got = $pass::<$($T,)* Dev>(&group, &record, $($given),*)?;
                let (alone, record) = Group::planned(&Meta::new(), group.rank(), group.size())?;
                let planned = $pass::<$($T,)* Meta>(&alone.with_reduction($reduction), &record, $($given),*)?;
                assert_eq!(got, planned, "{}, {:?}, rank {} of {}", $what, $reduction, group.rank(), $world);
                Ok(())
            })
            .unwrap();
    };
}

const EITHER: [Reduction; 2] = [Reduction::Fast, Reduction::Invariant { blocks: 8 }];

#[test]
fn models_move_and_hold_what_is_planned() {
    for name in crate::models::DECODERS {
        let (checkpoint, config) = crate::models::decoder(name);
        for &world in dev::WORLDS {
            for reduction in EITHER {
                same!(name, world, reduction, trains::<Replicated, f32>(&checkpoint, &config));
                same!(name, world, reduction, trains::<Shard<0>, half::bf16>(&checkpoint, &config));
                same!(name, world, reduction, generates::<f32>(&checkpoint, &config));
            }
        }
    }
    let (checkpoint, config) = crate::models::bert();
    for &world in dev::WORLDS {
        for reduction in EITHER {
            same!("bert", world, reduction, encodes::<Replicated>(&checkpoint, &config));
            same!("bert", world, reduction, encodes::<Shard<0>>(&checkpoint, &config));
        }
    }
}

/// Reduces gradients over replicas. A planned rank assumes that the other replicas have gradients
/// for the same parameters as itself.
fn replicates<T: Element, B: Backend>(
    group: &Group<B>,
    record: &TransferLog,
    reduce: GradReduce,
) -> Result<Observed> {
    let (alone, source) = (Group::solo(group.device()), Random::normal(1, 0.5));
    let alone = alone.with_reduction(group.reduction());
    let (columns, weights) = (Columns::even(&alone, 5)?, Weights::new(&source));
    let layer = ColumnLinear::<T, B>::load(&alone, &weights, 3, &columns, Bias::None)?;
    let params = layer.params();
    let replicas = DataParallel::new(group, &params)?;
    let mut watch = Watch::new(group, record);
    replicas.begin(reduce)?;
    let x = DTensor::copied(&alone, Tensor::zeros(group.device(), [4, 3])?)?;
    let (y, saved) = layer.forward(x)?;
    layer.backward(saved, y)?;
    replicas.finish()?;
    watch.observe()?;
    assert!(params.iter().all(|param| param.grad().is_some()));
    Ok(watch.observed)
}

#[test]
fn replicas_move_and_hold_what_is_planned() {
    for world in [1, 2, 3, 8] {
        for reduction in EITHER {
            same!("replicas", world, reduction, replicates::<f32>(GradReduce::Sum));
        }
        same!("replicas", world, Reduction::Fast, replicates::<f32>(GradReduce::Mean { weight: 1.0 }));
    }
}

/// Llama 2 with 70 billion parameters, on any of 64 ranks. Eight ranks hold each of the eight
/// key/value heads.
#[test]
fn a_large_model_has_the_sizes_of_its_formulas() {
    let (vocabulary, hidden, ffn, layers, ranks) = (32_000, 8_192, 28_672, 80, 64);
    let (heads, kv_heads, head_dim) = (64, 8, 128);
    let path = shardwise_tests::root().join("tests/data/configs/llama-2-70b.json");
    let ModelConfig::Decoder(config) = ModelConfig::read(path).unwrap() else { panic!("not a decoder") };
    let attention = &config.block.attention;
    let sizes = (config.vocabulary, attention.hidden, config.block.ffn, config.layers.len());
    assert_eq!(sizes, (vocabulary, hidden, ffn, layers));
    assert_eq!((attention.heads, attention.kv_heads, attention.head_dim), (heads, kv_heads, head_dim));
    assert!(!config.tied);
    // Each rank has one query and one key/value head.
    let of_layer = 4 * hidden * head_dim + 3 * hidden * ffn / ranks;
    let matrices = layers * of_layer + hidden * vocabulary / ranks;
    let parameters = matrices + hidden * vocabulary / ranks + (2 * layers + 1) * hidden;
    let (tokens, source) = (4_096, Random::normal(1, 0.02));
    let pairs = tokens * (tokens + 1) / 2;
    let flops = 2 * tokens * matrices + 4 * layers * pairs * head_dim;
    let moved = Transfer { op: Op::AllReduce, dtype: half::bf16::DTYPE, elements: tokens * hidden };
    for rank in [0, 5, 63] {
        let device = Meta::new();
        let (group, record) = Group::planned(&device, rank, ranks).unwrap();
        let model = Decoder::<Replicated, half::bf16, _>::load(&group, &source, &config).unwrap();
        assert_eq!(device.memory().live, 2 * parameters);
        let ids = vec![0; tokens];
        let logits = model.infer(&ids, Sequences::one(tokens)).unwrap();
        assert_eq!(logits.shape().dims(), [tokens, vocabulary]);
        // The embedding makes one all-reduce, and each block makes two.
        assert_eq!(record.take(), vec![moved; 1 + 2 * layers]);
        assert_eq!(device.flops(), flops as u64);
        drop(logits);
        let inference = device.memory().peak;
        let (logits, saved) = model.forward(&ids, Sequences::one(tokens)).unwrap();
        model.backward(saved, logits).unwrap();
        // First come the forward's transfers, then the backward's: one of the head, and three of
        // each block, for the MLP, the shared heads and the attention.
        let shared = Transfer { elements: tokens * 2 * kv_heads * head_dim, ..moved };
        let mut all = vec![moved; 2 + 2 * layers];
        all.extend([moved, shared, moved].repeat(layers));
        assert!(record.take() == all);
        // The backward makes two products per product of the forward, and five per two products of
        // attention. Only the owner of a shared head computes the head's term of dX.
        let params = model.params();
        let regions: Vec<_> = params.iter().flat_map(|param| param.regions().to_vec()).collect();
        let keys = regions.iter().filter(|own| own.tensor.contains("k_proj"));
        let not_owned = 2 * keys.filter(|own| !own.owned).map(|own| own.region.extent().len()).sum::<usize>();
        assert!(not_owned == 0 || not_owned == layers * 2 * hidden * head_dim);
        let backward = 2 * tokens * (2 * matrices - not_owned) + 10 * layers * pairs * head_dim;
        assert_eq!(device.flops(), (2 * flops + backward) as u64);
        // Inference needs less than 1 GiB besides the weights. The saved tensors of a forward take
        // over 10 GiB more.
        assert!(inference < 2 * parameters + (1 << 30) && device.memory().peak > inference + (10 << 30));
    }
}

/// In addition to its input, a block holds at most the input and the output of the gate. The
/// residual sum overwrites the block's input.
#[test]
fn a_block_infers_in_the_memory_of_its_widest_product() {
    let (hidden, ffn, tokens) = (64, 168, 40);
    let config = BlockConfig::new(
        AttentionConfig::new(hidden, 8).with_choices(AttentionChoices::CAUSAL),
        ffn,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true);
    let device = Meta::new();
    let (group, _) = Group::planned(&device, 1, 2).unwrap();
    let weights = Random::normal(1, 0.1);
    let block =
        TransformerBlock::<Replicated, f32, _>::load(&group, &Weights::new(&weights), &config).unwrap();
    let input = || DTensor::replicated(&group, Tensor::zeros(&device, [tokens, hidden]).unwrap()).unwrap();
    let x = input();
    let before = device.memory().live;
    let y = block.infer(x, &mut Context::default()).unwrap();
    assert_eq!(device.memory().live, before, "the output replaces the input");
    assert_eq!(device.memory().peak - before, 4 * tokens * (2 * ffn + ffn) / 2);
    drop(y);
    block.forward(input()).unwrap();
    assert!(
        device.memory().peak - before > 2 * 4 * tokens * (2 * ffn + ffn) / 2,
        "a forward for training keeps more"
    );
}
