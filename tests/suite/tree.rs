//! Sums of products along a tree (`gemm_tree`) have the bits of separate products and additions.

use half::{bf16, f16};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    device::{Accumulator, Cpu, Element},
    kernels::{Gemm, GemmTerm, MatMut, MatRef},
    rng::Philox,
};
use std::num::NonZeroUsize;

/// For each term, the depths of its products and the number of sums that it completes.
type Shape = Vec<(Vec<usize>, usize)>;

/// Returns random terms. The last term completes all waiting sums.
fn shapes() -> impl Strategy<Value = Shape> {
    let depth = prop::sample::select(vec![0, 1, 3, 20, 40, 383, 384, 385, 800]);
    let term = (prop::collection::vec(depth, 0..3), 0..4_usize);
    // A term without depth takes a different code path, so most terms have a depth.
    let term = prop_oneof![1 => term.clone(), 9 => term.prop_filter("a depth", |(depths, _)| !depths.is_empty() && !depths.contains(&0))];
    prop::collection::vec(term, 1..8).prop_map(|mut terms| {
        let (mut waiting, last) = (0, terms.len() - 1);
        for (at, (_, merges)) in terms.iter_mut().enumerate() {
            *merges = if at == last { waiting } else { (*merges).min(waiting) };
            waiting = waiting + 1 - *merges;
        }
        terms
    })
}

fn numbers<T: Element>(seed: u64, name: &str, len: usize) -> Vec<T> {
    let stream = Philox::named(seed, name);
    (0..len as u64).map(|at| T::from_f64(stream.normal(at))).collect()
}

/// Computes the sum by `gemm_tree` on `cpu`, and by separate products and additions.
fn sums<T: Element>(
    cpu: &Cpu,
    terms: &Shape,
    (rows, cols): (usize, usize),
    (by_rows, turned, gap): (bool, bool, usize),
    seed: u64,
) -> Result<[Vec<f64>; 2]> {
    let depth: usize = terms.iter().flat_map(|(depths, _)| depths).sum();
    let (a, b) = (numbers::<T>(seed, "a", rows * depth), numbers::<T>(seed, "b", depth * cols));
    let a = if by_rows {
        MatRef::<T, Cpu>::new(&a, rows, depth)?
    } else {
        MatRef::<T, Cpu>::new(&a, depth, rows)?.t()
    };
    let b = if turned {
        MatRef::<T, Cpu>::new(&b, cols, depth)?.t()
    } else {
        MatRef::<T, Cpu>::new(&b, depth, cols)?
    };
    let mut first = 0;
    let mut products = |depths: &Vec<usize>| {
        let next = |&depth: &usize| {
            let range = first..first + depth;
            first = range.end;
            (a.columns(range.clone()), b.block(range, 0..cols))
        };
        depths.iter().map(next).collect::<Vec<_>>()
    };
    let terms: Vec<_> = terms
        .iter()
        .map(|(depths, merges)| GemmTerm { products: products(depths), merges: *merges })
        .collect();
    let stride = cols + gap;
    let mut c = vec![T::Acc::NAN; rows * stride];
    cpu.gemm_tree(&terms, MatMut::<T::Acc, Cpu>::strided(&mut c, rows, cols, stride, 1)?)?;
    let got = (0..rows * cols).map(|at| c[at / cols * stride + at % cols].to_f64()).collect();
    assert!(c.iter().enumerate().all(|(at, c)| (at % stride < cols) != c.to_f64().is_nan()));

    let mut waiting: Vec<Vec<T::Acc>> = Vec::new();
    for GemmTerm { products, merges } in &terms {
        let mut sum = vec![T::Acc::ZERO; rows * cols];
        let deep = products.iter().filter(|(a, _)| a.cols() > 0);
        for (at, (a, b)) in deep.enumerate() {
            let beta = if at == 0 { 0.0 } else { 1.0 };
            cpu.gemm(1.0, *a, *b, beta, MatMut::<T::Acc, Cpu>::new(&mut sum, rows, cols)?)?;
        }
        for _ in 0..*merges {
            let below = waiting.pop().expect("a waiting sum");
            sum.iter_mut().zip(below).for_each(|(sum, below)| *sum = below + *sum);
        }
        waiting.push(sum);
    }
    Ok([got, waiting.swap_remove(0).into_iter().map(T::Acc::to_f64).collect()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_of_products_is_products_and_additions(
        terms in shapes(), rows in prop_oneof![1..40_usize, 140..150_usize], cols in prop_oneof![1..70_usize, 300..310_usize],
        layout in (any::<bool>(), any::<bool>(), 0..3_usize), threads in 1..3_usize, seed: u64,
    ) {
        let cpu = Cpu::poisoned().with_threads(NonZeroUsize::new(threads).unwrap());
        let bits = |x: &Vec<f64>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for [got, want] in [
            sums::<f64>(&cpu, &terms, (rows, cols), layout, seed).unwrap(),
            sums::<f32>(&cpu, &terms, (rows, cols), layout, seed).unwrap(),
            sums::<bf16>(&cpu, &terms, (rows, cols), layout, seed).unwrap(),
            sums::<f16>(&cpu, &terms, (rows, cols), layout, seed).unwrap(),
        ] {
            prop_assert!(bits(&got) == bits(&want));
        }
    }
}

/// The product has more rows than are computed at a time, and several blocks of columns. Some sums
/// wait for several steps.
#[test]
fn a_tree_of_large_products() {
    let terms = vec![(vec![450], 0), (vec![40, 400], 0), (vec![20], 0), (vec![390], 2), (vec![10], 2)];
    for layout in [(true, true, 0), (false, false, 1)] {
        let [got, want] = sums::<f32>(&Cpu::poisoned(), &terms, (600, 300), layout, 1).unwrap();
        assert!(got == want, "{layout:?}");
    }
}

#[test]
fn sums_that_are_not_one_are_named() {
    let (cpu, a) = (Cpu::new(), [1.0_f32; 6]);
    let product = || (MatRef::<f32, Cpu>::new(&a, 2, 3).unwrap(), MatRef::<f32, Cpu>::new(&a, 3, 2).unwrap());
    let sum = |merges: &[usize], cols: usize| {
        let terms: Vec<_> =
            merges.iter().map(|&merges| GemmTerm { products: vec![product()], merges }).collect();
        let mut c = [f32::NAN; 6];
        let result = cpu.gemm_tree(&terms, MatMut::<f32, Cpu>::new(&mut c, 2, cols).unwrap());
        result.map_err(|error: Error| error.to_string())
    };
    assert_eq!(sum(&[0, 1], 2), Ok(()));
    let left = "gemm tree: the number of sums that remain is 2, but the number of results is 1";
    assert_eq!(sum(&[0, 0], 2), Err(left.into()));
    let too_many = "gemm tree: the merges of a term is 2, but the number of sums before it is 1";
    assert_eq!(sum(&[0, 2], 2), Err(too_many.into()));
    assert_eq!(sum(&[], 2).unwrap_err(), left.replace('2', "0"));
    assert_eq!(sum(&[0], 3).unwrap_err(), "gemm: columns of B is 2, but columns of C is 3");
}
