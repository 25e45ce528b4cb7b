//! Checks every kernel of one device, and the operators over them, on NaN-poisoned memory. f64 is
//! compared at 1e-12 with the reference or with a plain loop. Narrower elements are compared within
//! bounds that are derived next to each test.
//!
//! In the bounds, u = ε / 2 is the rounding error of the element type, and v is that of its
//! accumulator type. Inputs are numbers of the element type, so they have no error of their own.
//! Bounds count first-order terms, plus 1 % for second-order terms.

use crate::support::{close, integers, matrix, random};
use half::{bf16, f16};
use ndarray::{Array, Array1, Array2, ArrayD, Axis, Dimension, Slice, arr0, array, concatenate, s};
use proptest::prelude::*;
use shardwise::{
    Error, Result, Tensor,
    device::{Cpu, DType, Device, Element, MemoryUse},
    kernels::{
        Activation, Attention, AttentionChoices, AttentionSpec, Batch, Epilogue, Gather, Gemm, MatMut,
        MatRef, NO_ROW, Norm, NormKind, Pointwise, QkvHeads,
    },
    ops, reference,
    rng::Philox,
    shard::Sequences,
};
use std::{fmt::Debug, num::NonZeroUsize};

const EXACT: f64 = 1e-12;

/// The largest underflow error of the element types: half the distance between subnormal f16
/// numbers.
const UNDERFLOW: f64 = 3e-8;

const ACTIVATIONS: [(Activation, reference::Activation); 4] = [
    (Activation::Relu, reference::Activation::Relu),
    (Activation::Silu, reference::Activation::Silu),
    (Activation::GeluErf, reference::Activation::GeluErf),
    (Activation::GeluTanh, reference::Activation::GeluTanh),
];

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

fn unit<T: Element>() -> (f64, f64) {
    (T::EPSILON / 2.0, T::Acc::EPSILON / 2.0)
}

/// Rounds to the nearest numbers of an element type.
fn rounded<T: Element, D: Dimension>(x: Array<f64, D>) -> Array<f64, D> {
    x.mapv(|x| T::from_f64(x).to_f64())
}

fn tensor<T: Element, D: Dimension>(cpu: &Cpu, x: &Array<f64, D>) -> Tensor<T> {
    Tensor::from_array(cpu, &x.mapv(T::from_f64)).unwrap()
}

fn wide<T: Element>(x: &Tensor<T>) -> ArrayD<f64> {
    x.to_array().unwrap().mapv(T::to_f64)
}

fn wide2<T: Element>(x: &Tensor<T>) -> Array2<f64> {
    wide(x).into_dimensionality().unwrap()
}

fn bits<T: Element>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.to_f64().to_bits()).collect()
}

/// Checks finite numbers against `want` within 1.01 · `bound`; NaN and ∞ must match exactly.
#[track_caller]
fn within<D: Dimension>(what: impl Debug, got: &ArrayD<f64>, want: &Array<f64, D>, bound: &Array<f64, D>) {
    assert_eq!(got.shape(), want.shape(), "{what:?}: shapes");
    for (at, ((got, want), bound)) in got.iter().zip(want).zip(bound).enumerate() {
        let same = got == want || got.is_nan() && want.is_nan();
        let near = want.is_finite() && (got - want).abs() <= 1.01 * bound;
        assert!(same || near, "{what:?}[{at}]: |{got} - {want}| > {bound}");
    }
}

/// Checks that the error names two sizes that disagree.
#[track_caller]
fn disagree<R: Debug>(result: Result<R>, message: &str) {
    let error = result.expect_err(message);
    assert!(matches!(error, Error::Sizes { .. } | Error::Shapes { .. }), "{error:?}");
    assert_eq!(error.to_string(), message);
}

/// Checks that the error is `Error::Invalid` with this message.
#[track_caller]
fn invalid<R: Debug>(result: Result<R>, message: &str) {
    let error = result.expect_err(message);
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    assert_eq!(error.to_string(), message);
}

// Matrix products.

/// The row and column strides of a matrix in memory.
type Strides = (usize, usize);

/// Contiguous rows, contiguous columns, submatrices of wider matrices of both kinds, and gaps
/// between all elements.
fn layouts() -> impl Strategy<Value = fn(usize, usize) -> Strides> {
    prop_oneof![
        Just((|_, cols| (cols, 1)) as fn(usize, usize) -> Strides),
        Just((|rows, _| (1, rows)) as fn(usize, usize) -> Strides),
        Just((|_, cols| (cols + 3, 1)) as fn(usize, usize) -> Strides),
        Just((|rows, _| (1, rows + 2)) as fn(usize, usize) -> Strides),
        Just((|_, cols| (2 * cols + 1, 2)) as fn(usize, usize) -> Strides),
    ]
}

/// Places a matrix in memory that is NaN between and after its elements.
fn place<T: Element>(x: &Array2<f64>, (row, col): Strides) -> Vec<T> {
    let mut memory = vec![T::NAN; x.nrows() * row + x.ncols() * col + 3];
    for ((i, j), &x) in x.indexed_iter() {
        memory[i * row + j * col] = T::from_f64(x);
    }
    memory
}

/// Reads the matrix back and checks that the memory between its elements is unchanged.
fn displace<T: Element>(memory: &[T], rows: usize, cols: usize, (row, col): Strides) -> ArrayD<f64> {
    let mut rest: Vec<f64> = memory.iter().map(|x| x.to_f64()).collect();
    let x = Array2::from_shape_fn((rows, cols), |(i, j)| {
        std::mem::replace(&mut rest[i * row + j * col], f64::NAN)
    });
    assert!(rest.iter().all(|x| x.is_nan()), "memory outside the matrix was written");
    x.into_dyn()
}

fn view<T: Element>(memory: &[T], rows: usize, cols: usize, (row, col): Strides) -> MatRef<'_, T, Cpu> {
    MatRef::strided(memory, rows, cols, row, col).unwrap()
}

fn view_mut<T: Element>(
    memory: &mut [T],
    rows: usize,
    cols: usize,
    (row, col): Strides,
) -> MatMut<'_, T, Cpu> {
    MatMut::strided(memory, rows, cols, row, col).unwrap()
}

/// α A B + β C.
#[derive(Debug)]
struct Product {
    alpha: f64,
    a: Array2<f64>,
    b: Array2<f64>,
    beta: f64,
    c: Array2<f64>,
    strides: [Strides; 3],
}

impl Product {
    fn random(seed: u64, (m, k, n): (usize, usize, usize)) -> Self {
        let (a, b, c) = (matrix(seed, "a", m, k), matrix(seed, "b", k, n), matrix(seed, "c", m, n));
        Self { alpha: 1.0, a, b, beta: 0.0, c, strides: [(k, 1), (n, 1), (n, 1)] }
    }

    /// Returns the result and |α| Σ|a||b|, computed by the three loops of the definition.
    fn naive(&self) -> (Array2<f64>, Array2<f64>) {
        let sum = |f: fn(f64) -> f64| {
            Array2::from_shape_fn(self.c.dim(), |(i, j)| {
                (0..self.a.ncols()).map(|k| f(self.a[[i, k]] * self.b[[k, j]])).sum::<f64>()
            })
        };
        // With β = 0, C is not read.
        let kept = if self.beta == 0.0 { Array2::zeros(self.c.dim()) } else { &self.c * self.beta };
        (sum(|x| x) * self.alpha + kept, sum(f64::abs) * self.alpha.abs())
    }

    /// Computes the product of matrices of type T into a matrix of type C. If β = 0, this matrix is
    /// full of NaN before.
    fn compute<T: Element, C: Element<Acc = T::Acc>>(&self, cpu: &Cpu) -> ArrayD<f64> {
        let ((m, k), n) = (self.a.dim(), self.b.ncols());
        let [sa, sb, sc] = self.strides;
        let (a, b) = (place::<T>(&self.a, sa), place::<T>(&self.b, sb));
        let poison = Array2::from_elem((m, n), f64::NAN);
        let mut c = place::<C>(if self.beta == 0.0 { &poison } else { &self.c }, sc);
        cpu.gemm(self.alpha, view(&a, m, k, sa), view(&b, k, n, sb), self.beta, view_mut(&mut c, m, n, sc))
            .unwrap();
        displace(&c, m, n, sc)
    }

    /// |error| ≤ (k + 2) v |α| Σ|a||b| + 2 v |β c| + w |result|. In the accumulator type, k
    /// products, k sums and the two operations with α and β are rounded. The result is rounded once
    /// to its own type, by w. In f64 the bound is 1e-12 of the absolute terms.
    fn check<T: Element, C: Element<Acc = T::Acc>>(&mut self) {
        (self.a, self.b) = (rounded::<T, _>(self.a.clone()), rounded::<T, _>(self.b.clone()));
        self.c = rounded::<C, _>(self.c.clone());
        let (want, terms) = self.naive();
        let kept = self.c.mapv(|c| (self.beta * c).abs());
        let (v, w) = (T::Acc::EPSILON / 2.0, C::EPSILON / 2.0);
        let bound = match T::DTYPE {
            DType::F64 => (terms + kept) * EXACT,
            _ => {
                terms * ((self.a.ncols() + 2) as f64 * v)
                    + kept * (2.0 * v)
                    + want.mapv(f64::abs) * w
                    + UNDERFLOW
            }
        };
        within((T::DTYPE, C::DTYPE, &self), &self.compute::<T, C>(&Cpu::poisoned()), &want, &bound);
    }
}

