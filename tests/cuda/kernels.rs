//! Compares every kernel on the GPU with the CPU's kernel: random sizes, row strides and offsets,
//! all four element types. Other tests compare the CPU's kernels with the reference.

use crate::dev::{self, Dev};
use half::{bf16, f16};
use proptest::prelude::*;
use shardwise::{
    Result,
    device::{Cpu, Device, Element},
    kernels::{
        Activation, AdamWStep, AttentionChoices, AttentionSpec, Backend, Batch, CacheSpec, DropoutMask,
        Epilogue, GemmTerm, MatMut, MatRef, NO_ROW, NormKind, QkvHeads, RopePairs, RopeSpec, SgdStep,
        Targets,
    },
    rng::Philox,
    shard::Sequences,
};
use std::ops::Range;

/// The sizes of a matrix in its own memory, its start and its row stride.
#[derive(Clone, Copy, Debug)]
struct Place {
    rows: usize,
    cols: usize,
    start: usize,
    stride: usize,
}

impl Place {
    fn len(&self) -> usize {
        self.start + self.rows * self.stride
    }
}

/// A matrix's memory on a device. It has the same random numbers on every device.
struct Memory<T: Element, B: Device> {
    device: B,
    buffer: B::Buffer<T>,
    place: Place,
}

impl<T: Element, B: Device> Memory<T, B> {
    fn new(device: &B, seed: u64, place: Place) -> Self {
        let stream = Philox::stream(seed, 3);
        let host: Vec<T> = (0..place.len() as u64).map(|at| T::from_f64(stream.normal(at))).collect();
        let mut buffer = device.empty::<T>(host.len()).unwrap();
        device.upload::<T>(&host, B::slice_mut(&mut buffer)).unwrap();
        Self { device: device.clone(), buffer, place }
    }

    fn mat(&self) -> MatRef<'_, T, B> {
        let Place { rows, cols, start, stride } = self.place;
        let slice = B::slice::<T>(&self.buffer);
        MatRef::strided(B::narrow::<T>(slice, start..self.place.len()), rows, cols, stride, 1).unwrap()
    }

    fn mat_mut(&mut self) -> MatMut<'_, T, B> {
        let Place { rows, cols, start, stride } = self.place;
        let len = self.place.len();
        let slice = B::slice_mut::<T>(&mut self.buffer);
        MatMut::strided(B::narrow_mut::<T>(slice, start..len), rows, cols, stride, 1).unwrap()
    }

    /// Returns all of the memory, including the gaps that no kernel may write.
    fn values(&self) -> Vec<f64> {
        let mut host = vec![T::default(); self.place.len()];
        self.device.download::<T>(B::slice(&self.buffer), &mut host).unwrap();
        host.into_iter().map(T::to_f64).collect()
    }
}

fn vector(len: usize) -> Place {
    Place { rows: 1, cols: len, start: 0, stride: len }
}

/// Compares two memories. The tolerance is relative to the largest number, or to 1 if that is
/// larger.
fn same<T: Element>(what: &str, got: &[f64], want: &[f64]) {
    let tolerance = match T::DTYPE {
        shardwise::device::DType::F64 => 1e-12,
        shardwise::device::DType::F32 => 2e-5,
        _ => 4.0 * T::EPSILON,
    };
    let scale =
        want.iter().filter(|value| value.is_finite()).fold(1.0_f64, |max, value| max.max(value.abs()));
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let equal = got == want || got.is_nan() && want.is_nan() || (got - want).abs() <= tolerance * scale;
        assert!(equal, "{what}, {}, element {at}: {got} on the GPU, {want} on the CPU", T::DTYPE);
    }
}

/// The sizes of one random case.
#[derive(Clone, Debug)]
struct RandomCase {
    seed: u64,
    rows: usize,
    cols: usize,
    gap: usize,
    start: usize,
    more: usize,
}

impl RandomCase {
    fn place(&self) -> Place {
        Place { rows: self.rows, cols: self.cols, start: self.start, stride: self.cols + self.gap }
    }

    fn wide(&self, times: usize) -> Place {
        let cols = self.cols * times;
        Place { rows: self.rows, cols, start: self.start, stride: cols + self.gap }
    }
}

fn random_cases() -> impl Strategy<Value = RandomCase> {
    let aligned = prop_oneof![Just(0_usize), Just(8), 1..9_usize];
    let cols = prop_oneof![1..40_usize, (1..6_usize).prop_map(|packs| 8 * packs), 1020..1100_usize];
    (any::<u64>(), 1..20_usize, cols, aligned.clone(), aligned, 1..9_usize)
        .prop_map(|(seed, rows, cols, gap, start, more)| RandomCase { seed, rows, cols, gap, start, more })
}

/// Runs a check for this many random cases.
fn check(cases: u32, one: impl Fn(&Dev, &Cpu, &RandomCase)) {
    let (cuda, cpu) = (dev::poisoned(), Cpu::poisoned());
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(case in random_cases())| one(&cuda, &cpu, &case));
}

