//! Operators of one rank that run at the same time have the bits of the same operators in sequence.

use crate::{
    dev::{self, Dev},
    support::{Case, arrays, close, difference, matrix, random, run},
};
use ndarray::Array2;
use proptest::prelude::*;
use shardwise::{
    Result, Tensor,
    comm::Group,
    device::{Cpu, Element},
    kernels::{Backend, Gemm, Product},
    ops,
    parallel::{Bias, ColumnLinear, ColumnParallelLinear, Columns, QkvLayout, ResidualStream},
    shard::{Heads, Replicated, Shard},
    tensor::Weights,
};
use std::num::NonZeroUsize;

/// Compares q, k and v as three concurrent layers with one merged layer.
fn agree<S: ResidualStream + crate::support::Spread>(
    world: usize,
    kv_heads: usize,
    group: usize,
    tokens: usize,
    seed: u64,
) {
    let (hidden, dim, heads) = (5, 2, kv_heads * group);
    let x = matrix(seed, "x", tokens, hidden);
    let source = arrays([
        ("q.weight", random(seed, "q", &[heads * dim, hidden])),
        ("k.weight", random(seed, "k", &[kv_heads * dim, hidden])),
        ("v.weight", random(seed, "v", &[kv_heads * dim, hidden])),
        ("q.bias", random(seed, "qb", &[heads * dim])),
        ("k.bias", random(seed, "kb", &[kv_heads * dim])),
        ("v.bias", random(seed, "vb", &[kv_heads * dim])),
    ]);
    let assigned = Heads::new(heads, kv_heads, dim, world).unwrap();
    let width = assigned.qkv_features().total();
    let dy = matrix(seed, "dy", tokens, width);
    let layout = QkvLayout::separate("q", "k", "v");
    let partition = Some(assigned.qkv_features());
    let case = Case { dy_partition: partition, ..Case::new(world, &x, &dy, &source) };
    let want = run!(f64, &case, |ranks, weights| {
        let columns = Columns::qkv(ranks, &assigned, &layout)?;
        ColumnParallelLinear::<S, f64, Dev>::load(ranks, weights, hidden, &columns, Bias::Add)
    });
    let got = run!(f64, &case, |ranks, weights| {
        let columns = Columns::separate_qkv(ranks, &assigned, &layout)?;
        let load = |columns: &Columns| ColumnLinear::load(ranks, weights, hidden, columns, Bias::Add);
        ColumnParallelLinear::<S, f64, Dev>::concat(columns.iter().map(load).collect::<Result<Vec<_>>>()?)
    });
    let (want, got) = (want.unwrap(), got.unwrap());
    if dev::fresh().splits_exactly() {
        assert_eq!(got.y, want.y, "each output has the bits of the merged layer's");
    }
    close("y", &got.y.into_dyn(), &want.y, 1e-12);
    close("dx", &got.dx.into_dyn(), &want.dx, 1e-12);
    assert_eq!(got.grads.keys().collect::<Vec<_>>(), want.grads.keys().collect::<Vec<_>>());
    for (name, want) in &want.grads {
        assert!(difference(&got.grads[name], want) <= 1e-12, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn concatenated_layers_equal_the_merged_one(
        kv_heads in 1..5usize, group in 1..4usize, world in 1..9usize, tokens in 1..6usize, seed: u64,
    ) {
        let world = world.min(kv_heads * group);
        agree::<Replicated>(world, kv_heads, group, tokens, seed);
        agree::<Shard<0>>(world, kv_heads, group, tokens, seed);
    }
}

/// Uses the CPU's threads, whatever the device of this binary. The products are large enough for
/// several threads. The threads get different numbers of products of different sizes.
#[test]
fn products_on_threads_have_the_bits_of_one_after_the_other() {
    fn check<T: Element>() {
        let all: Vec<_> = [(100, 130, 200), (64, 300, 90), (7, 256, 512), (200, 100, 100), (1, 1, 1)]
            .into_iter()
            .enumerate()
            .map(|(at, (m, k, n))| (matrix(at as u64, "a", m, k), matrix(at as u64, "b", k, n)))
            .collect();
        let run = |threads: usize| -> Vec<Vec<T>> {
            let cpu = Cpu::poisoned().with_threads(NonZeroUsize::new(threads).unwrap());
            let tensor = |x: &Array2<f64>| Tensor::from_array(&cpu, &x.mapv(T::from_f64)).unwrap();
            let all: Vec<_> = all.iter().map(|(a, b)| (tensor(a), tensor(b))).collect();
            let pairs = all.iter().map(|(a, b)| (a.mat(), b.mat())).collect();
            let results = ops::products::<T, T, Cpu>(&cpu, pairs).unwrap();
            results.iter().map(|result| result.to_vec().unwrap()).collect()
        };
        let want = run(1);
        assert!(want.iter().flatten().all(|value| !value.to_f64().is_nan()));
        for threads in [2, 3, 4, 9] {
            assert_eq!(run(threads), want, "{threads} threads");
        }
    }
    check::<f32>();
    check::<f64>();
    check::<half::bf16>();
}

#[test]
fn what_does_not_fit_is_named() {
    fn product_is_refused<B: Backend>(device: &B) {
        let zeros = |rows, cols| Tensor::<f32, _>::zeros(device, [rows, cols]).unwrap();
        let (a, b, mut c, mut d) = (zeros(300, 300), zeros(200, 300), zeros(300, 300), zeros(300, 300));
        let product = |a, b, c| Product { a, b, beta: 0.0, c };
        let products = vec![
            product(a.mat(), a.mat(), c.mat_mut().unwrap()),
            product(a.mat(), b.mat(), d.mat_mut().unwrap()),
        ];
        let error = device.gemm_all(products).unwrap_err().to_string();
        assert_eq!(error, "gemm: columns of A is 300, but rows of B is 200");
    }
    let device = dev::fresh();
    product_is_refused(&device);
    product_is_refused(&Cpu::new().with_threads(NonZeroUsize::new(2).unwrap()));
    let group = Group::solo(&device);
    let load = |inputs: usize| {
        let source = arrays([("weight", random(1, "w", &[2, inputs]))]);
        let columns = Columns::even(&group, 2)?;
        ColumnLinear::<f32, Dev>::load(&group, &Weights::new(&source), inputs, &columns, Bias::None)
    };
    let concat =
        |layers| ColumnParallelLinear::<Replicated, f32, Dev>::concat(layers).unwrap_err().to_string();
    assert_eq!(concat(vec![]), "concatenated linear: there is no layer");
    assert_eq!(
        concat(vec![load(3).unwrap(), load(4).unwrap()]),
        "concatenated linear: the inputs of a layer is 4, but those of the first is 3"
    );
}