proptest! {
    #![proptest_config(cases(32))]

    /// All transposes and strides of A, B and C, all α and β, and all element types. Results have
    /// the element type or its accumulator type.
    #[test]
    fn gemm_in_any_layout(
        m in 0..20usize, k in 0..40usize, n in 0..20usize, a in layouts(), b in layouts(), c in layouts(),
        alpha in prop::sample::select(vec![1.0, 0.125, -1.5]), beta in prop::sample::select(vec![0.0, 1.0, -0.5]),
        seed: u64,
    ) {
        let strides = [a(m, k), b(k, n), c(m, n)];
        let product = || Product { alpha, beta, strides, ..Product::random(seed, (m, k, n)) };
        product().check::<f64, f64>();
        product().check::<f32, f32>();
        product().check::<bf16, bf16>();
        product().check::<f16, f16>();
        product().check::<bf16, f32>();
        product().check::<f16, f32>();
        product().check::<f16, bf16>();
    }

    /// Small whole numbers have exact sums, so the result must match bit by bit.
    #[test]
    fn gemm_of_integers_is_exact(
        m in 1..20usize, k in 0..30usize, n in 1..20usize, a in layouts(), b in layouts(), c in layouts(),
        beta in prop::sample::select(vec![0.0, 1.0]), seed: u64,
    ) {
        let strides = [a(m, k), b(k, n), c(m, n)];
        let (a, b) = (integers(seed, "a", m, k), integers(seed, "b", k, n));
        let product = Product { alpha: 1.0, a, b, beta, c: integers(seed, "c", m, n), strides };
        let want = product.naive().0.into_dyn();
        let cpu = Cpu::poisoned();
        prop_assert_eq!(product.compute::<f64, f64>(&cpu), want.clone());
        prop_assert_eq!(product.compute::<f32, f32>(&cpu), want.clone());
        prop_assert_eq!(product.compute::<bf16, bf16>(&cpu), want.clone());
        prop_assert_eq!(product.compute::<f16, f16>(&cpu), want);
    }

    /// The heads of a batch are interleaved in the rows. With stride 0 all products use the same
    /// operand.
    #[test]
    fn gemm_of_interleaved_heads(
        heads in 1..4usize, m in 1..6usize, k in 1..6usize, n in 1..6usize, shared_a: bool, shared_b: bool, seed: u64,
    ) {
        let cpu = Cpu::poisoned();
        let (a, b) = (matrix(seed, "a", m, heads * k), matrix(seed, "b", k, heads * n));
        let stride = |shared, step| if shared { 0 } else { step };
        let batch = Batch { count: heads, a: stride(shared_a, k), b: stride(shared_b, n), c: n };
        let (sa, sb, sc) = ((heads * k, 1), (heads * n, 1), (heads * n + 1, 1));
        let (a_memory, b_memory) = (place::<f64>(&a, sa), place::<f64>(&b, sb));
        let mut c = vec![f64::NAN; m * sc.0];
        cpu.gemm_batched(batch, 1.0, view(&a_memory, m, k, sa), view(&b_memory, k, n, sb), 0.0, view_mut(&mut c, m, n, sc))
            .unwrap();
        let parts: Vec<_> = (0..heads).map(|head| {
            let (a_at, b_at) = (head * batch.a, head * batch.b);
            a.slice(s![.., a_at..a_at + k]).dot(&b.slice(s![.., b_at..b_at + n]))
        }).collect();
        let want = concatenate(Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap();
        close("heads", &displace(&c, m, heads * n, sc), &want, EXACT);
    }

    /// A rank that computes some rows or columns of a product gets the bits of the whole product.
    /// This holds if both products have few rows, or neither has.
    #[test]
    fn a_part_of_a_product_has_the_bits_of_the_whole(
        m in 2..40usize, k in 1..400usize, n in 2..40usize, at in 0.0..1.0, seed: u64,
    ) {
        part_of_a_product::<f64>(seed, (m, k, n), at);
        part_of_a_product::<f32>(seed, (m, k, n), at);
        part_of_a_product::<bf16>(seed, (m, k, n), at);
    }
}

/// Compares y = x wᵀ of a linear layer, computed whole, with two ranges of its rows or columns.
fn part_of_a_product<T: Element>(seed: u64, (m, k, n): (usize, usize, usize), at: f64) {
    let cpu = Cpu::poisoned();
    let (x, w) = (matrix(seed, "x", m, k), matrix(seed, "w", n, k));
    let linear = |x: &Array2<f64>, w: &Array2<f64>| {
        wide2(&ops::linear::<T, _>(&tensor(&cpu, x), &tensor(&cpu, w), None, None).unwrap().0)
    };
    let whole = linear(&x, &w);
    for axis in [0, 1] {
        let cut = (at * whole.shape()[axis] as f64) as usize;
        for range in [0..cut, cut..whole.shape()[axis]] {
            let rows = |x: &Array2<f64>| x.slice_axis(Axis(0), Slice::from(range.clone())).to_owned();
            // Products of at most 8 rows are summed in a different order.
            if axis == 0 && (range.len() <= 8) != (m <= 8) {
                continue;
            }
            let part = if axis == 0 { linear(&rows(&x), &w) } else { linear(&x, &rows(&w)) };
            assert_eq!(part, whole.slice_axis(Axis(axis), Slice::from(range)), "{} along {axis}", T::DTYPE);
        }
    }
}

/// The widening path processes 512 columns and a depth of 512 at a time.
#[test]
fn gemm_across_the_blocks_of_the_widening_path() {
    for (m, k, n) in [(3, 513, 2), (2, 1025, 5), (2, 7, 515), (3, 512, 1024)] {
        Product { beta: 1.0, alpha: 0.5, ..Product::random(1, (m, k, n)) }.check::<bf16, bf16>();
        Product { strides: [(1, m), (1, k), (1, m)], ..Product::random(2, (m, k, n)) }.check::<f16, f32>();
    }
}

#[test]
fn gemm_without_depth_scales_c() {
    for (beta, want) in [(0.0, 0.0), (1.0, 3.0), (-0.5, -1.5)] {
        let product = || Product { beta, c: Array2::from_elem((2, 3), 3.0), ..Product::random(1, (2, 0, 3)) };
        let want = Array2::from_elem((2, 3), want).into_dyn();
        let cpu = Cpu::poisoned();
        assert_eq!(product().compute::<f64, f64>(&cpu), want);
        assert_eq!(product().compute::<f32, f32>(&cpu), want);
        assert_eq!(product().compute::<bf16, f32>(&cpu), want);
        assert_eq!(product().compute::<f16, f16>(&cpu), want);
    }
    // In a batch of products of depth 0 the operands are empty, whatever their strides.
    let mut c = [f64::NAN; 4];
    let batch = Batch { count: 2, a: 5, b: 5, c: 2 };
    let none: [f64; 0] = [];
    let (a, b) = (view(&none, 1, 0, (0, 1)), view(&none, 0, 2, (2, 1)));
    Cpu::new().gemm_batched::<f64, f64>(batch, 1.0, a, b, 0.0, view_mut(&mut c, 1, 2, (2, 1))).unwrap();
    assert_eq!(c, [0.0; 4]);
}

#[test]
fn gemm_does_not_depend_on_the_number_of_threads() {
    let one = Cpu::poisoned();
    // The product has enough multiplications to be split. Threads cannot share its rows evenly, and
    // one C has gaps between its rows.
    let (m, k, n) = (171, 160, 160);
    let bits = |x: ArrayD<f64>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for strides in [[(k, 1), (n, 1), (n, 1)], [(1, m + 1), (1, k), (n + 3, 1)], [(k, 1), (n, 1), (1, m)]] {
        let product = Product { alpha: 0.75, beta: 1.0, strides, ..Product::random(3, (m, k, n)) };
        for threads in [2, 3, 16] {
            let many = Cpu::poisoned().with_threads(NonZeroUsize::new(threads).unwrap());
            assert_eq!(bits(product.compute::<f64, f64>(&many)), bits(product.compute::<f64, f64>(&one)));
            assert_eq!(bits(product.compute::<f32, f32>(&many)), bits(product.compute::<f32, f32>(&one)));
            assert_eq!(bits(product.compute::<bf16, f32>(&many)), bits(product.compute::<bf16, f32>(&one)));
        }
    }
}

/// A fused epilogue processes one block of a product at a time. Its bits must be those of the
/// unfused operators.
fn behind_a_product<T: Element>(cpu: &Cpu, (m, k, n): (usize, usize, usize), gap: usize) {
    let (x, w) = (tensor::<T, _>(cpu, &matrix(1, "x", m, k)), tensor::<T, _>(cpu, &matrix(2, "w", n, k)));
    let (bias, at) =
        (tensor::<T, _>(cpu, &matrix(3, "b", 1, n)), tensor::<T, _>(cpu, &matrix(4, "at", m, n)));
    let (a, b, bias, f, strides) = (x.mat(), w.mat(), bias.slice(), Activation::GeluErf, (n + gap, 1));
    let new = || vec![T::NAN; m * (n + gap)];
    let same = |what: &str, got: &[T], want: &[T]| {
        let bits = |y: &[T]| displace(y, m, n, strides).mapv(f64::to_bits);
        assert!(bits(got) == bits(want), "{what}: {}, {m} x {k} x {n}", T::DTYPE);
    };
    let (mut product, mut backward) = (new(), new());
    cpu.gemm(1.0, a, b.t(), 0.0, view_mut(&mut product, m, n, strides)).unwrap();
    for bias in [Some(bias), None] {
        let (mut pre, mut active, mut got, mut before) = (product.clone(), new(), new(), new());
        if let Some(bias) = bias {
            cpu.add_bias::<T>(bias, view_mut(&mut pre, m, n, strides)).unwrap();
        }
        cpu.activate(f, view(&pre, m, n, strides), view_mut(&mut active, m, n, strides)).unwrap();
        let epilogue = Epilogue { bias, activation: None };
        cpu.linear(a, b, epilogue, view_mut(&mut got, m, n, strides)).unwrap();
        same("bias", &got, &pre);
        got = new();
        let (before_mat, got_mat) = (view_mut(&mut before, m, n, strides), view_mut(&mut got, m, n, strides));
        cpu.linear(a, b, Epilogue { bias, activation: Some((f, before_mat)) }, got_mat).unwrap();
        same("before the activation", &before, &pre);
        same("activation", &got, &active);
    }
    let dy = view(&product, m, n, strides);
    cpu.activate_backward(f, at.mat(), dy, view_mut(&mut backward, m, n, strides)).unwrap();
    let mut got = new();
    cpu.linear_dx(a, b.t(), None, view_mut(&mut got, m, n, strides)).unwrap();
    same("the product's backward", &got, &product);
    got = new();
    cpu.linear_dx(a, b.t(), Some((f, at.mat())), view_mut(&mut got, m, n, strides)).unwrap();
    same("the activation's backward", &got, &backward);
}

#[test]
fn what_is_behind_a_product_is_made_by_blocks() {
    for threads in [1, 2] {
        let cpu = Cpu::poisoned().with_threads(NonZeroUsize::new(threads).unwrap());
        for (sizes, gap) in
            [((5, 20, 40), 0), ((9, 1, 33), 2), ((30, 400, 1000), 0), ((600, 40, 400), 3), ((20, 0, 5), 0)]
        {
            behind_a_product::<f64>(&cpu, sizes, gap);
            behind_a_product::<f32>(&cpu, sizes, gap);
            behind_a_product::<bf16>(&cpu, sizes, gap);
        }
    }
    let cpu = Cpu::new();
    let (x, mut y) =
        (Tensor::<f32>::zeros(&cpu, [20, 20]).unwrap(), Tensor::<f32>::zeros(&cpu, [20, 20]).unwrap());
    let epilogue = Epilogue { bias: Some(&x.slice()[..19]), activation: None };
    let short = cpu.linear(x.mat(), x.mat(), epilogue, y.mat_mut().unwrap());
    disagree(short, "bias: the bias is 19, but the number of columns is 20");
    let mut small = Tensor::<f32>::zeros(&cpu, [19, 20]).unwrap();
    let (bias, f) = (Some(&x.slice()[..20]), Activation::Relu);
    let epilogue = Epilogue { bias, activation: Some((f, y.mat_mut().unwrap())) };
    let rows = cpu.linear(x.mat(), x.mat(), epilogue, small.mat_mut().unwrap());
    disagree(rows, "activation: rows of pre is 20, but rows of y is 19");
    let rows = cpu.linear_dx(x.mat(), x.mat(), Some((f, small.mat())), y.mat_mut().unwrap());
    disagree(rows, "activation backward: rows of pre is 19, but rows of dx is 20");
}

#[test]
fn gemm_carries_nan_and_infinity() {
    let product = Product {
        a: array![[0.0, 1.0], [f64::INFINITY, 1.0]],
        b: array![[f64::NAN, 1.0, 0.0], [1.0, 2.0, 3.0]],
        ..Product::random(1, (2, 2, 3))
    };
    let inf = f64::INFINITY;
    let want = array![[f64::NAN, 2.0, 3.0], [f64::NAN, inf, f64::NAN]];
    let cpu = Cpu::poisoned();
    for got in [
        product.compute::<f64, f64>(&cpu),
        product.compute::<f32, f32>(&cpu),
        product.compute::<f16, f16>(&cpu),
    ] {
        within("product", &got, &want, &Array2::zeros((2, 3)));
    }
}

#[test]
fn gemm_names_the_sizes_that_disagree() {
    let cpu = Cpu::new();
    let memory = [1.0_f32; 64];
    let mat = |rows, cols| MatRef::<f32, Cpu>::new(&memory, rows, cols).unwrap();
    let gemm = |batch, a, b, (rows, cols)| {
        let mut c = [0.0_f32; 12];
        cpu.gemm_batched(batch, 1.0, a, b, 0.0, MatMut::<f32, Cpu>::new(&mut c, rows, cols).unwrap())
    };
    let one = Batch::ONE;
    disagree(gemm(one, mat(2, 3), mat(4, 5), (2, 5)), "gemm: columns of A is 3, but rows of B is 4");
    disagree(gemm(one, mat(2, 3), mat(3, 5), (1, 5)), "gemm: rows of A is 2, but rows of C is 1");
    disagree(gemm(one, mat(2, 3), mat(3, 5), (2, 6)), "gemm: columns of B is 5, but columns of C is 6");
    let batch = |count, a, b, c| gemm(Batch { count, a, b, c }, mat(2, 3), mat(3, 2), (2, 2));
    disagree(batch(4, 20, 0, 2), "gemm: the extent of 4 matrices A is 66, but the memory behind them is 64");
    disagree(batch(3, 0, 30, 2), "gemm: the extent of 3 matrices B is 66, but the memory behind them is 64");
    disagree(batch(4, 0, 0, 3), "gemm: the extent of 4 matrices C is 13, but the memory behind them is 12");
    assert_eq!(batch(0, 1000, 1000, 1000), Ok(()), "a batch of no products reads no memory");
    // 2^33 strides of 2^31 wrap to 0 in 64 bits.
    let error = batch((1 << 33) + 1, 1 << 31, 0, 1 << 31).unwrap_err();
    assert!(error.to_string().contains(&usize::MAX.to_string()), "{error}");
}

// Views.

#[test]
fn views_stay_inside_their_memory() {
    let mut memory = [0.0_f32; 12];
    let view = |rows, cols, row, col| MatRef::<f32, Cpu>::strided(&memory, rows, cols, row, col).map(|_| ());
    assert_eq!(view(3, 4, 4, 1), Ok(()));
    assert_eq!(view(4, 3, 1, 4), Ok(()));
    assert_eq!(view(3, 4, 0, 0), Ok(()));
    assert_eq!(view(9, 0, 100, 100), Ok(()));
    assert_eq!(view(1, 1, usize::MAX, usize::MAX), Ok(()));
    disagree(
        view(3, 4, 4, 2),
        "matrix view: the extent of a 3 x 4 matrix with strides 4, 2 is 15, but the memory behind it is 12",
    );
    for (rows, cols, row, col) in [((1 << 33) + 1, 2, 1 << 31, 1), (2, 3, 1, 1 << 63), (2, 2, usize::MAX, 1)]
    {
        let error = view(rows, cols, row, col).unwrap_err();
        assert!(error.to_string().contains(&usize::MAX.to_string()), "{error}");
    }
    let mut view_mut =
        |rows, cols, row, col| MatMut::<f32, Cpu>::strided(&mut memory, rows, cols, row, col).map(|_| ());
    for (rows, cols, row, col) in
        [(3, 4, 4, 1), (4, 3, 1, 4), (2, 3, 1, 2), (1, 4, 0, 3), (4, 1, 3, 0), (3, 0, 0, 0)]
    {
        assert_eq!(view_mut(rows, cols, row, col), Ok(()), "{rows} x {cols} by {row}, {col}");
    }
    for (rows, cols, row, col) in
        [(3, 4, 3, 1), (2, 2, 0, 1), (2, 2, 1, 0), (2, 3, 2, 1), (3, 1, 0, 1), (2, 2, 1, 1)]
    {
        let message =
            format!("matrix view: elements of a {rows} x {cols} matrix with strides {row}, {col} overlap");
        invalid(view_mut(rows, cols, row, col), &message);
    }
}

#[test]
fn a_block_without_columns_is_empty() {
    let cpu = Cpu::poisoned();
    let (x, mut y) =
        (Tensor::<f32>::zeros(&cpu, [3, 4]).unwrap(), Tensor::<f32>::zeros(&cpu, [3, 4]).unwrap());
    for at in [0, 2, 4] {
        let none = x.mat().columns(at..at);
        assert_eq!((none.rows(), none.cols()), (3, 0));
        cpu.add(none, none, y.mat_mut().unwrap().columns(at..at)).unwrap();
        cpu.gemm(1.0, none, none.t(), 0.0, y.mat_mut().unwrap().block(0..3, 0..3)).unwrap();
    }
    assert_eq!(x.mat().block(3..3, 1..2).rows(), 0);
}

#[test]
#[should_panic(expected = "block 0..3 x 2..5 of a 3 x 4 matrix")]
fn a_block_beyond_the_matrix_panics() {
    let x = Tensor::<f32>::zeros(&Cpu::new(), [3, 4]).unwrap();
    let _ = x.mat().columns(2..5);
}

// Elementwise operators.

/// Numbers of all magnitudes, and special values.
fn inputs(seed: u64) -> Array2<f64> {
    let mut x = matrix(seed, "x", 5, 19).mapv(|x| x * 4.0);
    let special = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -0.0,
        800.0,
        -800.0,
        1e-4,
        -1e-4,
        2e3,
        -2e3,
        40.0,
        -40.0,
    ];
    x.iter_mut().skip(7).step_by(3).zip(special).for_each(|(x, special)| *x = special);
    x
}