const KINDS: [Activation; 4] =
    [Activation::Relu, Activation::Silu, Activation::GeluErf, Activation::GeluTanh];

fn pointwise<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let place = case.place();
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let (a, b, c) =
        (memory(1, place), memory(2, Place { stride: place.stride + 8, ..place }), memory(3, place));
    let mut results = Vec::new();
    for kind in KINDS {
        let mut y = memory(4, place);
        device.activate(kind, a.mat(), y.mat_mut())?;
        results.push(y.values());
        device.activate_backward(kind, a.mat(), b.mat(), y.mat_mut())?;
        results.push(y.values());
        device.gate(kind, a.mat(), b.mat(), y.mat_mut())?;
        results.push(y.values());
        let mut d = memory(5, case.wide(2));
        device.gate_backward(kind, a.mat(), b.mat(), c.mat(), d.mat_mut())?;
        results.push(d.values());
    }
    let mut y = memory(6, place);
    device.add(a.mat(), b.mat(), y.mat_mut())?;
    results.push(y.values());
    device.mul(a.mat(), b.mat(), y.mat_mut())?;
    results.push(y.values());
    let factors = memory(8, vector(case.rows));
    device.scale_rows(B::slice::<T>(&factors.buffer), a.mat(), y.mat_mut())?;
    results.push(y.values());
    let mut dots = memory(9, vector(case.rows));
    device.dot_rows(a.mat(), b.mat(), B::slice_mut(&mut dots.buffer))?;
    results.push(dots.values());
    device.accumulate(c.mat(), y.mat_mut())?;
    let mut sum = Memory::<T::Acc, B>::new(device, case.seed, place);
    device.accumulate(c.mat(), sum.mat_mut())?;
    results.push(sum.values());
    let bias = memory(7, vector(case.cols));
    device.add_bias(B::slice::<T>(&bias.buffer), y.mat_mut())?;
    results.push(y.values());
    device.scale(-1.75, y.mat_mut())?;
    results.push(y.values());
    device.fill(0.1, y.mat_mut())?;
    results.push(y.values());
    let mut sums = Memory::<T::Acc, B>::new(device, 1, vector(case.cols));
    device.sum_rows(a.mat(), B::slice_mut(&mut sums.buffer))?;
    results.push(sums.values());
    macro_rules! copies {
        ($($Y:ty),*) => {$(
            let mut y = Memory::<$Y, B>::new(device, 9, place);
            device.copy::<T, $Y>(a.mat(), y.mat_mut())?;
            results.push(y.values());
        )*};
    }
    copies!(f64, f32, bf16, f16);
    Ok(results)
}

fn rows<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let place = case.place();
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let (x, dy) = (memory(1, place), memory(2, place));
    let (gamma, beta) = (memory(3, vector(case.cols)), memory(4, vector(case.cols)));
    let [gamma, beta] = [&gamma, &beta].map(|memory| B::slice::<T>(&memory.buffer));
    let mut results = Vec::new();
    for kind in [NormKind::LayerNorm { eps: 1e-2 }, NormKind::RmsNorm { eps: 1e-2 }] {
        let mut y = memory(5, place);
        let mut stats = Memory::<T::Acc, B>::new(device, 6, vector(2 * case.rows));
        let with_beta = kind.centers().then_some(beta);
        device.normalize(kind, x.mat(), gamma, with_beta, y.mat_mut(), B::slice_mut(&mut stats.buffer))?;
        results.extend([y.values(), stats.values()]);
        let mut grads = [7, 8].map(|seed| Memory::<T::Acc, B>::new(device, seed, vector(case.cols)));
        let [dgamma, dbeta] = &mut grads;
        let stats = B::slice::<T::Acc>(&stats.buffer);
        let dbeta = with_beta.map(|_| B::slice_mut(&mut dbeta.buffer));
        device.normalize_backward(
            kind,
            x.mat(),
            gamma,
            stats,
            dy.mat(),
            y.mat_mut(),
            B::slice_mut(&mut dgamma.buffer),
            dbeta,
        )?;
        results.push(y.values());
        results.extend(grads.iter().map(Memory::values));
    }
    let mut sums = Memory::<f64, B>::new(device, 1, vector(case.rows));
    device.square_sums(x.mat(), B::slice_mut(&mut sums.buffer))?;
    results.push(sums.values());
    Ok(results)
}

