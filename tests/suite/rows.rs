//! The operators for user-defined layers, in every element type, compared with a plain loop on
//! NaN-poisoned memory.

use crate::support::{close, integers, matrix, random};
use half::{bf16, f16};
use ndarray::{Array1, Array2, ArrayD, Axis, Slice, concatenate};
use proptest::prelude::*;
use shardwise::{
    Error, Result, Tensor,
    device::{Cpu, Element},
    kernels::{MatMut, MatRef, NO_ROW, Pointwise},
    ops, reference,
    shard::Sequences,
};
use std::fmt::Debug;

const EXACT: f64 = 1e-12;

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

fn tensor<T: Element>(x: &ArrayD<f64>) -> Tensor<T> {
    Tensor::from_array(&Cpu::poisoned(), &x.mapv(T::from_f64)).unwrap()
}

fn wide<T: Element>(x: &Tensor<T>) -> ArrayD<f64> {
    x.to_array().unwrap().mapv(T::to_f64)
}

fn bits<T: Element>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.to_f64().to_bits()).collect()
}

#[track_caller]
fn refused<R: Debug>(result: Result<R>, message: &str) {
    let error = result.expect_err(message);
    assert!(matches!(error, Error::Invalid { .. } | Error::Sizes { .. } | Error::Shapes { .. }), "{error:?}");
    assert_eq!(error.to_string(), message);
}

/// Products are computed in the accumulator type and rounded once. A sum over a row errs by at most
/// (columns) v Σ|ab|.
fn products<T: Element>(rows: usize, cols: usize, seed: u64) {
    let drawn = |name: &str, shape: &[usize]| tensor::<T>(&random(seed, name, shape));
    let (a, b, s) = (drawn("a", &[rows, cols]), drawn("b", &[rows, cols]), drawn("s", &[rows]));
    let times = |(a, b): (&T, &T)| T::narrow(a.widen() * b.widen());
    let want: Vec<_> = a.slice().iter().zip(b.slice()).map(times).collect();
    assert_eq!(bits(ops::mul(&a, &b).unwrap().slice()), bits(&want), "mul in {}", T::DTYPE);
    let row = |at: usize| at.checked_div(cols).unwrap_or(0);
    let want: Vec<_> = a.slice().iter().enumerate().map(|(at, a)| times((a, &s.slice()[row(at)]))).collect();
    let scaled = ops::scale_rows(&s, &a).unwrap();
    assert_eq!(bits(scaled.slice()), bits(&want), "scaled rows in {}", T::DTYPE);

    let dots = ops::dot_rows(&a, &b).unwrap();
    assert_eq!(dots.shape().dims(), [rows]);
    let products = wide(&a) * wide(&b);
    let want = products.sum_axis(Axis(1));
    let terms = cols as f64 * T::Acc::EPSILON / 2.0;
    let bound = products.mapv(f64::abs).sum_axis(Axis(1)) * terms + want.mapv(f64::abs) * T::EPSILON / 2.0;
    for ((got, want), bound) in wide(&dots).iter().zip(&want).zip(&bound) {
        // The last term covers the underflow of f16.
        assert!((got - want).abs() <= 1.01 * bound + 3e-8, "{}: |{got} - {want}| > {bound}", T::DTYPE);
    }
}

/// Scattering is the adjoint of selecting rows. Both skip ids without a row.
fn rows_of<T: Element>(table: usize, ids: &[u32], cols: usize, seed: u64) {
    let (x, dy) = (integers(seed, "x", table, cols), integers(seed, "dy", ids.len(), cols));
    let chosen = tensor::<T>(&x.clone().into_dyn()).rows(ids).unwrap();
    let scattered = tensor::<T>(&dy.clone().into_dyn());
    let scattered = ops::scatter_rows(&Cpu::poisoned(), ids, table, scattered.mat()).unwrap();
    let (mut y, mut dx) = (Array2::zeros(dy.raw_dim()), Array2::<f64>::zeros(x.raw_dim()));
    for (at, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_ROW) {
        y.row_mut(at).assign(&x.row(id as usize));
        let mut row = dx.row_mut(id as usize);
        row += &dy.row(at);
    }
    assert_eq!((wide(&chosen), wide(&scattered)), (y.into_dyn(), dx.into_dyn()), "{}", T::DTYPE);
}