/// Bounds of f and f′ in units of the accumulator type's ε. In f64 they are 0.
///
/// e^x errs by 2 ε, tanh by 3 ε and erf by 2 ε (see the functions' own tests). A sigmoid then errs
/// by 3.5 ε relative to itself. Φ, and (1 + tanh)/2, err by at most 2.5 ε: half the function's
/// error, plus |t f′(t)| ≤ 1/2 for each of the two to four roundings of the argument t. So f errs
/// by 4 ε |x|. In f′, x times the derivative of the inner function multiplies a difference of such
/// terms. This derivative is less than 1 + x²/8, so f′ errs by 8 ε (1 + |x|)(1 + x²/8).
fn activation_bounds<T: Element>(x: &Array2<f64>) -> [Array2<f64>; 2] {
    let epsilon = if T::DTYPE == DType::F64 { 0.0 } else { T::Acc::EPSILON };
    let finite = x.mapv(|x| if x.is_finite() { x.abs() } else { 0.0 });
    [
        finite.mapv(|x| 4.0 * epsilon * x),
        finite.mapv(|x| 8.0 * epsilon * (1.0 + x) * (1.0 + x.min(10.0).powi(2) / 8.0)),
    ]
}

/// The bound of a result: `error`, which it has in the accumulator type, plus the error of rounding
/// it to T.
fn rounding<T: Element>(want: &Array2<f64>, error: Array2<f64>) -> Array2<f64> {
    match T::DTYPE {
        DType::F64 => want.mapv(|want| EXACT * (1.0 + want.abs())),
        _ => {
            error
                + want.mapv(|want| if want.is_finite() { want.abs() } else { 0.0 }) * unit::<T>().0
                + UNDERFLOW
        }
    }
}