fn losses<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let (place, rows) = (case.place(), case.rows);
    let memory = |seed: u64| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let wide = |len| Memory::<T::Acc, B>::new(device, 5, vector(len));
    let (x, y, mut results) = (memory(1), memory(2), Vec::new());
    let count = case.cols + case.more + 2;
    let classes: Vec<u32> = (0..rows as u64)
        .map(|row| (Philox::stream(case.seed, 8).uniform(row) * count as f64) as u32)
        .collect();
    for (off, ignored) in [(0.0, None), (0.01, Some(classes[0]))] {
        let targets = Targets {
            classes: &classes,
            ignored,
            count,
            first: case.more,
            on: 1.0 - off * count as f64,
            off,
            z: off,
        };
        let (mut max, mut sums, mut values, mut log) = (wide(rows), wide(3 * rows), wide(rows), wide(rows));
        device.row_max(x.mat(), B::slice_mut(&mut max.buffer))?;
        let max_slice = B::slice::<T::Acc>(&max.buffer);
        device.exp_sums(&targets, x.mat(), max_slice, B::slice_mut(&mut sums.buffer))?;
        let sums_slice = B::slice::<T::Acc>(&sums.buffer);
        let (values_mut, log_mut) = (B::slice_mut(&mut values.buffer), B::slice_mut(&mut log.buffer));
        device.cross_entropy::<T::Acc>(&targets, max_slice, sums_slice, values_mut, log_mut)?;
        let mut dx = memory(3);
        let log_slice = B::slice::<T::Acc>(&log.buffer);
        device.cross_entropy_backward(&targets, 0.3, x.mat(), max_slice, log_slice, dx.mat_mut())?;
        results.extend([max.values(), sums.values(), values.values(), log.values(), dx.values()]);
    }
    let (mut sums, mut dx) = (wide(rows), memory(3));
    device.squared_error(x.mat(), y.mat(), B::slice_mut(&mut sums.buffer))?;
    device.squared_error_backward(0.3, x.mat(), y.mat(), dx.mat_mut())?;
    results.extend([sums.values(), dx.values()]);
    Ok(results)
}

fn places<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let place = case.place();
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let mut results = Vec::new();
    // Gather and its transpose. Some ids occur twice, and every fourth id selects no row.
    let table_place = Place { rows: 5, ..place };
    let table = memory(1, table_place);
    let ids: Vec<u32> =
        (0..case.rows as u32).map(|row| if row % 4 == 3 { NO_ROW } else { row * 7 % 5 }).collect();
    let mut y = memory(2, place);
    device.gather(table.mat(), &ids, y.mat_mut())?;
    results.push(y.values());
    let mut sums = Memory::<T::Acc, B>::new(device, 3, table_place);
    device.scatter_add(&ids, y.mat(), sums.mat_mut())?;
    results.push(sums.values());
    // Dropout of a region of a larger matrix.
    let mask = DropoutMask {
        probability: 0.3,
        stream: Philox::stream(case.seed, 4),
        row: 3 + case.seed % 1000 * 1_000_000_007,
        column: case.more,
        width: case.cols + 2 * case.more,
    };
    let x = memory(4, place);
    device.dropout(&mask, x.mat(), y.mat_mut())?;
    results.push(y.values());
    // Rotations of two heads. One feature of a head with an odd number of features is not rotated.
    for pairs in [RopePairs::Halves, RopePairs::Interleaved] {
        let frequencies: Vec<f64> =
            (0..case.cols / 2).map(|at| 10_000_f64.powf(-(at as f64) / 16.0)).collect();
        let spec = RopeSpec { head_dim: case.cols, frequencies: &frequencies, pairs, magnitude: 1.1 };
        let positions: Vec<u32> = (0..case.rows as u32).map(|row| row * row * 37).collect();
        for transposed in [false, true] {
            let mut x = memory(5, case.wide(2));
            device.rope(&spec, &positions, transposed, x.mat_mut())?;
            results.push(x.values());
        }
    }
    Ok(results)
}

fn updates<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let place = vector(case.cols);
    let wide = |seed: u64| Memory::<T::Acc, B>::new(device, case.seed ^ seed, place);
    let mut results = Vec::new();
    for masters in [false, true] {
        let (grad, mut weight, mut master, mut first, mut second) =
            (wide(1), Memory::<T, B>::new(device, case.seed, place), wide(2), wide(3), wide(4));
        device.scale(0.0, second.mat_mut())?;
        for nesterov in [false, true] {
            let step = SgdStep { lr: 0.1, momentum: 0.9, nesterov, weight_decay: 0.01, grad_scale: 0.5 };
            let velocity = nesterov.then(|| B::slice_mut::<T::Acc>(&mut first.buffer));
            let master = masters.then(|| B::slice_mut::<T::Acc>(&mut master.buffer));
            device.sgd::<T>(
                &step,
                B::slice(&grad.buffer),
                B::slice_mut(&mut weight.buffer),
                master,
                velocity,
            )?;
        }
        let step = AdamWStep {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-6,
            weight_decay: 0.1,
            step: 3,
            grad_scale: 2.0,
        };
        let moments = [B::slice_mut::<T::Acc>(&mut first.buffer), B::slice_mut::<T::Acc>(&mut second.buffer)];
        let own = masters.then(|| B::slice_mut::<T::Acc>(&mut master.buffer));
        device.adamw::<T>(&step, B::slice(&grad.buffer), B::slice_mut(&mut weight.buffer), own, moments)?;
        results.extend([weight.values(), master.values(), first.values(), second.values()]);
    }
    Ok(results)
}

