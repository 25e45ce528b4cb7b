//! Counts the driver calls that a layer adds to a decode step and to a training step: launches,
//! uploads, downloads and allocations. The stand-in for the driver counts them. DESIGN.md has the
//! table.

use crate::dev::{self, DTensor};
use half::bf16;
use libloading::Library;
use shardwise::{
    Tensor,
    comm::Group,
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig, KvCache, Layer, TransformerBlock},
    shard::{Replicated, Sequences},
    tensor::{Random, Weights},
};

/// The driver calls of this thread so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    /// Kernels, products, copies on the device and fills.
    launches: u64,
    uploads: u64,
    downloads: u64,
    /// Allocations. Each of them is also freed.
    allocations: u64,
}

impl Counts {
    /// Returns `None` with a real driver, because only the stand-in counts calls.
    fn now() -> Option<Self> {
        type Read = unsafe extern "C" fn(i32, *mut u64, usize) -> usize;
        const OF_THIS_THREAD: i32 = -1;
        let mut counts = [0; 8];
        // SAFETY: the library is loaded already, and stays loaded. `Read` is the type that the
        // stand-in declares, and `counts` has room for the numbers that the call requests.
        #[allow(unsafe_code)]
        unsafe {
            let driver = Library::new("libcuda.so.1").ok()?;
            let read = driver.get::<Read>(b"cuda_standin_counts").ok()?;
            read(OF_THIS_THREAD, counts.as_mut_ptr(), counts.len());
        }
        // The stand-in's order: kernels, products, uploads, downloads, copies on the device, fills,
        // allocations, frees.
        let [launches, products, uploads, downloads, copies, fills, allocations, _] = counts;
        Some(Self { launches: launches + products + copies + fills, uploads, downloads, allocations })
    }

    fn since(self, before: Self) -> Self {
        Self {
            launches: self.launches - before.launches,
            uploads: self.uploads - before.uploads,
            downloads: self.downloads - before.downloads,
            allocations: self.allocations - before.allocations,
        }
    }
}

type Block = TransformerBlock<Replicated, bf16, dev::Dev>;

/// Returns Llama's block with 32 query and 8 key/value heads and small features.
fn block(group: &Group<dev::Dev>) -> Block {
    let (hidden, heads) = (256, 32);
    let rope = RopeConfig { dim: 8, base: 10_000.0, pairs: RopePairs::Halves, scaling: RopeScaling::None };
    let config = BlockConfig::new(
        AttentionConfig::new(hidden, heads)
            .with_kv_heads(8)
            .with_choices(AttentionChoices::CAUSAL)
            .with_rope(rope),
        512,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true);
    let source = Random::normal(1, 0.02);
    Block::load(group, &Weights::new(&source), &config).unwrap()
}

fn tokens(group: &Group<dev::Dev>, rows: usize) -> DTensor<Replicated, bf16> {
    DTensor::replicated(group, Tensor::full(group.device(), [rows, 256], 0.5).unwrap()).unwrap()
}

/// Counts a step of one token through `layers` blocks, whose cache has 13 tokens.
fn decode(layers: usize) -> Option<Counts> {
    let group = Group::solo(&dev::fresh());
    let block = block(&group);
    let mut cache = KvCache::new(1, 16).unwrap();
    let mut step = |rows: usize| {
        let (sequences, mut context) = cache.step(&[0], &[rows]).unwrap();
        let mut x = tokens(&group, rows).with_sequences(sequences).unwrap();
        let before = Counts::now();
        for _ in 0..layers {
            x = block.infer(x, &mut context).unwrap();
        }
        drop(x);
        let after = Counts::now();
        context.finish().unwrap();
        Some(after?.since(before?))
    };
    // The first step creates the plans, the constant tables and the cache, which later steps reuse.
    step(12);
    step(1);
    step(1)
}

/// Returns the calls that a third layer adds to those of two layers.
fn layer(count: impl Fn(usize) -> Option<Counts>) -> Option<Counts> {
    Some(count(3)?.since(count(2)?))
}

fn training(layers: usize) -> Option<Counts> {
    let group = Group::solo(&dev::fresh());
    let blocks: Vec<Block> = (0..layers).map(|_| block(&group)).collect();
    let x = tokens(&group, 40).with_sequences(Sequences::packed([25, 15])).unwrap();
    let step = || {
        let before = Counts::now();
        let (y, saved) = blocks.forward(x.clone()).unwrap();
        drop(blocks.backward(saved, y).unwrap());
        let after = Counts::now();
        for param in blocks.params() {
            param.zero_grad();
        }
        Some(after?.since(before?))
    };
    step();
    step()
}

fn check(what: &str, counted: Option<Counts>, expected: Counts) {
    match counted {
        Some(counted) => assert_eq!(counted, expected, "{what}"),
        None => {
            assert!(!dev::fresh().name().contains("stand-in"), "{what}: the stand-in did not count");
            println!("not run: a real driver does not count calls");
        }
    }
}

#[test]
fn a_decode_layer_asks_for_this_much() {
    let expected = Counts { launches: 12, uploads: 0, downloads: 0, allocations: 10 };
    check("a decode layer", layer(decode), expected);
}

#[test]
fn a_training_block_asks_for_this_much() {
    let expected = Counts { launches: 36, uploads: 0, downloads: 0, allocations: 34 };
    check("a training block", layer(training), expected);
}