fn activations<T: Element>(seed: u64) {
    let cpu = Cpu::poisoned();
    let x = rounded::<T, _>(inputs(seed));
    let (up, dy) = (matrix(seed, "up", 5, 19), matrix(seed, "dy", 5, 19));
    let (up, dy) = (rounded::<T, _>(up), rounded::<T, _>(dy));
    let [value, slope] = activation_bounds::<T>(&x);
    let v = unit::<T>().1;
    for (f, reference) in ACTIVATIONS {
        let what = |name| format!("{name} of {f:?} in {}", T::DTYPE);
        let y = reference.apply(&x);
        let got = ops::activate::<T, _>(f, &tensor(&cpu, &x)).unwrap();
        within(what("y"), &wide(&got), &y, &rounding::<T>(&y, value.clone()));
        let dx = reference.backward(&x, &dy);
        let got = ops::activate_backward::<T, _>(f, &tensor(&cpu, &x), &tensor(&cpu, &dy)).unwrap();
        within(what("dx"), &wide(&got), &dx, &rounding::<T>(&dx, &slope * &dy.mapv(f64::abs)));

        // The gate and its factor are concatenated, and so are their gradients. Each result takes
        // one or two more products.
        let both = tensor(&cpu, &concatenate![Axis(1), x, up]);
        let more =
            |want: &Array2<f64>| want.mapv(|want| if want.is_finite() { 2.0 * v * want.abs() } else { 0.0 });
        let want = &y * &up;
        let bound = rounding::<T>(&want, &value * &up.mapv(f64::abs) + more(&want));
        within(what("gate"), &wide(&ops::gate::<T, _>(f, &both).unwrap()), &want, &bound);
        let got = wide2(&ops::gate_backward::<T, _>(f, &both, &tensor(&cpu, &dy)).unwrap());
        let (dgate, dup) = got.view().split_at(Axis(1), 19);
        let want = reference.backward(&x, &(&dy * &up));
        let bound = rounding::<T>(&want, &slope * &(&dy * &up).mapv(f64::abs) + more(&want));
        within(what("dgate"), &dgate.to_owned().into_dyn(), &want, &bound);
        let want = &dy * &y;
        let bound = rounding::<T>(&want, &value * &dy.mapv(f64::abs) + more(&want));
        within(what("dup"), &dup.to_owned().into_dyn(), &want, &bound);
    }
}

#[test]
fn activations_and_gates_agree_with_the_reference() {
    for seed in 0..16 {
        activations::<f64>(seed);
        activations::<f32>(seed);
        activations::<bf16>(seed);
        activations::<f16>(seed);
    }
}

/// Activations agree with the reference also for gradients that are NaN or ∞.
#[test]
fn activations_pass_nonfinite_gradients_as_the_reference_does() {
    let cpu = Cpu::poisoned();
    let (x, dy): (Vec<f64>, Vec<f64>) = [-800.0, -1.0, -0.0, 0.0, 1.0, 800.0, f64::NAN]
        .into_iter()
        .flat_map(|x| [1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|dy| (x, dy)))
        .unzip();
    let (x, dy) = (Array1::from(x).insert_axis(Axis(0)), Array1::from(dy).insert_axis(Axis(0)));
    let same = |what: (Activation, DType), got: ArrayD<f64>, want: &Array2<f64>| {
        within(what, &got, want, &Array2::from_elem(want.dim(), 1e-6));
    };
    for (f, reference) in ACTIVATIONS {
        let want = reference.backward(&x, &dy);
        let (x64, dy64) = (tensor::<f64, _>(&cpu, &x), tensor::<f64, _>(&cpu, &dy));
        same((f, DType::F64), wide(&ops::activate_backward(f, &x64, &dy64).unwrap()), &want);
        let (x32, dy32) = (tensor::<f32, _>(&cpu, &x), tensor::<f32, _>(&cpu, &dy));
        same((f, DType::F32), wide(&ops::activate_backward(f, &x32, &dy32).unwrap()), &want);
        let both = tensor::<f32, _>(&cpu, &concatenate![Axis(1), x, Array2::ones(x.dim())]);
        let got = wide2(&ops::gate_backward(f, &both, &dy32).unwrap());
        same((f, DType::F32), got.slice(s![.., ..x.ncols()]).to_owned().into_dyn(), &want);
    }
}

/// The square of a large f32 overflows, but its activation and slope must not.
#[test]
fn activations_of_large_numbers_are_linear() {
    let cpu = Cpu::poisoned();
    let (x, ones) = (array![[-3e38, -1e20, 1e20, 3e38]], Array2::ones((1, 4)));
    let (x, dy) = (tensor::<f32, _>(&cpu, &x), tensor::<f32, _>(&cpu, &ones));
    for (f, _) in ACTIVATIONS {
        assert_eq!(ops::activate(f, &x).unwrap().slice(), [0.0, 0.0, 1e20, 3e38], "{f:?}");
        assert_eq!(ops::activate_backward(f, &x, &dy).unwrap().slice(), [0.0, 0.0, 1.0, 1.0], "{f:?}");
    }
}

/// Checks that y ← y + x is computed in the accumulator type and rounded once.
fn accumulate<T: Element, Y: Element<Acc = T::Acc>>() {
    let cpu = Cpu::poisoned();
    let (x, y) = (tensor::<T, _>(&cpu, &inputs(1)), tensor::<Y, _>(&cpu, &inputs(2)));
    let want: Vec<_> =
        x.slice().iter().zip(y.slice()).map(|(x, y)| Y::narrow(y.widen() + x.widen())).collect();
    let mut sum = y.clone();
    cpu.accumulate(x.mat(), sum.mat_mut().unwrap()).unwrap();
    assert_eq!(bits(sum.slice()), bits(&want), "{} to {}", T::DTYPE, Y::DTYPE);
}

/// A sum of two tensors is computed in the accumulator type and rounded once. Column sums err by at
/// most (rows) v Σ|x|.
fn sums<T: Element>() {
    let cpu = Cpu::poisoned();
    let (a, b) = (tensor::<T, _>(&cpu, &inputs(1)), tensor::<T, _>(&cpu, &inputs(2)));
    let add = |(a, b): (&T, &T)| T::narrow(a.widen() + b.widen());
    let want: Vec<_> = a.slice().iter().zip(b.slice()).map(add).collect();
    // The sum reuses x's memory if no other tensor shares it.
    for x in [a.clone(), tensor(&cpu, &inputs(1))] {
        assert_eq!(bits(ops::add(x, &b).unwrap().slice()), bits(&want));
    }

    let bias = tensor::<T, _>(&cpu, &random(3, "bias", &[19]));
    let want: Vec<_> = a.slice().chunks(19).flat_map(|row| row.iter().zip(bias.slice()).map(add)).collect();
    let mut y = a.clone();
    cpu.add_bias::<T>(bias.slice(), y.mat_mut().unwrap()).unwrap();
    assert_eq!(bits(y.slice()), bits(&want));

    let x = rounded::<T, _>(matrix(4, "x", 23, 6));
    let bound = x.mapv(f64::abs).sum_axis(Axis(0)) * (23.0 * unit::<T>().1);
    within(
        T::DTYPE,
        &wide(&ops::bias_grad::<T, _>(&cpu, tensor(&cpu, &x).mat()).unwrap()),
        &x.sum_axis(Axis(0)),
        &bound,
    );
    let none = ops::bias_grad(&cpu, Tensor::<T>::empty(&cpu, [0, 3]).unwrap().mat()).unwrap();
    assert_eq!(wide(&none), Array1::<f64>::zeros(3).into_dyn());
}

#[test]
fn sums_are_rounded_once() {
    sums::<f64>();
    sums::<f32>();
    sums::<bf16>();
    sums::<f16>();
    accumulate::<f64, f64>();
    accumulate::<f32, f32>();
    accumulate::<bf16, f32>();
    accumulate::<f32, bf16>();
    accumulate::<f16, f32>();
    accumulate::<f32, f16>();
    accumulate::<bf16, f16>();
    accumulate::<f16, f16>();
}

fn converts<T: Element, Y: Element>() {
    let x = tensor::<T, _>(&Cpu::poisoned(), &inputs(1));
    let want: Vec<_> = x.slice().iter().map(|x| Y::from_f64(x.to_f64())).collect();
    assert_eq!(bits(x.convert::<Y>().unwrap().slice()), bits(&want), "{} to {}", T::DTYPE, Y::DTYPE);
}

#[test]
fn conversion_between_all_elements() {
    fn to_all<T: Element>() {
        converts::<T, f64>();
        converts::<T, f32>();
        converts::<T, bf16>();
        converts::<T, f16>();
    }
    to_all::<f64>();
    to_all::<f32>();
    to_all::<bf16>();
    to_all::<f16>();
}

/// Conversion rounds to nearest, ties to even. Rounding through f32 first would create ties that do
/// not exist.
#[test]
fn conversion_rounds_once() {
    let cpu = Cpu::poisoned();
    // The values lie just below halfway from 1 to the next number, at halfway, just above halfway,
    // and halfway to an even number.
    let ties =
        |ulp: f64| array![1.0 + ulp / 2.0 - 1e-12, 1.0 + ulp / 2.0, 1.0 + ulp / 2.0 + 1e-12, 1.0 + 1.5 * ulp];
    let want = |ulp: f64| array![1.0, 1.0, 1.0 + ulp, 1.0 + 2.0 * ulp].into_dyn();
    for sign in [1.0, -1.0] {
        let x = |ulp| tensor::<f64, _>(&cpu, &(ties(ulp) * sign));
        assert_eq!(wide(&x(f32::EPSILON.into()).convert::<f32>().unwrap()), want(f32::EPSILON.into()) * sign);
        assert_eq!(
            wide(&x(bf16::EPSILON.to_f64()).convert::<bf16>().unwrap()),
            want(bf16::EPSILON.to_f64()) * sign
        );
        assert_eq!(
            wide(&x(f16::EPSILON.to_f64()).convert::<f16>().unwrap()),
            want(f16::EPSILON.to_f64()) * sign
        );
    }
    // The values are halfway from 0 to the smallest number, slightly above halfway, subnormal, just
    // below and at halfway from the largest finite number to ∞, and beyond.
    let x = tensor::<f64, _>(&cpu, &array![2.0_f64.powi(-25), 3e-8, 6e-5, 65519.9, 65520.0, 1e300]);
    let [tiny, subnormal] = [2.0_f64.powi(-24), 1007.0 * 2.0_f64.powi(-24)];
    let inf = f64::INFINITY;
    assert_eq!(
        wide(&x.convert::<f16>().unwrap()),
        array![0.0, tiny, subnormal, 65504.0, inf, inf].into_dyn()
    );
    let x = tensor::<f64, _>(&cpu, &array![1e-300, -1e-300, 3.39e38, 3.4e38, f64::NEG_INFINITY]);
    let largest = bf16::MAX.to_f64();
    assert_eq!(wide(&x.convert::<bf16>().unwrap()), array![0.0, 0.0, largest, inf, -inf].into_dyn());
}