/// Checks the mean over each sequence, and its adjoint.
fn means<T: Element>(sequences: &Sequences, cols: usize, seed: u64) {
    let rounded = |name: &str, rows: usize| matrix(seed, name, rows, cols).mapv(|x| T::from_f64(x).to_f64());
    let (x, dy) = (rounded("x", sequences.rows()), rounded("dy", sequences.len()));
    let ranges: Vec<_> = sequences.iter().collect();
    let y = reference::mean_sequences(&x, &ranges, sequences.valid());
    let dx = reference::mean_sequences_backward(x.nrows(), &ranges, sequences.valid(), &dy);
    // The bound covers sums of unit normals in the accumulator, and one rounding of the result.
    let bound = EXACT.max(4.0 * T::EPSILON);
    let got = ops::mean_sequences(&tensor::<T>(&x.into_dyn()), sequences).unwrap();
    close("mean", &wide(&got), &y, bound);
    let got = ops::mean_sequences_backward(sequences, &tensor::<T>(&dy.into_dyn())).unwrap();
    close("gradient of the mean", &wide(&got), &dx, bound);
}

/// Checks that `top_k` returns the largest elements of each row in order, with equal elements in
/// the order of their columns.
fn largest<T: Element>(rows: usize, cols: usize, k: usize, seed: u64) {
    let x = integers(seed, "x", rows, cols);
    let (values, ids) = ops::top_k(&tensor::<T>(&x.clone().into_dyn()), k).unwrap();
    let mut want = Vec::new();
    for row in x.rows() {
        let mut left: Vec<u32> = (0..cols as u32).collect();
        for _ in 0..k {
            let best = left
                .iter()
                .copied()
                .reduce(|best, id| if row[id as usize] > row[best as usize] { id } else { best });
            want.extend(best);
            left.retain(|&id| Some(id) != best);
        }
    }
    let of = |(at, id): (usize, &u32)| x[[at / k, *id as usize]];
    let want_values: Vec<f64> = want.iter().enumerate().map(of).collect();
    assert_eq!(ids, want);
    assert_eq!(wide(&values), ArrayD::from_shape_vec(vec![rows, k], want_values).unwrap());
}

/// Slices a tensor along a dimension and concatenates the slices. Compares each slice with
/// ndarray's.
fn parts<T: Element>(shape: &[usize], dim: usize, cut: usize, seed: u64) {
    let x = random(seed, "x", shape).mapv(|x| T::from_f64(x).to_f64());
    let whole = tensor::<T>(&x);
    let ranges = [0..cut, cut..cut, cut..shape[dim]];
    let parts = ranges.map(|range| {
        let part = ops::slice(&whole, dim, range.clone()).unwrap();
        assert_eq!(wide(&part), x.slice_axis(Axis(dim), Slice::from(range)).to_owned());
        part
    });
    let again = ops::concat(&parts.each_ref(), dim).unwrap();
    assert_eq!(again.shape(), whole.shape());
    assert_eq!(bits(again.slice()), bits(whole.slice()));
    let [first, _, last] = parts.map(|part| wide(&part));
    let turned = ops::concat(&[&tensor::<T>(&last), &tensor(&first)], dim).unwrap();
    assert_eq!(wide(&turned), concatenate(Axis(dim), &[last.view(), first.view()]).unwrap());
}

/// Runs the same check in every element type.
macro_rules! in_all {
    ($check:ident($($argument:expr),* $(,)?)) => {
        $check::<f64>($($argument),*);
        $check::<f32>($($argument),*);
        $check::<bf16>($($argument),*);
        $check::<f16>($($argument),*);
    };
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn products_agree_with_the_loop(rows in 0..6usize, cols in 0..70usize, seed: u64) {
        in_all!(products(rows, cols, seed));
    }

    #[test]
    fn scattering_is_the_adjoint_of_choosing(
        (table, cols, seed) in (1..6usize, 0..5usize, any::<u64>()),
        ids in proptest::collection::vec(0..7u32, 0..9),
    ) {
        let ids: Vec<u32> = ids.iter().map(|&id| if id as usize >= table { NO_ROW } else { id }).collect();
        in_all!(rows_of(table, &ids, cols, seed));
    }

    #[test]
    fn means_are_those_of_the_tokens(
        lens in proptest::collection::vec(0..5usize, 1..5),
        (cols, masked, seed) in (1..6usize, any::<bool>(), any::<u64>()),
    ) {
        let sequences = Sequences::packed(lens);
        let valid: Vec<bool> = random(seed, "valid", &[sequences.rows()]).iter().map(|&x| x > 0.0).collect();
        let sequences = if masked { sequences.masked(&valid).unwrap() } else { sequences };
        in_all!(means(&sequences, cols, seed));
    }

    #[test]
    fn the_largest_come_in_order(rows in 0..5usize, cols in 1..9usize, k in 1..9usize, seed: u64) {
        in_all!(largest(rows, cols, k.min(cols), seed));
    }

    #[test]
    fn parts_are_those_of_ndarray(
        shape in proptest::collection::vec(1..5usize, 1..5),
        (dim, cut, seed) in (0..4usize, 0..5usize, any::<u64>()),
    ) {
        let dim = dim % shape.len();
        in_all!(parts(&shape, dim, cut.min(shape[dim]), seed));
    }
}