fn products<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let (m, k, n) = (case.rows, case.cols.min(60), case.more);
    let place = |rows, cols, gap| Place { rows, cols, start: case.start, stride: cols + gap };
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let mut results = Vec::new();
    let (a, at) = (memory(1, place(m, k, case.gap)), memory(2, place(k, m, case.gap)));
    let (b, bt) = (memory(3, place(k, n, case.gap)), memory(4, place(n, k, case.gap)));
    for (a, b) in
        [(a.mat(), b.mat()), (at.mat().t(), b.mat()), (a.mat(), bt.mat().t()), (at.mat().t(), bt.mat().t())]
    {
        for beta in [0.0, 0.5] {
            let mut c = memory(5, place(m, n, case.gap));
            device.gemm(1.5, a, b, beta, c.mat_mut())?;
            results.push(c.values());
            let mut c = Memory::<T::Acc, B>::new(device, case.seed, place(n, m, 1));
            let Place { start, stride, .. } = c.place;
            let len = c.place.len();
            let slice = B::narrow_mut::<T::Acc>(B::slice_mut(&mut c.buffer), start..len);
            device.gemm(1.5, a, b, beta, MatMut::strided(slice, m, n, 1, stride)?)?;
            results.push(c.values());
        }
    }
    // A is every other element of both dimensions. The products of the batch share B.
    let sparse = memory(6, place(2 * m * 3, 2 * k, 0));
    let stride = 2 * k;
    let slice = B::narrow::<T>(B::slice(&sparse.buffer), case.start..sparse.place.len());
    let odd = MatRef::<T, B>::strided(slice, m, k, 2 * stride, 2)?;
    let mut c = memory(7, place(m, n, 0));
    device.gemm(1.0, odd, b.mat(), 0.0, c.mat_mut())?;
    results.push(c.values());
    let mut c = memory(7, Place { rows: 3 * m, ..place(m, n, 0) });
    let batch = Batch { count: 3, a: 2 * m * stride, b: 0, c: m * n };
    let rows = MatRef::<T, B>::strided(slice, m, k, stride, 1)?;
    let start = c.place.start;
    let len = c.place.len();
    let to = B::narrow_mut::<T>(B::slice_mut(&mut c.buffer), start..len);
    device.gemm_batched(batch, 1.0, rows, b.mat(), 0.0, MatMut::new(to, m, n)?)?;
    results.push(c.values());
    // A product of depth 0.
    let nothing = MatRef::<T, B>::new(B::narrow::<T>(slice, 0..0), m, 0)?;
    let none = MatRef::<T, B>::new(B::narrow::<T>(slice, 0..0), 0, n)?;
    let mut c = memory(8, place(m, n, 0));
    device.gemm(1.0, nothing, none, 0.5, c.mat_mut())?;
    results.push(c.values());
    Ok(results)
}

/// Products with fused operators. The device fuses them as epilogues if gaps and alignment allow
/// it.
fn linear<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let (m, k, n) = (case.rows, case.cols.min(60), 8 * case.more - case.seed as usize % 2);
    let place = |rows, cols| Place { rows, cols, start: case.start, stride: cols + case.gap };
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let (x, w, bias) = (memory(1, place(m, k)), memory(2, place(n, k)), memory(3, vector(n)));
    let bias = B::slice::<T>(&bias.buffer);
    let mut results = Vec::new();
    let mut y = memory(4, place(m, n));
    for bias in [Some(bias), None] {
        device.linear(x.mat(), w.mat(), Epilogue { bias, activation: None }, y.mat_mut())?;
        results.push(y.values());
    }
    // A ReLU's slope jumps at 0, and numbers that the two devices compute differ in rounding. So
    // both devices compute the slopes at the same given numbers.
    let (dy, v, at) = (memory(5, place(m, k)), memory(6, place(k, n)), memory(10, place(m, n)));
    for f in KINDS {
        let (mut pre, mut y) = (memory(7, place(m, n)), memory(8, place(m, n)));
        for bias in [Some(bias), None] {
            let epilogue = Epilogue { bias, activation: Some((f, pre.mat_mut())) };
            device.linear(x.mat(), w.mat(), epilogue, y.mat_mut())?;
            results.extend([pre.values(), y.values()]);
        }
        device.linear_dx(dy.mat(), v.mat(), Some((f, at.mat())), y.mat_mut())?;
        results.push(y.values());
    }
    device.linear_dx(dy.mat(), v.mat(), None, y.mat_mut())?;
    results.push(y.values());
    for beta in [0.0, 1.0] {
        let mut dw = Memory::<T::Acc, B>::new(device, case.seed, place(k, n));
        device.linear_dw(dy.mat(), y.mat(), beta, dw.mat_mut(), None)?;
        results.push(dw.values());
        let mut dw = Memory::<T::Acc, B>::new(device, case.seed, place(k, n));
        let mut db = Memory::<T::Acc, B>::new(device, 9, vector(k));
        device.linear_dw(dy.mat(), y.mat(), beta, dw.mat_mut(), Some(B::slice_mut(&mut db.buffer)))?;
        results.extend([dw.values(), db.values()]);
    }
    let mut sum = Memory::<T::Acc, B>::new(device, case.seed, place(m, n));
    let (half, term) = (k / 2, |depth: Range<usize>, merges| {
        let products = vec![(x.mat().columns(depth.clone()), w.mat().t().block(depth, 0..n))];
        GemmTerm { products, merges }
    });
    device.gemm_tree(&[term(0..half, 0), term(half..k, 0), term(0..k, 2)], sum.mat_mut())?;
    results.push(sum.values());
    Ok(results)
}