/// Kernels write their rows and nothing between them.
#[test]
fn rows_of_a_wider_matrix() {
    let cpu = Cpu::poisoned();
    let x = integers(1, "x", 3, 4);
    let (x_memory, strides) = (place::<f32>(&x, (7, 1)), (7, 1));
    let x_view = view(&x_memory, 3, 4, strides);
    let written = |want: Array2<f64>, write: &dyn Fn(MatMut<'_, f32, Cpu>) -> Result<()>| {
        let mut y = place::<f32>(&Array2::ones((3, 4)), strides);
        write(view_mut(&mut y, 3, 4, strides)).unwrap();
        assert_eq!(displace(&y, 3, 4, strides), want.into_dyn());
    };
    written(Array2::from_elem((3, 4), -1.5), &|y| cpu.fill(-1.5, y));
    written(x.clone(), &|y| cpu.copy(x_view, y));
    written(&x * 2.0, &|y| cpu.add(x_view, x_view, y));
    written(&x + 1.0, &|y| cpu.accumulate(x_view, y));
    written(x.mapv(|x| x.max(0.0)), &|y| cpu.activate(Activation::Relu, x_view, y));
    written(Array2::from_elem((3, 4), 3.0), &|y| cpu.add_bias::<f32>(&[2.0; 4], y));
    let mut sums = [f32::NAN; 4];
    cpu.sum_rows(x_view, &mut sums).unwrap();
    assert_eq!(sums.map(f64::from).to_vec(), x.sum_axis(Axis(0)).to_vec());
}

#[test]
fn kernels_name_the_shapes_that_disagree() {
    let cpu = Cpu::new();
    let zeros = |rows, cols| Tensor::<f32>::zeros(&cpu, [rows, cols]).unwrap();
    let (x, wide) = (zeros(2, 4), zeros(2, 5));
    let row = |len| Tensor::<f32>::zeros(&cpu, [len]).unwrap();
    let relu = Activation::Relu;
    disagree(ops::add(x.clone(), &wide), "add: a has shape [2, 4], but b has shape [2, 5]");
    disagree(
        ops::activate_backward(relu, &x, &wide),
        "activation backward: x has shape [2, 4], but dy has shape [2, 5]",
    );
    invalid(ops::gate(relu, &wide), "gate: [gate | up] has an odd number of columns, 5");
    disagree(
        ops::gate_backward(relu, &x, &x),
        "gate backward: dy has shape [2, 4], but gate has shape [2, 2]",
    );
    disagree(
        cpu.activate(relu, x.mat(), zeros(3, 4).mat_mut().unwrap()),
        "activation: x has shape [2, 4], but y has shape [3, 4]",
    );
    disagree(
        cpu.accumulate(x.mat(), zeros(3, 4).mat_mut().unwrap()),
        "accumulate: x has shape [2, 4], but y has shape [3, 4]",
    );
    disagree(
        cpu.copy(x.mat(), zeros(3, 4).mat_mut().unwrap()),
        "copy: x has shape [2, 4], but y has shape [3, 4]",
    );
    disagree(
        cpu.add_bias(row(5).slice(), zeros(2, 4).mat_mut().unwrap()),
        "bias: the bias is 5, but the number of columns is 4",
    );
    disagree(
        cpu.sum_rows(x.mat(), row(3).slice_mut().unwrap()),
        "bias gradient: the gradient is 3, but the number of columns is 4",
    );
    disagree(ops::linear(&x, &wide, None, None), "linear: columns of x is 4, but columns of w is 5");
    disagree(ops::linear(&x, &x, Some(&row(3)), None), "bias: the bias is 3, but the number of columns is 2");
    disagree(ops::linear_dx(&wide, &x, None), "linear backward: columns of dy is 5, but rows of w is 2");
    disagree(
        ops::linear_dw(&cpu, (x.mat(), zeros(3, 4).mat()), 0.0, zeros(4, 4).mat_mut().unwrap(), None),
        "gemm: columns of A is 2, but rows of B is 3",
    );
    let kind = NormKind::LayerNorm { eps: 1e-5 };
    disagree(ops::normalize(kind, &x, &row(3), None), "norm: gamma is 3, but the number of columns is 4");
    disagree(
        ops::normalize(kind, &x, &row(4), Some(&row(3))),
        "norm: beta is 3, but the number of columns is 4",
    );
    let (_, context) = ops::normalize(kind, &x, &row(4), None).unwrap();
    disagree(
        ops::normalize_backward(kind, &context, &row(4), &wide),
        "norm backward: x has shape [2, 4], but dy has shape [2, 5]",
    );
    disagree(
        cpu.normalize(kind, x.mat(), row(4).slice(), None, zeros(2, 4).mat_mut().unwrap(), &mut [0.0; 2]),
        "norm: the statistics is 2, but twice the number of rows is 4",
    );
}

/// Rows are slices, so a kernel that reads rows requires adjacent columns.
#[test]
fn kernels_of_rows_take_no_column_stride() {
    let cpu = Cpu::new();
    let x = Tensor::<f32>::zeros(&cpu, [4, 4]).unwrap();
    let mut memory = x.clone();
    let (m, t) = (x.mat(), x.mat().t());
    let column = |memory: &'static str| format!("{memory}: needs matrices with column stride 1, not 4");
    let relu = Activation::Relu;
    invalid(cpu.activate(relu, t, memory.mat_mut().unwrap()), &column("activation"));
    invalid(cpu.activate_backward(relu, m, t, memory.mat_mut().unwrap()), &column("activation backward"));
    invalid(cpu.gate(relu, m, t, memory.mat_mut().unwrap()), &column("gate"));
    for at in 0..3 {
        let [gate, up, dy] =
            std::array::from_fn(|input| if input == at { t.block(0..4, 0..2) } else { m.columns(0..2) });
        invalid(cpu.gate_backward(relu, gate, up, dy, memory.mat_mut().unwrap()), &column("gate backward"));
    }
    invalid(cpu.add(m, t, memory.mat_mut().unwrap()), &column("add"));
    invalid(cpu.accumulate(t, memory.mat_mut().unwrap()), &column("accumulate"));
    invalid(cpu.copy(t, memory.mat_mut().unwrap()), &column("copy"));
    invalid(cpu.sum_rows(t, &mut [0.0; 4]), &column("bias gradient"));
    let kind = NormKind::RmsNorm { eps: 0.0 };
    invalid(
        cpu.normalize(kind, t, &[1.0; 4], None, memory.mat_mut().unwrap(), &mut [0.0; 8]),
        &column("norm"),
    );
    invalid(cpu.gather(t, &[0; 4], memory.mat_mut().unwrap()), &column("gather"));
    invalid(cpu.scatter_add(&[0; 4], t, memory.mat_mut().unwrap()), &column("scatter_add"));
}

// Linear layers, embeddings.

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn linear_agrees_with_the_reference(rows in 0..7usize, inputs in 0..7usize, outputs in 1..7usize, seed: u64) {
        let cpu = Cpu::poisoned();
        let (x, w, dy) = (matrix(seed, "x", rows, inputs), matrix(seed, "w", outputs, inputs), matrix(seed, "dy", rows, outputs));
        let b: Array1<f64> = random(seed, "b", &[outputs]).into_dimensionality().unwrap();
        let [tx, tw, tdy] = [&x, &w, &dy].map(|x| tensor::<f64, _>(&cpu, x));
        let (biased, _) = ops::linear(&tx, &tw, Some(&tensor(&cpu, &b)), None).unwrap();
        close("y + b", &wide(&biased), &reference::linear(&x, &w, Some(&b)), EXACT);
        let (y, _) = ops::linear(&tx, &tw, None, None).unwrap();
        close("y", &wide(&y), &reference::linear(&x, &w, None), EXACT);
        let want = reference::linear_backward(&x, &w, &dy);
        close("dx", &wide(&ops::linear_dx(&tdy, &tw, None).unwrap()), &want.dx, EXACT);
        let mut dw = Tensor::<f64>::empty(&cpu, [outputs, inputs]).unwrap();
        ops::linear_dw(&cpu, (tdy.mat(), tx.mat()), 0.0, dw.mat_mut().unwrap(), None).unwrap();
        close("dw", &wide(&dw), &want.dw, EXACT);
        close("db", &wide(&ops::bias_grad(&cpu, tdy.mat()).unwrap()), &want.db, EXACT);
    }

    /// Repeated ids get the sum of their gradients. Copying is exact in every element type.
    #[test]
    fn embedding_agrees_with_the_reference(ids in prop::collection::vec(0..5_u32, 0..12), cols in 0..4usize, seed: u64) {
        embedding::<f64>(&ids, cols, seed);
        embedding::<f32>(&ids, cols, seed);
        embedding::<bf16>(&ids, cols, seed);
        embedding::<f16>(&ids, cols, seed);
    }
}

fn embedding<T: Element>(ids: &[u32], cols: usize, seed: u64) {
    let cpu = Cpu::poisoned();
    let (table, dy) = (matrix(seed, "table", 5, cols), integers(seed, "dy", ids.len(), cols));
    let table = rounded::<T, _>(table);
    let wanted: Vec<_> = ids.iter().map(|&id| id as usize).collect();
    let y = tensor::<T, _>(&cpu, &table).rows(ids).unwrap();
    assert_eq!(wide(&y), reference::embedding(&wanted, &table).into_dyn());
    let dtable = ops::scatter_rows(&cpu, ids, 5, tensor::<T, _>(&cpu, &dy).mat()).unwrap();
    assert_eq!(wide(&dtable), reference::embedding_backward(&wanted, 5, &dy).into_dyn());
    // The table's gradient accumulates: its earlier values are kept.
    let mut sum = dtable.clone();
    cpu.scatter_add(ids, tensor::<T, _>(&cpu, &dy).mat(), sum.mat_mut().unwrap()).unwrap();
    assert_eq!(wide(&sum), wide(&dtable) * 2.0);
}