/// A product of 0 with NaN or ∞ is NaN, because the accumulator computes it.
#[test]
fn products_keep_nan() {
    let x = tensor::<f32>(&Array1::from(vec![f64::NAN, f64::INFINITY, 1.0]).into_dyn());
    let zeros = tensor::<f32>(&ArrayD::zeros(vec![3]));
    let product = wide(&ops::mul(&x, &zeros).unwrap());
    assert!(product[0].is_nan() && product[1].is_nan() && product[2] == 0.0);
    assert!(wide(&ops::dot_rows(&x, &zeros).unwrap())[0].is_nan());
    let rows = x.clone().reshape([3, 1]).unwrap();
    assert!(wide(&ops::scale_rows(&zeros, &rows).unwrap()).iter().take(2).all(|y| y.is_nan()));
    refused(ops::top_k(&rows, 1), "top k: row 0 has NaN in column 0");
}

/// Kernels read and write the rows of a wider matrix, and nothing between these rows.
#[test]
fn rows_of_a_wider_matrix() {
    let cpu = Cpu::poisoned();
    let memory = [1.0_f32, 2.0, f32::NAN, 3.0, 4.0, f32::NAN];
    let x = MatRef::<f32, Cpu>::strided(&memory, 2, 2, 3, 1).unwrap();
    let written = |write: &dyn Fn(MatMut<'_, f32, Cpu>) -> Result<()>| {
        let mut y = [7.0_f32; 8];
        write(MatMut::<f32, Cpu>::strided(&mut y, 2, 2, 4, 1).unwrap()).unwrap();
        y
    };
    assert_eq!(written(&|y| cpu.mul(x, x, y)), [1.0, 4.0, 7.0, 7.0, 9.0, 16.0, 7.0, 7.0]);
    assert_eq!(written(&|y| cpu.scale_rows(&[2.0, -1.0], x, y)), [2.0, 4.0, 7.0, 7.0, -3.0, -4.0, 7.0, 7.0]);
    let mut dots = [f32::NAN; 2];
    cpu.dot_rows(x, x, &mut dots).unwrap();
    assert_eq!(dots, [5.0, 25.0]);
}

#[test]
fn operators_name_the_sizes_that_disagree() {
    let zeros = |shape: &[usize]| tensor::<f64>(&ArrayD::zeros(shape));
    let (x, wide, three) = (zeros(&[2, 4]), zeros(&[2, 5]), zeros(&[3]));
    refused(ops::mul(&x, &wide), "mul: a has shape [2, 4], but b has shape [2, 5]");
    refused(ops::dot_rows(&x, &wide), "dot rows: a has shape [2, 4], but b has shape [2, 5]");
    refused(
        ops::scale_rows(&three, &x),
        "scale rows: the number of factors is 3, but the number of rows is 2",
    );
    refused(
        ops::scatter_rows(&Cpu::new(), &[0], 3, x.mat()),
        "scatter_add: the number of ids is 1, but the number of rows is 2",
    );
    refused(
        ops::scatter_rows(&Cpu::new(), &[0, 3], 3, x.mat()),
        "scatter_add: id 3 is beyond a table of 3 rows",
    );
    refused(ops::top_k(&x, 5), "top k: k is 5, but the number of columns is 4");
    let slice = |dim, range| ops::slice(&x, dim, range);
    refused(slice(2, 0..1), "slice: indices 0..1 of dimension 2 of a tensor of shape [2, 4]");
    refused(slice(1, 2..5), "slice: indices 2..5 of dimension 1 of a tensor of shape [2, 4]");
    #[allow(clippy::reversed_empty_ranges)]
    refused(slice(1, 2..1), "slice: indices 2..1 of dimension 1 of a tensor of shape [2, 4]");
    refused(ops::concat::<f64, Cpu>(&[], 0), "concat: no tensors");
    refused(ops::concat(&[&x], 2), "concat: dimension 2 of a tensor of shape [2, 4]");
    refused(ops::concat(&[&x, &wide], 0), "concat: tensor 1 has shape [2, 5], but tensor 0 has [2, 4]");
    refused(ops::concat(&[&x, &three], 0), "concat: tensor 1 has shape [3], but tensor 0 has [2, 4]");
    let sequences = Sequences::packed([1, 2]);
    refused(
        ops::mean_sequences(&x, &sequences),
        "mean of sequences: rows of the sequences is 3, but rows of x is 2",
    );
    refused(
        ops::mean_sequences_backward(&sequences, &zeros(&[3, 4])),
        "mean of sequences backward: rows of dy is 3, but the number of sequences is 2",
    );
}