/// Returns heads in which each key/value head serves the same number of query heads.
fn grouped((heads, kv_heads): (usize, usize), head_dim: usize, choices: AttentionChoices) -> QkvHeads {
    let kv_of_query = (0..heads).map(|head| head * kv_heads / heads).collect();
    QkvHeads { kv_of_query, kv_heads, head_dim, choices }
}

/// Returns the outputs of attention, their log-sum-exp, and the gradients of q, k and v. `memory`
/// creates each memory from a seed and a number of columns.
fn attended<T: Element, B: Backend>(
    device: &B,
    spec: &AttentionSpec<'_>,
    [q, k, v, dout]: [&Memory<T, B>; 4],
    memory: impl Fn(u64, usize) -> Memory<T, B>,
) -> Result<[Vec<f64>; 3]> {
    let heads = spec.heads;
    let (mut out, mut dqkv) = (memory(5, heads.query_width()), memory(7, heads.width()));
    let mut lse = Memory::<T::Acc, B>::new(device, 6, vector(q.place.rows * heads.kv_of_query.len()));
    device.attention(spec, q.mat(), k.mat(), v.mat(), out.mat_mut(), B::slice_mut(&mut lse.buffer))?;
    let logs = B::slice::<T::Acc>(&lse.buffer);
    let (result, gradients) = (out.mat(), dqkv.mat_mut());
    device.attention_backward(spec, q.mat(), k.mat(), v.mat(), result, logs, dout.mat(), gradients)?;
    Ok([out.values(), lse.values(), dqkv.values()])
}

fn attention<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let dim = [3, 8, 33, 64, 70, 128, 130][case.cols % 7];
    let (heads, kv_heads) = [(2, 2), (4, 2), (3, 1)][case.more % 3];
    let attending = |causal, window| {
        grouped((heads, kv_heads), dim, AttentionChoices { causal, window, scale: Some(0.3) })
    };
    let lengths = [case.rows, 0, 40 * (case.seed % 2) as usize + 1];
    let rows: usize = lengths.iter().sum();
    let flags: Vec<bool> = (0..rows).map(|row| row % 5 != 2).collect();
    let memory = |seed: u64, cols| {
        Memory::<T, B>::new(
            device,
            case.seed ^ seed,
            Place { rows, cols, start: case.start, stride: cols + case.gap },
        )
    };
    let (q, dout) = (memory(1, heads * dim), memory(4, heads * dim));
    let (mut k, mut v) = (memory(2, kv_heads * dim), memory(3, kv_heads * dim));
    let mut results = Vec::new();
    for (causal, window, masked) in [
        (false, None, false),
        (true, None, false),
        (true, Some(3), false),
        (false, None, true),
        (true, None, true),
    ] {
        let sequences = Sequences::packed(lengths);
        let sequences = if masked { sequences.masked(&flags)? } else { sequences };
        if masked {
            // Masked keys and values have no influence, even NaN.
            for memory in [&mut k, &mut v] {
                for row in (0..rows).filter(|&row| !flags[row]) {
                    let cols = memory.place.cols;
                    device.fill(f64::NAN, memory.mat_mut().block(row..row + 1, 0..cols))?;
                }
            }
        }
        let seen = attending(causal, window);
        let spec = AttentionSpec { heads: &seen, sequences: &sequences };
        results.extend(attended(device, &spec, [&q, &k, &v, &dout], memory)?);
    }
    // Two sequences continue from positions 5 and 0, in slots 2 and 0.
    let capacity = 60;
    let cache = |seed: u64| {
        let rows = 3 * kv_heads * capacity;
        Memory::<T, B>::new(device, case.seed ^ seed, Place { rows, cols: dim, start: 0, stride: dim })
    };
    let (keys, values) = (cache(8), cache(9));
    let lengths = [case.rows, 2];
    let sequences = Sequences::packed(lengths).starting_at(&[5, 0])?;
    for window in [None, Some(4)] {
        let seen = attending(true, window);
        let spec = AttentionSpec { heads: &seen, sequences: &sequences };
        let place = Place {
            rows: case.rows + 2,
            cols: heads * dim,
            start: case.start,
            stride: heads * dim + case.gap,
        };
        let (q, mut out) = (Memory::<T, B>::new(device, 1, place), Memory::<T, B>::new(device, 2, place));
        let slots = CacheSpec { slots: &[2, 0], capacity };
        device.attention_cached(&spec, &slots, q.mat(), keys.mat(), values.mat(), out.mat_mut())?;
        results.push(out.values());
    }
    Ok(results)
}