#[test]
fn embedding_refuses_ids_beyond_the_table() {
    let cpu = Cpu::new();
    let (table, dy) =
        (Tensor::<f32>::zeros(&cpu, [5, 2]).unwrap(), Tensor::<f32>::zeros(&cpu, [3, 2]).unwrap());
    invalid(table.rows(&[0, 5, 1]), "gather: id 5 is beyond a table of 5 rows");
    invalid(
        ops::scatter_rows(&cpu, &[0, u32::MAX - 1, 1], 5, dy.mat()),
        "scatter_add: id 4294967294 is beyond a table of 5 rows",
    );
    // `NO_ROW` selects no row.
    let ones = Tensor::<f32>::full(&Cpu::poisoned(), [5, 2], 1.0).unwrap();
    let y = wide(&ones.rows(&[NO_ROW, 4, NO_ROW]).unwrap());
    assert_eq!(y, array![[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]].into_dyn());
    let dtable = wide(
        &ops::scatter_rows(
            &cpu,
            &[NO_ROW, 1, NO_ROW],
            2,
            Tensor::<f32>::full(&cpu, dy.shape(), 1.0).unwrap().mat(),
        )
        .unwrap(),
    );
    assert_eq!(dtable, array![[0.0, 0.0], [1.0, 1.0]].into_dyn());
    disagree(
        ops::scatter_rows(&cpu, &[0, 1], 5, dy.mat()),
        "scatter_add: the number of ids is 2, but the number of rows is 3",
    );
    disagree(
        cpu.gather(table.mat().columns(0..1), &[0, 1, 2], dy.clone().mat_mut().unwrap()),
        "gather: columns of the rows is 2, but columns of the table is 1",
    );
}

// Normalization.

fn norms<T: Element>(rows: usize, cols: usize, seed: u64) {
    let cpu = Cpu::poisoned();
    let eps = 0.01;
    let vector =
        |name| -> Array1<f64> { rounded::<T, _>(random(seed, name, &[cols]).into_dimensionality().unwrap()) };
    let (x, dy) = (
        rounded::<T, _>(matrix(seed, "x", rows, cols) + 0.5),
        rounded::<T, _>(matrix(seed, "dy", rows, cols)),
    );
    let (gamma, beta) = (vector("gamma"), vector("beta"));
    let absolute = |x: &Array2<f64>| x.mapv(f64::abs);
    // The mean of x errs by (n + 1) v max|x|, which x̂ multiplies by r = 1 / √(σ² + ε). The
    // variance errs by (n + 3) v relative to itself. The mean's error enters the variance squared,
    // because Σ (x − μ) is 0. With the errors of the root, the quotient and the products,
    // |δx̂| ≤ (n + 8) v (r max|x| + |x̂|).
    let per_term = (cols + 8) as f64 * unit::<T>().1;
    for kind in [NormKind::LayerNorm { eps }, NormKind::RmsNorm { eps }] {
        let norm = |gamma: Array1<f64>, beta: &Array1<f64>| {
            if kind.centers() {
                reference::Norm::LayerNorm { gamma, beta: beta.clone(), eps }
            } else {
                reference::Norm::RmsNorm { gamma, eps }
            }
        };
        let zeros = Array1::zeros(cols);
        let x_hat = norm(Array1::ones(cols), &zeros).apply(&x);
        let r = x.rows().into_iter().map(|x| {
            let mean = if kind.centers() { x.mean().unwrap_or(0.0) } else { 0.0 };
            1.0 / (x.mapv(|x| (x - mean).powi(2)).mean().unwrap_or(0.0) + eps).sqrt()
        });
        let r: Array2<f64> = Array1::from_iter(r).insert_axis(Axis(1));
        let largest = |x: &Array2<f64>| {
            x.map_axis(Axis(1), |x| x.fold(0.0_f64, |max, x| max.max(x.abs()))).insert_axis(Axis(1))
        };
        let x_hat_error = (&r * &largest(&x) + absolute(&x_hat)) * per_term;

        for beta in [Some(&beta).filter(|_| kind.centers()), None] {
            let want = norm(gamma.clone(), beta.unwrap_or(&zeros)).apply(&x);
            let error = &x_hat_error * &gamma.mapv(f64::abs) + absolute(&want) * (2.0 * unit::<T>().1);
            let beta = beta.map(|beta| tensor::<T, _>(&cpu, beta));
            let (y, _) =
                ops::normalize::<T, _>(kind, &tensor(&cpu, &x), &tensor(&cpu, &gamma), beta.as_ref())
                    .unwrap();
            within((kind, T::DTYPE), &wide(&y), &want, &rounding::<T>(&want, error));
        }

        // dx = r (g − mean g − x̂ mean(g x̂)). Let G = max|g| and X = max|x̂|. The two means err by
        // (n + 2) v G and (n + 2) v G X, and by x̂'s error times G. In dx, the first mean's error
        // is multiplied by 1, and the second's by X. The sum of all errors is at most
        // 3 (n + 8) v r G (1 + X + X²)(1 + r max|x|).
        let (dx, grads) = norm(gamma.clone(), &zeros).backward(&x, &dy);
        let (tx, tgamma) = (tensor::<T, _>(&cpu, &x), tensor::<T, _>(&cpu, &gamma));
        let (_, context) = ops::normalize(kind, &tx, &tgamma, None).unwrap();
        let got = ops::normalize_backward(kind, &context, &tgamma, &tensor(&cpu, &dy)).unwrap();
        let (g, big) = (largest(&(&dy * &gamma)), largest(&x_hat));
        let error = &r * &g * (1.0 + &big + &big * &big) * (1.0 + &r * &largest(&x)) * (3.0 * per_term);
        let error = error.broadcast(dx.dim()).unwrap().to_owned();
        within((kind, T::DTYPE, "dx"), &wide(&got.dx), &dx, &rounding::<T>(&dx, error));
        let of_sum = |terms: Array2<f64>| match T::DTYPE {
            DType::F64 => terms.sum_axis(Axis(0)).mapv(|sum| EXACT * (1.0 + sum)),
            _ => terms.sum_axis(Axis(0)),
        };
        let own = if T::DTYPE == DType::F64 { 1.0 } else { (rows + 1) as f64 * unit::<T>().1 };
        let dgamma_error = of_sum(absolute(&dy) * &x_hat_error + absolute(&(&dy * &x_hat)) * own);
        let (dgamma, dbeta) = match grads {
            reference::Norm::LayerNorm { gamma, beta, .. } => (gamma, Some(beta)),
            reference::Norm::RmsNorm { gamma, .. } => (gamma, None),
        };
        within((kind, T::DTYPE, "dγ"), &wide(&got.dgamma), &dgamma, &dgamma_error);
        assert_eq!(got.dbeta.is_some(), dbeta.is_some());
        if let (Some(got), Some(want)) = (got.dbeta, dbeta) {
            within((kind, T::DTYPE, "dβ"), &wide(&got), &want, &of_sum(absolute(&dy) * own));
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn norms_agree_with_the_reference(rows in 0..6usize, cols in 1..50usize, seed: u64) {
        norms::<f64>(rows, cols, seed);
        norms::<f32>(rows, cols, seed);
        norms::<bf16>(rows, cols, seed);
        norms::<f16>(rows, cols, seed);
    }
}

#[test]
fn norm_keeps_nan_in_its_row_and_does_not_cancel() {
    let cpu = Cpu::poisoned();
    let ones = tensor::<f32, _>(&cpu, &array![1.0, 1.0]);
    let large = f64::from(1 << 23);
    let x = array![[f64::NAN, 1.0], [large - 1.0, large + 1.0], [f64::INFINITY, 1.0], [3.0, 1.0]];
    let kind = NormKind::LayerNorm { eps: 0.0 };
    let (y, context) = ops::normalize(kind, &tensor(&cpu, &x), &ones, None).unwrap();
    let want = reference::layer_norm(&x, &array![1.0, 1.0], &array![0.0, 0.0], 0.0);
    assert_eq!((want[[1, 0]], want[[1, 1]]), (-1.0, 1.0));
    within("y", &wide(&y), &want, &Array2::zeros((4, 2)));
    let dy = array![[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [f64::NAN, 2.0]];
    let got = ops::normalize_backward(kind, &context, &ones, &tensor(&cpu, &dy)).unwrap();
    let want = reference::layer_norm_backward(&x, &array![1.0, 1.0], 0.0, &dy);
    within("dx", &wide(&got.dx), &want.dx, &Array2::from_elem((4, 2), 1e-6));
}

// Attention.

/// The heads and options of an attention. [`Sequences`] has the other sizes.
#[derive(Clone, Debug)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    causal: bool,
    window: Option<usize>,
}

impl Heads {
    fn of_operator(&self) -> QkvHeads {
        QkvHeads {
            kv_of_query: (0..self.heads).map(|head| head * self.kv_heads / self.heads).collect(),
            kv_heads: self.kv_heads,
            head_dim: self.dim,
            choices: AttentionChoices { causal: self.causal, window: self.window, scale: Some(0.6) },
        }
    }

    fn of_reference(&self) -> reference::AttentionSpec {
        let Self { heads, kv_heads, dim: head_dim, causal, window } = *self;
        reference::AttentionSpec { heads, kv_heads, head_dim, causal, window, scale: 0.6 }
    }

    /// Returns `[q | k | v]` and the gradient of the output.
    fn inputs(&self, seed: u64, rows: usize) -> (Array2<f64>, Array2<f64>) {
        let (query, kv) = (self.heads * self.dim, self.kv_heads * self.dim);
        (matrix(seed, "qkv", rows, query + 2 * kv), matrix(seed, "dout", rows, query))
    }

    /// Splits `[q | k | v]` into q, k and v.
    fn split(&self, qkv: &Array2<f64>) -> [Array2<f64>; 3] {
        let (query, kv) = (self.heads * self.dim, self.kv_heads * self.dim);
        let columns = |start, width| qkv.slice(s![.., start..start + width]).to_owned();
        [columns(0, query), columns(query, kv), columns(query + kv, kv)]
    }
}

/// The output and the gradient of `[q | k | v]`.
type Outcome = (Array2<f64>, Array2<f64>);

fn attend<T: Element>(
    heads: &QkvHeads,
    qkv: &Array2<f64>,
    dout: &Array2<f64>,
    sequences: &Sequences,
) -> Outcome {
    let cpu = Cpu::poisoned();
    let (out, context) = ops::attention::<T, _>(heads, &tensor(&cpu, qkv), sequences).unwrap();
    let dqkv = ops::attention_backward(heads, &context, &tensor(&cpu, dout)).unwrap();
    (wide2(&out), wide2(&dqkv))
}

fn attend_reference(heads: &Heads, qkv: &Array2<f64>, dout: &Array2<f64>, sequences: &Sequences) -> Outcome {
    let [q, k, v] = heads.split(qkv);
    let (spec, ranges, valid) =
        (heads.of_reference(), sequences.iter().collect::<Vec<_>>(), sequences.valid());
    let grads = reference::attention_backward(&spec, &q, &k, &v, &ranges, valid, dout);
    let dqkv = concatenate![Axis(1), grads.dq, grads.dk, grads.dv];
    (reference::attention(&spec, &q, &k, &v, &ranges, valid), dqkv)
}

/// Compares f64 with the reference. Rows that see no key must be exactly 0.
fn attention_agrees(heads: &Heads, sequences: &Sequences, seed: u64) {
    let (qkv, dout) = heads.inputs(seed, sequences.rows());
    let (want, want_grad) = attend_reference(heads, &qkv, &dout, sequences);
    let (got, got_grad) = attend::<f64>(&heads.of_operator(), &qkv, &dout, sequences);
    close("out", &got.clone().into_dyn(), &want, EXACT);
    close("dqkv", &got_grad.into_dyn(), &want_grad, EXACT);
    for sequence in sequences.iter() {
        for row in sequence.clone() {
            let end = if heads.causal { row + 1 } else { sequence.end };
            let start = heads.window.map_or(0, |window| (row + 1).saturating_sub(window)).max(sequence.start);
            if sequences.valid().is_some_and(|valid| !valid[start..end].contains(&true)) {
                assert!(got.row(row).iter().all(|&out| out == 0.0), "row {row} sees no key");
            }
        }
    }
}

/// Returns bounds of the errors of the output and of the gradient. They are sums like those of
/// attention itself, but over absolute values.
///
/// A score errs by (d + 2) v Σ|q k|. Its weight p then errs relative to itself by
/// t = v (2 (d + 2) S + n + 14 + 4 S). S is the largest value of scale · Σ|q k|, and
/// n = rows · heads is at least the number of terms of any sum. t adds the errors of the score, of
/// the maximum or log-sum-exp, and of the softmax. Then |δo| ≤ (t + n v) Σ p|v| + u|o|.
///
/// Let D = Σ|dO O|. The score's gradient ds = p (dp − D) errs by
/// b = p (t + 4 v + (d + 2) v)(Σ|dO v| + D), and by u p D, because O was rounded. The sums over
/// keys (dq) and queries (dk, dv) multiply b with |k| or |q| and p t with |dO|. To this each sum
/// adds n v times the sum of its terms' absolute values, and one rounding of the result.
fn attention_bounds<T: Element>(
    heads: &Heads,
    qkv: &Array2<f64>,
    dout: &Array2<f64>,
    sequences: &Sequences,
) -> Outcome {
    let [q, k, v] = heads.split(qkv);
    let (out, grad) = attend_reference(heads, qkv, dout, sequences);
    let ((u, w), dim) = (unit::<T>(), heads.dim);
    let mut out_bound = out.mapv(|out| u * out.abs() + UNDERFLOW);
    let mut grad_bound = grad.mapv(|grad| u * grad.abs() + UNDERFLOW);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let absolute = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x * y).abs()).sum::<f64>();
    for rows in sequences.iter() {
        for (row, head) in rows.clone().flat_map(|row| (0..heads.heads).map(move |head| (row, head))) {
            let kv = head * heads.kv_heads / heads.heads;
            let of = |x: &Array2<f64>, row: usize, head: usize| {
                x.slice(s![row, head * dim..(head + 1) * dim]).to_vec()
            };
            let (qi, oi, di) = (of(&q, row, head), of(&out, row, head), of(dout, row, head));
            let seen = |&key: &usize| {
                let near = heads.window.is_none_or(|window| row < key + window);
                near && (key <= row || !heads.causal) && sequences.valid().is_none_or(|valid| valid[key])
            };
            let keys: Vec<_> = rows.clone().filter(seen).collect();
            let n = rows.len() as f64 * heads.heads as f64;
            let scores: Vec<_> = keys.iter().map(|&key| 0.6 * dot(&qi, &of(&k, key, kv))).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
            let size = keys.iter().map(|&key| 0.6 * absolute(&qi, &of(&k, key, kv))).fold(0.0, f64::max);
            let t = w * (2.0 * (dim + 2) as f64 * size + n + 14.0 + 4.0 * size);
            let d = absolute(&di, &oi);
            for (&key, score) in keys.iter().zip(&scores) {
                let (kj, vj, p) = (of(&k, key, kv), of(&v, key, kv), (score - largest).exp() / sum);
                let dp = absolute(&di, &vj);
                let b = p * ((t + (dim + 6) as f64 * w + n * w) * (dp + d) + u * d);
                for at in 0..dim {
                    out_bound[[row, head * dim + at]] += (t + n * w) * p * vj[at].abs();
                    grad_bound[[row, head * dim + at]] += 0.6 * b * kj[at].abs();
                    grad_bound[[key, (heads.heads + kv) * dim + at]] += 0.6 * b * qi[at].abs();
                    grad_bound[[key, (heads.heads + heads.kv_heads + kv) * dim + at]] +=
                        p * (t + n * w) * di[at].abs();
                }
            }
        }
    }
    (out_bound, grad_bound)
}

fn attention_is_near<T: Element>(heads: &Heads, sequences: &Sequences, seed: u64) {
    let (qkv, dout) = heads.inputs(seed, sequences.rows());
    let (qkv, dout) = (rounded::<T, _>(qkv), rounded::<T, _>(dout));
    let (want, want_grad) = attend_reference(heads, &qkv, &dout, sequences);
    let (bound, grad_bound) = attention_bounds::<T>(heads, &qkv, &dout, sequences);
    let (got, got_grad) = attend::<T>(&heads.of_operator(), &qkv, &dout, sequences);
    within((T::DTYPE, heads, "out"), &got.into_dyn(), &want, &bound);
    within((T::DTYPE, heads, "dqkv"), &got_grad.into_dyn(), &want_grad, &grad_bound);
}

fn any_heads() -> impl Strategy<Value = Heads> {
    let groups = prop::sample::select(vec![(1, 1), (4, 4), (4, 2), (3, 1)]);
    let window = prop::option::weighted(0.3, 1..6usize);
    (groups, 1..6usize, any::<bool>(), window).prop_map(|((heads, kv_heads), dim, causal, window)| Heads {
        heads,
        kv_heads,
        dim,
        causal,
        window: window.filter(|_| causal),
    })
}

/// Packed sequences, some of them empty, and masks that leave some of the sequences without a
/// single key.
fn any_sequences() -> impl Strategy<Value = Sequences> {
    let lengths = prop::collection::vec(0..9usize, 0..5);
    (lengths, prop::option::of(0.0..1.0), any::<u64>()).prop_map(|(lengths, share, seed)| {
        let sequences = Sequences::packed(lengths);
        let stream = Philox::stream(seed, 5);
        let keep = |share: f64| {
            (0..sequences.rows()).map(|row| stream.uniform(row as u64) < share).collect::<Vec<_>>()
        };
        match share {
            Some(share) => sequences.clone().masked(&keep(share)).unwrap(),
            None => sequences,
        }
    })
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn attention_agrees_with_the_reference(heads in any_heads(), sequences in any_sequences(), seed: u64) {
        attention_agrees(&heads, &sequences, seed);
        attention_is_near::<f32>(&heads, &sequences, seed);
        attention_is_near::<bf16>(&heads, &sequences, seed);
        attention_is_near::<f16>(&heads, &sequences, seed);
    }

    /// Masked values have no influence, even NaN and ∞. One number of q, k, v or dout is not
    /// finite. A result must be non-finite exactly where the reference's is.
    #[test]
    fn attention_hides_what_is_masked(
        heads in any_heads(), sequences in any_sequences(), column in 0.0..1.0, at in 0.0..1.0, in_dout: bool,
        special in prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY]), seed: u64,
    ) {
        let (mut qkv, mut dout) = heads.inputs(seed, sequences.rows());
        let into = if in_dout { &mut dout } else { &mut qkv };
        let (row, column) = ((at * into.nrows() as f64) as usize, (column * into.ncols() as f64) as usize);
        if let Some(number) = into.get_mut((row, column)) {
            *number = special;
        }
        let finite = |(out, grad): Outcome| (out.mapv(f64::is_finite), grad.mapv(f64::is_finite));
        let got = attend::<f64>(&heads.of_operator(), &qkv, &dout, &sequences);
        let want = attend_reference(&heads, &qkv, &dout, &sequences);
        for (got, want) in got.0.iter().chain(&got.1).zip(want.0.iter().chain(&want.1)) {
            prop_assert!(!want.is_finite() || (got - want).abs() <= 1e-11, "{got} != {want}");
        }
        prop_assert_eq!(finite(got), finite(want));
    }
}

/// Queries are processed in tiles of 128.
#[test]
fn attention_across_tiles() {
    for (rows, causal, window) in [
        (128, true, None),
        (130, true, None),
        (257, true, None),
        (257, true, Some(5)),
        (257, true, Some(140)),
        (130, false, None),
        (257, false, None),
    ] {
        let heads = Heads { heads: 2, kv_heads: 1, dim: 3, causal, window };
        let sequences = Sequences::packed([3, rows]);
        attention_agrees(&heads, &sequences, 1);
        let valid: Vec<_> = (0..rows + 3).map(|row| row % 7 > 1 && row > 20).collect();
        let masked = sequences.masked(&valid).unwrap();
        attention_agrees(&heads, &masked, 2);
        attention_is_near::<f32>(&heads, &masked, 3);
    }
}