/// Attention of sequences that span several tensor-core tiles. A causal mask hides NaN and ∞ from
/// some rows.
fn tiles<T: Element, B: Backend>(
    device: &B,
    dim: usize,
    (heads, kv_heads): (usize, usize),
) -> Result<Vec<Vec<f64>>> {
    let lengths = [70, 0, 1, 130];
    let rows: usize = lengths.iter().sum();
    let place = |rows, cols| Place { rows, cols, start: 8, stride: cols + 8 };
    let memory = |seed, cols| Memory::<T, B>::new(device, seed, place(rows, cols));
    let (q, mut k, mut v) = (memory(1, heads * dim), memory(2, kv_heads * dim), memory(3, kv_heads * dim));
    let mut dout = memory(6, heads * dim);
    let flags: Vec<bool> = (0..rows).map(|row| row % 7 != 3 && row != 70).collect();
    let scale = 0.8 / (dim as f64).sqrt();
    let all = AttentionChoices { scale: Some(scale), ..AttentionChoices::default() };
    let causal = AttentionChoices { causal: true, ..all };
    let attending = |choices| grouped((heads, kv_heads), dim, choices);
    let whole = Sequences::packed(lengths);
    let mut results = Vec::new();
    let mut run = |choices, sequences: &Sequences, [k, v, dout]: [&Memory<T, B>; 3]| {
        let seen = attending(choices);
        let spec = AttentionSpec { heads: &seen, sequences };
        results.extend(attended(device, &spec, [&q, k, v, dout], memory)?);
        Ok(())
    };
    run(all, &whole, [&k, &v, &dout])?;
    for window in [None, Some(50), Some(3)] {
        run(AttentionChoices { window, ..causal }, &whole, [&k, &v, &dout])?;
    }
    // With these scales the key with the largest product q · k does not have the largest score.
    for scale in [-scale, 0.0] {
        run(AttentionChoices { scale: Some(scale), ..causal }, &whole, [&k, &v, &dout])?;
    }
    let masked = Sequences::packed(lengths).masked(&flags)?;
    run(all, &masked, [&k, &v, &dout])?;
    run(causal, &masked, [&k, &v, &dout])?;
    // One value that is not finite is in the first tile. Two more are on both sides of a tile's
    // end.
    for (row, value) in [(40, f64::NAN), (71 + 127, f64::INFINITY), (71 + 128, f64::NEG_INFINITY)] {
        device.fill(value, v.mat_mut().block(row..row + 1, 0..dim))?;
    }
    for window in [None, Some(50)] {
        run(AttentionChoices { window, ..causal }, &whole, [&k, &v, &dout])?;
    }
    let v = memory(3, kv_heads * dim);
    device.fill(f64::NAN, k.mat_mut().block(71 + 60..71 + 61, 0..dim))?;
    device.fill(f64::INFINITY, dout.mat_mut().block(30..31, 0..dim))?;
    device.fill(f64::NAN, dout.mat_mut().block(71 + 3..71 + 4, 0..dim))?;
    for window in [None, Some(50)] {
        run(AttentionChoices { window, ..causal }, &whole, [&k, &v, &dout])?;
    }
    // These sequences continue from a cache.
    let (capacity, lengths) = (160, [70, 3]);
    let cache =
        |seed| Memory::<T, B>::new(device, seed, Place { start: 0, ..place(3 * kv_heads * capacity, dim) });
    let (keys, values) = (cache(8), cache(9));
    let sequences = Sequences::packed(lengths).starting_at(&[5, 90])?;
    for window in [None, Some(20)] {
        let seen = attending(AttentionChoices { window, ..causal });
        let spec = AttentionSpec { heads: &seen, sequences: &sequences };
        let place = place(73, heads * dim);
        let (q, mut out) = (Memory::<T, B>::new(device, 1, place), Memory::<T, B>::new(device, 2, place));
        let slots = CacheSpec { slots: &[2, 0], capacity };
        device.attention_cached(&spec, &slots, q.mat(), keys.mat(), values.mat(), out.mat_mut())?;
        results.push(out.values());
    }
    Ok(results)
}