/// A NaN among the keys of a long sequence does not change the bits of the rows before it.
#[test]
fn attention_hides_later_rows_across_tiles() {
    let heads = Heads { heads: 2, kv_heads: 1, dim: 3, causal: true, window: None };
    let sequences = Sequences::one(200);
    let (mut qkv, dout) = heads.inputs(1, 200);
    let (before, _) = attend::<f32>(&heads.of_operator(), &qkv, &dout, &sequences);
    qkv.row_mut(150).fill(f64::NAN);
    let (after, grad) = attend::<f32>(&heads.of_operator(), &qkv, &dout, &sequences);
    assert_eq!(after.slice(s![..150, ..]), before.slice(s![..150, ..]));
    assert!(after.slice(s![150.., ..]).iter().all(|out| out.is_nan()));
    assert!(grad.slice(s![..150, ..6]).iter().all(|dq| dq.is_finite()), "the gradient of earlier queries");
}

/// Query heads may use key/value heads in any order. Unused key/value heads get a zero gradient.
#[test]
fn attention_with_key_value_heads_in_any_order() {
    let (rows, dim, width) = (9, 2, 10);
    let (qkv, dout) = (matrix(1, "qkv", rows, width), matrix(1, "dout", rows, 4));
    let columns = |x: &Array2<f64>, heads: &[usize]| {
        let parts: Vec<_> = heads.iter().map(|head| x.slice(s![.., head * dim..(head + 1) * dim])).collect();
        concatenate(Axis(1), &parts).unwrap()
    };
    // Heads 0 and 1 of q use heads 2 and 0 of k and of v, so head 1 of k and v is unused. In units
    // of heads, k has columns 2 to 4 and v has columns 5 to 7.
    let qkv = concatenate![Axis(1), qkv, matrix(2, "more", rows, 6)];
    let heads = |kv_of_query, kv_heads| QkvHeads {
        kv_of_query,
        kv_heads,
        head_dim: dim,
        choices: AttentionChoices { scale: Some(0.6), ..AttentionChoices::CAUSAL },
    };
    let sequences = Sequences::one(rows);
    let (out, grad) = attend::<f64>(&heads(vec![2, 0], 3), &qkv, &dout, &sequences);
    let sorted = columns(&qkv, &[0, 1, 4, 2, 7, 5]);
    let (want, want_grad) = attend::<f64>(&heads(vec![0, 1], 2), &sorted, &dout, &sequences);
    assert_eq!(out, want);
    assert_eq!(columns(&grad, &[0, 1, 4, 2, 7, 5]), want_grad);
    assert_eq!(columns(&grad, &[3, 6]), Array2::<f64>::zeros((rows, 4)));
}

#[test]
fn attention_names_the_sizes_that_disagree() {
    let cpu = Cpu::new();
    let heads = Heads { heads: 2, kv_heads: 1, dim: 3, causal: true, window: None }.of_operator();
    let zeros = |rows, cols| Tensor::<f32>::zeros(&cpu, [rows, cols]).unwrap();
    disagree(
        ops::attention(&heads, &zeros(4, 13), &Sequences::one(4)),
        "attention: columns of [q | k | v] is 13, but those of its heads is 12",
    );
    disagree(
        ops::attention(&heads, &zeros(4, 12), &Sequences::one(5)),
        "attention: rows of q is 4, but rows of the sequences is 5",
    );
    let beyond = QkvHeads { kv_of_query: vec![0, 1], ..heads.clone() };
    invalid(
        ops::attention(&beyond, &zeros(4, 12), &Sequences::one(4)),
        "attention: a query head uses key/value head 1 of 1",
    );
    let flat = QkvHeads { head_dim: 0, ..heads.clone() };
    invalid(ops::attention(&flat, &zeros(4, 0), &Sequences::one(4)), "attention: heads have no features");
    let (_, context) = ops::attention(&heads, &zeros(4, 12), &Sequences::one(4)).unwrap();
    disagree(
        ops::attention_backward(&heads, &context, &zeros(4, 5)),
        "attention backward: the output has shape [4, 6], but its gradient has shape [4, 5]",
    );

    let sequences = Sequences::one(4);
    let choices = AttentionChoices { scale: Some(1.0), ..AttentionChoices::default() };
    let heads = QkvHeads { choices, ..heads };
    let spec = AttentionSpec { heads: &heads, sequences: &sequences };
    let (q, kv) = (zeros(4, 6), zeros(4, 3));
    let attention = |k: MatRef<'_, f32, Cpu>, v, lse| {
        let mut lse = vec![0.0; lse];
        cpu.attention(&spec, q.mat(), k, v, zeros(4, 6).mat_mut().unwrap(), &mut lse)
    };
    assert_eq!(attention(kv.mat(), kv.mat(), 8), Ok(()));
    disagree(
        attention(kv.mat().columns(0..2), kv.mat(), 8),
        "attention: columns of k is 2, but kv_heads · head_dim is 3",
    );
    disagree(
        attention(kv.mat(), kv.mat().block(0..3, 0..3), 8),
        "attention: rows of v is 3, but rows of the sequences is 4",
    );
    disagree(attention(kv.mat(), kv.mat(), 7), "attention: the log-sum-exps is 7, but rows · heads is 8");
    disagree(
        cpu.attention_backward(
            &spec,
            q.mat(),
            kv.mat(),
            kv.mat(),
            q.mat(),
            &[0.0; 8],
            q.mat(),
            zeros(4, 11).mat_mut().unwrap(),
        ),
        "attention backward: columns of the gradient is 11, but those of q, k and v is 12",
    );
}

// Tensors.

#[test]
fn tensors_come_from_arrays_in_any_layout() {
    let x = Array::from_iter(0..24).mapv(f64::from).into_shape_with_order((2, 3, 4)).unwrap();
    let cpu = Cpu::poisoned();
    let holds = |view: ndarray::ArrayView3<'_, f64>| {
        let tensor = Tensor::from_array(&cpu, &view).unwrap();
        assert_eq!(tensor.shape().dims(), view.shape());
        assert_eq!(tensor.to_array().unwrap(), view.into_dyn());
        assert_eq!(tensor.as_array(), view.into_dyn());
        assert_eq!(tensor.as_array().as_ptr(), tensor.slice().as_ptr(), "a view does not copy");
    };
    holds(x.view());
    holds(x.view().reversed_axes());
    holds(x.slice(s![.., ..;-1, 1..;2]));
    holds(x.slice(s![..1, 2..2, ..]));
    holds(x.view().permuted_axes([1, 0, 2]));
    let scalar = Tensor::from(arr0(2.5_f32));
    assert_eq!((scalar.shape().rank(), scalar.len(), scalar.slice()), (0, 1, &[2.5][..]));
    assert_eq!(scalar.to_array().unwrap(), arr0(2.5).into_dyn());
    assert!(
        Tensor::<f32>::empty(&cpu, [2, 3]).unwrap().slice().iter().all(|x| x.is_nan()),
        "fresh memory is poison"
    );
    assert_eq!(Tensor::<bf16>::full(&cpu, [2, 2], 1.5).unwrap().slice(), [bf16::from_f32(1.5); 4]);
}

#[test]
#[should_panic(expected = "a tensor has at most 4 dimensions, not 5")]
fn a_tensor_of_five_dimensions_panics() {
    let _ = Tensor::from(Array::<f32, _>::zeros([1, 1, 1, 1, 1]));
}

#[test]
fn tensors_share_memory_until_one_is_written() {
    let cpu = Cpu::poisoned();
    let mut x = tensor::<f32, _>(&cpu, &array![[1.0, 2.0], [3.0, 4.0]]);
    let at = x.slice().as_ptr();
    x.slice_mut().unwrap()[0] = 5.0;
    assert_eq!(x.slice().as_ptr(), at, "memory of its own is written in place");
    let flat = x.clone().reshape([4]).unwrap();
    assert_eq!(flat.slice().as_ptr(), at, "neither a clone nor another shape copies");
    let kept = x.clone();
    cpu.fill(0.0, x.mat_mut().unwrap()).unwrap();
    assert_ne!(x.slice().as_ptr(), at);
    assert_eq!(
        (x.slice(), kept.slice(), flat.slice()),
        (&[0.0; 4][..], &[5.0, 2.0, 3.0, 4.0][..], kept.slice())
    );
    assert_eq!(
        kept.clone().into_buffer().unwrap()[..],
        [5.0, 2.0, 3.0, 4.0],
        "a shared buffer is copied out"
    );
    drop(flat);
    assert_eq!(kept.into_buffer().unwrap().as_ptr(), at, "and one that is not shared is moved");
}

#[test]
fn tensors_name_the_sizes_that_disagree() {
    let cpu = Cpu::new();
    let x = Tensor::<f32>::zeros(&cpu, [2, 3]).unwrap();
    disagree(x.clone().reshape([4]), "reshape: the number of elements is 6, but that of the new shape is 4");
    assert_eq!(x.reshape([3, 1, 2]).unwrap().shape().dims(), [3, 1, 2]);
    disagree(
        Tensor::from_slice(&cpu, [2, 2], &[1.0_f32; 3]),
        "tensor: the number of elements given is 3, but that of the shape is 4",
    );
    disagree(
        Tensor::<f32>::from_buffer(&cpu, [5], cpu.empty(4).unwrap()),
        "tensor: the number of elements of the buffer is 4, but that of the shape is 5",
    );
}

#[test]
fn tensors_are_counted_once() {
    let cpu = Cpu::poisoned();
    assert_eq!(cpu.memory(), MemoryUse { live: 0, peak: 0 });
    let mut x = Tensor::<f64>::zeros(&cpu, [10, 10]).unwrap();
    let half = x.convert::<bf16>().unwrap();
    assert_eq!(cpu.memory(), MemoryUse { live: 1000, peak: 1000 });
    let shared = x.clone();
    assert_eq!(cpu.memory().live, 1000, "a clone shares");
    x.slice_mut().unwrap()[0] = 1.0;
    assert_eq!(cpu.memory().live, 1800, "a write to shared memory copies");
    drop((x, half));
    assert_eq!(cpu.memory(), MemoryUse { live: 800, peak: 1800 });
    let buffer = shared.into_buffer().unwrap();
    assert_eq!(cpu.memory().live, 800, "the buffer is still the rank's");
    drop(buffer);
    cpu.trim();
    assert_eq!(cpu.memory(), MemoryUse { live: 0, peak: 1800 });
    // Another handle of the same device uses the same counters.
    let _x = Tensor::<f32>::zeros(&cpu.clone(), [3]).unwrap();
    assert_eq!(cpu.memory().live, 12);
}