/// Appends keys and values of new tokens to a cache. One sequence is longer than a thread block's
/// range, and two sequences share a slot.
fn appended<T: Element, B: Backend>(device: &B, case: &RandomCase) -> Result<Vec<Vec<f64>>> {
    let dim = [3, 8, 33, 64, 128, 130][case.cols % 6];
    let (kv_heads, capacity) = (case.more % 3 + 1, 60);
    let lengths = [case.rows, 0, 37, 1, 3];
    let starts = [5, 7, 20, capacity - 1, 19];
    let rows: usize = lengths.iter().sum();
    let sequences = Sequences::packed(lengths).starting_at(&starts)?;
    let cols = kv_heads * dim;
    let from = Place { rows, cols, start: case.start, stride: cols + case.gap };
    let to = Place { rows: 4 * kv_heads * capacity, cols: dim, start: case.start, stride: dim + case.gap };
    let memory = |seed: u64, place| Memory::<T, B>::new(device, case.seed ^ seed, place);
    let (k, v, mut keys, mut values) = (memory(1, from), memory(2, from), memory(3, to), memory(4, to));
    let choices = AttentionChoices { scale: Some(1.0), ..AttentionChoices::CAUSAL };
    let heads = QkvHeads { kv_of_query: vec![0], kv_heads, head_dim: dim, choices };
    let spec = AttentionSpec { heads: &heads, sequences: &sequences };
    let cache = CacheSpec { slots: &[3, 1, 0, 2, 0], capacity };
    device.append_cached(&spec, &cache, k.mat(), v.mat(), keys.mat_mut(), values.mat_mut())?;
    let results = vec![keys.values(), values.values()];
    // Tokens that do not fit in the cache are an error, and the device writes nothing.
    let slots = CacheSpec { slots: &[3, 1, 0, 2, 4], capacity };
    assert!(device.append_cached(&spec, &slots, v.mat(), k.mat(), keys.mat_mut(), values.mat_mut()).is_err());
    let short = CacheSpec { capacity: capacity - 1, ..cache };
    assert!(device.append_cached(&spec, &short, v.mat(), k.mat(), keys.mat_mut(), values.mat_mut()).is_err());
    assert_eq!([keys.values(), values.values()], results[..]);
    Ok(results)
}

/// Attention of sequences with few rows to caches of one span and of several spans, together with
/// sequences of many rows. The cache is NaN after a sequence's end and before the window.
fn decoded<T: Element, B: Backend>(device: &B, dim: usize, gap: usize) -> Result<Vec<Vec<f64>>> {
    let (capacity, kv_heads, kv) = (700, 2, [1, 0, 0, 1, 0, 0, 0]);
    let attending = |window, scale| {
        let choices = AttentionChoices { causal: true, window, scale: Some(scale) };
        QkvHeads { kv_of_query: kv.to_vec(), kv_heads, head_dim: dim, choices }
    };
    let (lengths, starts, slots) =
        ([1, 3, 8, 0, 1, 11, 2], [640, 0, 250, 0, 300, 30, 511], [6, 2, 0, 5, 1, 3, 4]);
    let sequences = Sequences::packed(lengths).starting_at(&starts)?;
    let cols = kv.len() * dim;
    let place = Place { rows: sequences.rows(), cols, start: gap, stride: cols + gap };
    let rows = 7 * kv_heads * capacity;
    let cache =
        |seed| Memory::<T, B>::new(device, seed, Place { rows, cols: dim, start: gap, stride: dim + gap });
    let (q, mut keys, mut values) = (Memory::<T, B>::new(device, 1, place), cache(2), cache(3));
    let room = CacheSpec { slots: &slots, capacity };
    let mut results = Vec::new();
    for window in [None, Some(280), Some(2)] {
        for ((start, len), slot) in starts.into_iter().zip(lengths).zip(slots) {
            for head in 0..kv_heads {
                let first = (slot * kv_heads + head) * capacity;
                let hidden = window.map_or(0, |window| (start + 1_usize).saturating_sub(window));
                for rows in [first..first + hidden, first + start + len..first + capacity] {
                    device.fill(f64::NAN, keys.mat_mut().block(rows.clone(), 0..dim))?;
                    device.fill(f64::NAN, values.mat_mut().block(rows, 0..dim))?;
                }
            }
        }
        let seen = attending(window, 1.5 / (dim as f64).sqrt());
        let spec = AttentionSpec { heads: &seen, sequences: &sequences };
        let mut out = Memory::<T, B>::new(device, 4, place);
        device.attention_cached(&spec, &room, q.mat(), keys.mat(), values.mat(), out.mat_mut())?;
        results.push(out.values());
        // A sequence's row has the same bits alone as in the batch.
        let alone = Sequences::one(1).starting_at(&starts[..1])?;
        let spec = AttentionSpec { sequences: &alone, ..spec };
        let room = CacheSpec { slots: &slots[..1], capacity };
        let row = out.mat_mut().block(0..1, 0..cols);
        device.fill(0.0, row)?;
        let (query, row) = (q.mat().block(0..1, 0..cols), out.mat_mut().block(0..1, 0..cols));
        device.attention_cached(&spec, &room, query, keys.mat(), values.mat(), row)?;
        assert_eq!(out.values()[gap..gap + cols], results[results.len() - 1][gap..gap + cols]);
    }
    // A visible value has influence. Only the last row of the third sequence sees the sequence's
    // last position.
    let at = kv_heads * capacity * slots[2] + 257;
    device.fill(f64::INFINITY, values.mat_mut().block(at..at + 1, 0..dim))?;
    device.fill(f64::NAN, keys.mat_mut().block(at + capacity..at + capacity + 1, 0..dim))?;
    let seen = attending(Some(2), 0.1);
    let spec = AttentionSpec { heads: &seen, sequences: &sequences };
    let mut out = Memory::<T, B>::new(device, 5, place);
    device.attention_cached(&spec, &room, q.mat(), keys.mat(), values.mat(), out.mat_mut())?;
    results.push(out.values());
    Ok(results)
}

#[test]
fn attention_of_few_rows_to_a_cache_is_the_cpus() {
    fn one<T: Element>(cuda: &Dev, cpu: &Cpu) {
        for (dim, gap) in [(8, 0), (33, 1), (128, 0), (136, 8)] {
            let got = decoded::<T, _>(cuda, dim, gap).unwrap();
            let want = decoded::<T, _>(cpu, dim, gap).unwrap();
            assert_eq!(got.len(), want.len());
            for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                same::<T>(&format!("heads of {dim}, gap {gap}, result {at}"), got, want);
            }
        }
    }
    let (cuda, cpu) = (dev::poisoned(), Cpu::poisoned());
    one::<f64>(&cuda, &cpu);
    one::<f32>(&cuda, &cpu);
    one::<bf16>(&cuda, &cpu);
    one::<f16>(&cuda, &cpu);
}

/// Returns the attention of fixed numbers, whose memory begins at offset `start`.
fn placed<T: Element, B: Backend>(device: &B, start: usize) -> Result<Vec<f64>> {
    let place = |start| Place { rows: 80, cols: 64, start, stride: 72 };
    let moved = |seed| {
        let (from, mut to) =
            (Memory::<T, B>::new(device, seed, place(0)), Memory::<T, B>::new(device, 9, place(start)));
        device.copy(from.mat(), to.mat_mut())?;
        Ok(to)
    };
    let (q, k, v) = (moved(1)?, moved(2)?, moved(3)?);
    let (mut out, mut lse) = (moved(4)?, Memory::<T::Acc, B>::new(device, 5, vector(80)));
    let choices = AttentionChoices { scale: Some(0.1), ..AttentionChoices::CAUSAL };
    let (heads, sequences) = (grouped((1, 1), 64, choices), Sequences::packed([80]));
    let spec = AttentionSpec { heads: &heads, sequences: &sequences };
    device.attention(&spec, q.mat(), k.mat(), v.mat(), out.mat_mut(), B::slice_mut(&mut lse.buffer))?;
    let values = out.values();
    Ok((0..80).flat_map(|row| values[start + 72 * row..][..64].to_vec()).collect())
}

#[test]
fn attention_on_tensor_cores_is_the_cpus() {
    fn one<T: Element>(cuda: &Dev, cpu: &Cpu) {
        for (dim, heads) in [(8, (2, 2)), (72, (4, 2)), (128, (3, 1))] {
            let got = tiles::<T, _>(cuda, dim, heads).unwrap();
            let want = tiles::<T, _>(cpu, dim, heads).unwrap();
            assert_eq!(got.len(), want.len());
            for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                same::<T>(&format!("heads of {dim}, result {at}"), got, want);
            }
        }
        // Rows that are not aligned to 16 bytes use no tensor cores, so their attention weights are
        // not rounded.
        let [aligned, other] = [0, 7].map(|start| placed::<T, _>(cuda, start).unwrap());
        same::<T>("without tensor cores", &aligned, &other);
        assert_ne!(aligned, other, "both used the same kernel");
    }
    let (cuda, cpu) = (dev::poisoned(), Cpu::poisoned());
    one::<bf16>(&cuda, &cpu);
    one::<f16>(&cuda, &cpu);
}

/// Defines one test per kernel family, which compares both devices in all four element types.
macro_rules! families {
    ($($name:ident, $cases:expr, $family:ident;)*) => {$(
        #[test]
        fn $name() {
            check($cases, |cuda, cpu, case| {
                fn one<T: Element>(cuda: &Dev, cpu: &Cpu, case: &RandomCase) {
                    let got = $family::<T, _>(cuda, case).unwrap();
                    let want = $family::<T, _>(cpu, case).unwrap();
                    assert_eq!(got.len(), want.len());
                    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                        same::<T>(&format!("{}, result {at}", stringify!($family)), got, want);
                    }
                }
                one::<f64>(cuda, cpu, case);
                one::<f32>(cuda, cpu, case);
                one::<bf16>(cuda, cpu, case);
                one::<f16>(cuda, cpu, case);
            });
        }
    )*};
}

families! {
    element_wise_kernels_are_the_cpus, 24, pointwise;
    row_kernels_are_the_cpus, 24, rows;
    losses_are_the_cpus, 16, losses;
    gather_dropout_and_rope_are_the_cpus, 24, places;
    updates_are_the_cpus, 16, updates;
    products_are_the_cpus, 24, products;
    linear_operators_are_the_cpus, 24, linear;
    attention_is_the_cpus, 12, attention;
    attention_appends_to_a_cache_as_the_cpu, 12, appended;
}
