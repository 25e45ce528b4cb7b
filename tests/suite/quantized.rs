//! Layers with quantized weights: the same bits at every cut and for every number of tokens, the
//! dequantized weights in f64, and an error within the bound of the activations' rounding.

use crate::{
    dev::{Dev, ranks},
    support::{close, matrix},
};
use half::{bf16, f16};
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result, Tensor,
    comm::Group,
    device::{AnyMut, Cpu, Device, Element, Meta},
    kernels::{Activations, Backend, ColumnGroups, Format, GroupSize, Quantized, QuantizedShape},
    launch::Threads,
    models::{Decoder, ModelConfig},
    optim::{AdamW, AdamWConfig, grad_norm},
    parallel::{
        Bias, ColumnLinear, ColumnParallelLinear, Columns, DTensor, Layer, QkvLayout, ReplicatedLinear,
        RowLinear, RowParallelLinear, VocabParallelEmbedding,
    },
    reference,
    rng::Philox,
    shard::{Heads, Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Param, Region, Role, WeightSource, Weights},
    train::{DataParallel, GradReduce},
    weights::{self, Checkpoint, Quantization},
};
use std::{collections::BTreeMap, ops::Range};

/// Quantized matrices in memory, and dense tensors.
#[derive(Default)]
pub(crate) struct Blocks {
    matrices: BTreeMap<String, (Format, [usize; 2], Vec<u8>)>,
    /// The group of each column of some matrices. Block i of a row has the scale of group i.
    orders: BTreeMap<String, Vec<u32>>,
    dense: Arrays,
    activations: Activations,
}

impl Blocks {
    /// Adds a matrix of random blocks.
    pub(crate) fn with(mut self, name: &str, format: Format, [rows, cols]: [usize; 2]) -> Self {
        let random = Philox::named(3, name);
        let count = rows * format.blocks(0..cols).len();
        let mut bytes: Vec<u8> =
            (0..count * format.bytes()).map(|at| (random.uniform(at as u64) * 256.0) as u8).collect();
        let halves: &[usize] = match format {
            Format::Q6K => &[208],
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
            Format::Int4(_) | Format::Int8(_) | Format::Fp8(_) => &[],
            _ => &[0, 2],
        };
        for (number, block) in bytes.chunks_exact_mut(format.bytes()).enumerate() {
            if halves.is_empty() {
                let scale = 0.1 * random.normal((1 << 40) + number as u64) as f32;
                block[..4].copy_from_slice(&scale.to_le_bytes());
            }
            if let Format::Fp8(_) = format {
                // NaN becomes the largest number.
                block[4..].iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code -= 1);
            }
            for &at in halves {
                let scale = f16::from_f64(0.1 * random.normal((1 << 40) + number as u64));
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        self.matrices.insert(name.into(), (format, [rows, cols], bytes));
        self
    }

    /// Adds a matrix with groups of 32 random columns.
    fn with_order(self, name: &str, format: Format, [rows, cols]: [usize; 2]) -> Self {
        let random = Philox::named(5, name);
        let mut columns: Vec<usize> = (0..cols).collect();
        columns.sort_by(|a, b| random.uniform(*a as u64).total_cmp(&random.uniform(*b as u64)));
        let mut order = vec![0; cols];
        columns.iter().enumerate().for_each(|(at, column)| order[*column] = at as u32 / 32);
        let mut blocks = self.with(name, format, [rows, cols]);
        blocks.orders.insert(name.into(), order);
        blocks
    }

    pub(crate) fn with_dense(mut self, name: &str, shape: &[usize]) -> Self {
        let random = Philox::named(4, name);
        let mut at = 0;
        let array = ArrayD::from_shape_simple_fn(shape, || {
            at += 1;
            random.normal(at)
        });
        self.dense.0.insert(name.into(), array);
        self
    }

    fn exact(self) -> Self {
        Self { activations: Activations::Exact, ..self }
    }

    /// The dequantized matrix.
    fn matrix(&self, name: &str) -> Array2<f64> {
        let Some((format, [rows, cols], bytes)) = self.matrices.get(name) else {
            return self.dense.0[name].clone().into_dimensionality().unwrap();
        };
        if let Some(order) = self.orders.get(name) {
            let size = format.bytes();
            return Array2::from_shape_fn((*rows, *cols), |(row, column)| {
                let row = &bytes[row * cols / 32 * size..];
                let of_group = &row[order[column] as usize * size..][..5];
                let byte = |at: usize| row[column / 32 * size + 5 + at];
                let code = match format {
                    Format::Int8(_) => byte(column % 32),
                    _ => byte(column % 16) >> (column % 32 / 16 * 4) & 15,
                };
                let scale = f32::from_le_bytes(of_group[..4].try_into().unwrap());
                f64::from(scale * (f32::from(code) - f32::from(of_group[4])))
            });
        }
        let mut values = vec![0.0; format.weights()];
        let mut all = Vec::new();
        for row in bytes.chunks_exact(format.blocks(0..*cols).len() * format.bytes()) {
            let start = all.len();
            for block in row.chunks_exact(format.bytes()) {
                format.decode(block, &mut values);
                all.extend(values.iter().map(|value| f64::from(*value)));
            }
            all.truncate(start + cols);
        }
        Array2::from_shape_vec((*rows, *cols), all).unwrap()
    }
}

impl WeightSource for Blocks {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        if !self.matrices.contains_key(name) {
            return self.dense.read(name, role, region, out);
        }
        Arrays([(name.to_string(), self.matrix(name).into_dyn())].into()).read(name, role, region, out)
    }

    fn contains(&self, name: &str) -> bool {
        self.matrices.contains_key(name) || self.dense.contains(name)
    }

    fn format(&self, name: &str) -> Option<Format> {
        Some(self.matrices.get(name)?.0)
    }

    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        let (format, [_, cols], bytes) = &self.matrices[name];
        let row_bytes = format.blocks(0..*cols).len() * format.bytes();
        let [rows, columns] = [0, 1].map(|dim| region.ranges()[dim].clone());
        let blocks = format.blocks(columns);
        if self.orders.contains_key(name) {
            let mut read = Vec::new();
            for row in rows {
                let row = bytes[row * row_bytes..][..row_bytes].chunks_exact(format.bytes());
                row.clone().for_each(|block| read.extend(&block[..5]));
                row.skip(blocks.start).take(blocks.len()).for_each(|block| read.extend(&block[5..]));
            }
            out.copy_from_slice(&read);
            return Ok(());
        }
        let of_row = blocks.start * format.bytes()..blocks.end * format.bytes();
        let read: Vec<u8> = rows.flat_map(|row| &bytes[row * row_bytes..][of_row.clone()]).copied().collect();
        out.copy_from_slice(&read);
        Ok(())
    }

    fn column_groups(&self, name: &str, columns: Range<usize>) -> Result<Option<ColumnGroups>> {
        let Some(order) = self.orders.get(name) else { return Ok(None) };
        Ok(Some(ColumnGroups { groups: order.len() / 32, of: order[columns].into() }))
    }

    fn activations(&self) -> Activations {
        self.activations
    }
}

/// The sizes of a matrix of this format whose columns have blocks that cuts divide.
fn cols(format: Format) -> usize {
    if format.weights() == 256 { 12 * 64 } else { 9 * 64 + format.weights() - 32 }
}

fn run<R: Send>(world: usize, reduction: Reduction, f: impl Fn(&Group<Dev>) -> Result<R> + Sync) -> Vec<R> {
    ranks(world).run(|group| f(&group.with_reduction(reduction))).unwrap()
}

fn tensor<T: Element, B: Backend>(device: &B, array: &Array2<f64>) -> Result<shardwise::Tensor<T, B>> {
    let elements: Vec<T> = array.iter().map(|value| T::from_f64(*value)).collect();
    Tensor::from_slice(device, array.shape(), &elements)
}

/// The bits of the elements. −0 counts as 0: ranks that do not hold a row of a table add 0 to it.
fn bits<T: Element>(tensor: &Tensor<T, Dev>) -> Result<Vec<u64>> {
    Ok(tensor.to_vec()?.iter().map(|value| (value.to_f64() + 0.0).to_bits()).collect())
}

#[track_caller]
fn finite(bits: &[u64]) {
    assert!(!bits.is_empty() && bits.iter().all(|bits| f64::from_bits(*bits).is_finite()));
}

const BLOCKS: Reduction = Reduction::Invariant { blocks: 8 };

/// Computes y = x wᵀ by column- and by row-sharded layers on `world` ranks.
fn column<T: Element>(
    source: &(dyn WeightSource + Sync),
    x: &Array2<f64>,
    outputs: usize,
    world: usize,
    reduction: Reduction,
) -> Vec<Vec<u64>> {
    let parts = run(world, reduction, |group| {
        let columns = Columns::even(group, outputs)?;
        let layer =
            ColumnLinear::<T, Dev>::load(group, &Weights::new(source), x.ncols(), &columns, Bias::None)?;
        let y = layer.forward(DTensor::copied(group, tensor(group.device(), x)?)?)?.0;
        let y = y.into_local();
        let width = y.shape().cols();
        Ok((width, bits(&y)?))
    });
    (0..x.nrows())
        .map(|row| parts.iter().flat_map(|(width, y)| y[row * width..][..*width].to_vec()).collect())
        .collect()
}

fn row<T: Element>(
    source: &(dyn WeightSource + Sync),
    x: &Array2<f64>,
    (outputs, unit): (usize, usize),
    world: usize,
    reduction: Reduction,
) -> Vec<u64> {
    let all = run(world, reduction, |group| {
        let inputs = group.partition("test", "units", x.ncols() / unit, unit)?;
        let layer = RowParallelLinear::<Replicated, T, Dev>::load(
            group,
            &Weights::new(source),
            &inputs,
            outputs,
            false,
        )?;
        let own = x.slice(ndarray::s![.., inputs.range(group.rank())]).to_owned();
        let x = DTensor::<Shard<1>, T, Dev>::shard(group, tensor(group.device(), &own)?, &inputs)?;
        bits(&layer.forward(x)?.0.into_local())
    });
    assert!(all.iter().all(|y| *y == all[0]), "the ranks' results differ");
    all.into_iter().next().unwrap()
}

#[test]
fn every_format_has_the_same_bits_on_1_to_8_ranks() {
    for format in Format::ALL {
        let (outputs, inputs) = (37, cols(format));
        let source = Blocks::default().with("weight", format, [outputs, inputs]);
        let x = matrix(1, "x", 3, inputs);
        let one = column::<f32>(&source, &x, outputs, 1, Reduction::Fast);
        let by_blocks = row::<f32>(&source, &x, (outputs, 1), 1, BLOCKS);
        let by_heads = row::<f32>(&source, &x, (outputs, 64), 1, BLOCKS);
        let half = row::<bf16>(&source, &x, (outputs, 64), 1, BLOCKS);
        [&one.concat(), &by_blocks, &by_heads, &half].into_iter().for_each(|bits| finite(bits));
        for world in 2..=8 {
            assert_eq!(column::<f32>(&source, &x, outputs, world, Reduction::Fast), one, "{format} {world}");
            assert_eq!(column::<f32>(&source, &x, outputs, world, BLOCKS), one, "{format} {world}");
            // Canonical blocks begin inside chunks of 32 columns, or inside blocks of 256.
            assert_eq!(row::<f32>(&source, &x, (outputs, 1), world, BLOCKS), by_blocks, "{format} {world}");
            assert_eq!(row::<f32>(&source, &x, (outputs, 64), world, BLOCKS), by_heads, "{format} {world}");
            assert_eq!(row::<bf16>(&source, &x, (outputs, 64), world, BLOCKS), half, "{format} {world}");
        }
    }
}

/// Groups of columns in any order, as GPTQ's `desc_act` has them: a cut of columns divides every
/// group.
#[test]
fn groups_in_any_order_have_the_same_bits_on_1_to_8_ranks() {
    for format in [Format::Int4(GroupSize::G32), Format::Int8(GroupSize::G32)] {
        let (outputs, inputs) = (37, 9 * 64);
        let source = Blocks::default().with_order("weight", format, [outputs, inputs]);
        let (x, w) = (matrix(1, "x", 3, inputs), source.matrix("weight"));
        let want = reference::linear(&x, &w, None);
        let column_want = column::<f32>(&source, &x, outputs, 1, Reduction::Fast);
        let row_want = row::<f32>(&source, &x, (outputs, 1), 1, BLOCKS);
        [&column_want.concat(), &row_want].into_iter().for_each(|bits| finite(bits));
        for world in 2..=8 {
            assert_eq!(column::<f32>(&source, &x, outputs, world, BLOCKS), column_want, "{format} {world}");
            assert_eq!(row::<f32>(&source, &x, (outputs, 1), world, BLOCKS), row_want, "{format} {world}");
        }
        for world in [1, 3, 8] {
            let got = row::<f64>(&source, &x, (outputs, 1), world, Reduction::Fast);
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                let error = (f64::from_bits(*got) - want).abs();
                assert!(error <= 1e-12 * want.abs().max(10.0), "{format} on {world}: {error}");
            }
        }
    }
}

/// The widths that peers refuse: 231 and 86 groups on 2, 4 and 8 ranks, 90 blocks on 4 and 8.
#[test]
fn uneven_widths_have_the_same_bits() {
    for (groups, formats) in [
        (231, [Format::Q4_0, Format::Q8_0]),
        (90, [Format::Q4_1, Format::Q5_0]),
        (86, [Format::Q5_1, Format::Q4K]),
        (231, [Format::Int4(GroupSize::G128), Format::Fp8(GroupSize::G128)]),
    ] {
        for format in formats {
            let (outputs, inputs) = (5, groups * format.weights());
            let source = Blocks::default().with("weight", format, [outputs, inputs]);
            let x = matrix(1, "x", 2, inputs);
            let want = row::<f32>(&source, &x, (outputs, format.weights()), 1, BLOCKS);
            finite(&want);
            for world in [2, 4, 7, 8] {
                let got = row::<f32>(&source, &x, (outputs, format.weights()), world, BLOCKS);
                assert_eq!(got, want, "{groups} blocks of {format} on {world}");
            }
        }
    }
}

/// A row of y does not depend on the number of rows, nor on the threads of a rank.
#[test]
fn one_row_and_many_rows_have_the_same_bits() {
    let threads = |count| Threads::new(1).gemm_threads(std::num::NonZeroUsize::new(count).unwrap());
    // FP8 weights are multiplied as dense ones are.
    for format in Format::ALL.into_iter().filter(|format| !matches!(format, Format::Fp8(_))) {
        let (outputs, inputs, rows) = (50, cols(format), 513);
        let source = Blocks::default().with("weight", format, [outputs, inputs]);
        let x = matrix(1, "x", rows, inputs);
        let product = |x: &Array2<f64>, count| {
            let y = threads(count).run(|group| {
                let layer = ReplicatedLinear::<f32, Dev>::load(
                    &group,
                    &Weights::new(&source),
                    (inputs, outputs),
                    false,
                )?;
                bits(&layer.forward(DTensor::replicated(&group, tensor(group.device(), x)?)?)?.0.into_local())
            });
            y.unwrap().concat()
        };
        let all = product(&x, 1);
        finite(&all);
        assert_eq!(product(&x, 3), all, "{format} on 3 threads");
        for rows in [1, 2, 3, 5, 8, 9, 64] {
            let some = x.slice(ndarray::s![..rows, ..]).to_owned();
            assert_eq!(product(&some, 1), all[..rows * outputs], "{format}, {rows} rows");
        }
    }
}

/// The largest error of y = x wᵀ with activations rounded to 8 bits: d / 2 for each number of a
/// chunk, and the rounding of f32.
fn bound(x: &Array2<f64>, w: &Array2<f64>) -> Array2<f64> {
    let mut bound = Array2::zeros((x.nrows(), w.nrows()));
    for ((row, column), bound) in bound.indexed_iter_mut() {
        let (x, w) = (x.row(row), w.row(column));
        let largest = |chunk: usize| x.iter().skip(chunk * 32).take(32).map(|x| x.abs()).fold(0.0, f64::max);
        let rounding: f64 =
            w.iter().enumerate().map(|(at, w)| largest(at / 32) / 127.0 * 0.5001 * w.abs()).sum();
        // Codes and minima may cancel, so the terms of a chunk may be larger than its sum.
        let terms: f64 = x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f64>() + 32.0;
        *bound = rounding + terms * 1e-4;
    }
    bound
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// In f64 with exact activations, layers compute with the dequantized weights, forward and
    /// backward. With activations of 8 bits the error is within its bound.
    #[test]
    fn layers_compute_with_the_dequantized_weights(
        (format, world, tokens) in (0..Format::ALL.len(), 1..=8usize, 1..12usize),
        (outputs, more) in (1..60usize, 1..4usize),
        invariant: bool,
        seed: u64,
    ) {
        let format = Format::ALL[format];
        let inputs = more * format.weights();
        let source = Blocks::default().with("weight", format, [outputs, inputs]);
        let w = source.matrix("weight");
        let (x, dy) = (matrix(seed, "x", tokens, inputs), matrix(seed, "dy", tokens, outputs));
        let reduction = if invariant { BLOCKS } else { Reduction::Fast };
        let want = reference::linear(&x, &w, None);
        let got = row::<f32>(&source, &x, (outputs, 1), world, reduction);
        let limit = bound(&x, &w);
        prop_assert_eq!(got.len(), want.len());
        for ((got, want), limit) in got.iter().zip(&want).zip(&limit) {
            let error = (f64::from_bits(*got) - want).abs();
            prop_assert!(error <= *limit, "{format}: {error} > {limit}");
        }
        let got = column::<f32>(&source, &x, outputs, world, reduction).concat();
        prop_assert_eq!(got.len(), want.len());
        for ((got, want), limit) in got.iter().zip(&want).zip(&limit) {
            let error = (f64::from_bits(*got) - want).abs();
            prop_assert!(error <= *limit, "{format}: {error} > {limit}");
        }
        let source = source.exact();
        let backward = reference::linear_backward(&x, &w, &dy).dx;
        let parts = run(world, reduction, |group| {
            let columns = Columns::even(group, outputs)?;
            let layer = ColumnParallelLinear::<Replicated, f64, Dev>::load(
                group, &Weights::new(&source), inputs, &columns, Bias::None,
            )?;
            let (y, saved) = layer.forward(DTensor::replicated(group, tensor(group.device(), &x)?)?)?;
            let own = columns.partition().range(group.rank());
            let of_y = dy.slice(ndarray::s![.., own.clone()]).to_owned();
            let of_y = DTensor::<Shard<1>, f64, Dev>::shard(group, tensor(group.device(), &of_y)?, columns.partition())?;
            let dx = layer.backward(saved, of_y)?;
            assert!(layer.params().iter().all(|param| param.is_quantized() && param.grad().is_none()));
            Ok((own, y.into_local().to_array()?, dx.into_local().to_array()?))
        });
        for (own, y, dx) in parts {
            close("y", &y, &want.slice(ndarray::s![.., own]).to_owned(), 1e-12);
            close("dx", &dx, &backward, 1e-12);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// A matrix that is quantized at load has the same bits at every cut, and its error against the
    /// original weights is within d / 2 for each weight and each activation.
    #[test]
    fn quantization_at_load_is_within_its_bound(
        (inputs, outputs, tokens) in (1..150usize, 8..40usize, 1..6usize),
        (four_bits, by_row) in (any::<bool>(), any::<bool>()),
        world in 2..=8usize,
        seed: u64,
    ) {
        let (w, x) = (matrix(seed, "w", outputs, inputs), matrix(seed, "x", tokens, inputs));
        let arrays = Arrays([("weight".into(), w.clone().into_dyn())].into());
        let format = if four_bits { Format::Q4_1 } else { Format::Q8_0 };
        let source = Quantization::new(&arrays, format).unwrap();
        let source = if by_row && !four_bits { source.by_row().unwrap() } else { source };
        let one = column::<f32>(&source, &x, outputs, 1, Reduction::Fast);
        prop_assert_eq!(&column::<f32>(&source, &x, outputs, world, Reduction::Fast), &one);
        if inputs >= 8 {
            let by_blocks = row::<f32>(&source, &x, (outputs, 1), 1, BLOCKS);
            prop_assert_eq!(&row::<f32>(&source, &x, (outputs, 1), world, BLOCKS), &by_blocks);
        }
        let want = reference::linear(&x, &w, None);
        let spread = |w: ndarray::ArrayView1<'_, f64>| {
            let (least, most) = w.iter().fold((f64::MAX, f64::MIN), |(a, b), w| (a.min(*w), b.max(*w)));
            if four_bits { (most - least) / 15.0 } else { most.max(-least) / 127.0 }
        };
        let dequantized = bound(&x, &w);
        for ((token, output), want) in want.indexed_iter() {
            let (x, w) = (x.row(token), w.row(output));
            let error: f64 = (0..inputs).map(|at| {
                let group = at / 32 * 32..inputs.min(at / 32 * 32 + 32);
                let of = if by_row && !four_bits { w } else { w.slice(ndarray::s![group]) };
                // The scale and the minimum are rounded to f16.
                (spread(of) * 0.5 + w.iter().map(|w| w.abs()).fold(0.0, f64::max) * 2e-3) * x[at].abs() * 1.02
            }).sum();
            let limit = error + dequantized[[token, output]] * 1.1;
            let got = f64::from_bits(one[token][output]);
            prop_assert!((got - want).abs() <= limit, "{format}: {got} {want} {limit}");
        }
    }
}

/// The logits of a model that is quantized at load have the same bits on all numbers of ranks.
#[test]
fn a_quantized_model_has_the_same_bits_on_all_ranks() {
    let folder = shardwise_tests::root().join("tests/data/llama");
    let ModelConfig::Decoder(config) = ModelConfig::read(&folder).unwrap() else { panic!() };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let blocks = config.block.attention.heads;
    for format in [Format::Q8_0, Format::Q4_1] {
        let source = Quantization::new(&checkpoint, format).unwrap();
        let on = |world| {
            run(world, Reduction::Invariant { blocks }, |group| {
                let model = Decoder::<Replicated, f32, Dev>::load(group, &source, &config)?;
                assert!(model.params().iter().any(Param::is_quantized));
                let logits = model.infer(&[1, 200, 3, 41, 5], Sequences::one(5))?;
                let cols = logits.local().shape().cols();
                Ok((cols, bits(logits.local())?))
            })
        };
        let join = |parts: Vec<(usize, Vec<u64>)>| -> Vec<u64> {
            (0..5)
                .flat_map(|row| parts.iter().flat_map(move |(cols, y)| y[row * cols..][..*cols].to_vec()))
                .collect()
        };
        let one = join(on(1));
        finite(&one);
        for world in 2..=blocks {
            assert!(join(on(world)) == one, "{format} on {world} ranks");
        }
    }
}

/// q in `Q4_K`, k in `Q6_K` and v in f32 are one weight, also where ranks share key/value heads.
#[test]
fn merged_weights_of_several_formats_are_one_product() {
    let (heads, kv_heads, dim, hidden) = (9, 3, 8, 256);
    let source = Blocks::default()
        .with("q.weight", Format::Q4K, [heads * dim, hidden])
        .with("k.weight", Format::Q6K, [kv_heads * dim, hidden])
        .with_dense("v.weight", &[kv_heads * dim, hidden]);
    let x = matrix(1, "x", 4, hidden);
    let whole = |name: &str| reference::linear(&x, &source.matrix(name), None);
    let [q, k, v] = ["q.weight", "k.weight", "v.weight"].map(whole);
    let limits = ["q.weight", "k.weight"].map(|name| bound(&x, &source.matrix(name)));
    // With three blocks, no block shares its key/value head.
    for (reduction, worlds) in [(Reduction::Fast, 8), (Reduction::Invariant { blocks: 3 }, 3)] {
        let on = |world| {
            run(world, reduction, |group| {
                let query = group.partition("test", "heads", heads, 1)?;
                let heads = Heads::with_partition(query, kv_heads, dim)?;
                let columns = Columns::qkv(group, &heads, &QkvLayout::separate("q", "k", "v"))?;
                let layer = ColumnLinear::<f32, Dev>::load(
                    group,
                    &Weights::new(&source),
                    hidden,
                    &columns,
                    Bias::None,
                )?;
                let y = layer.forward(DTensor::copied(group, tensor(group.device(), &x)?)?)?.0.into_local();
                let own = (heads.query_range(group.rank()), heads.kv_range(group.rank()));
                Ok((own, y.to_array()?.into_dimensionality::<ndarray::Ix2>().unwrap()))
            })
        };
        for world in 1..=worlds {
            let mut seen = 0;
            for ((query, kv), y) in on(world) {
                let mut at = 0;
                let parts = [(&q, &query, Some(&limits[0])), (&k, &kv, Some(&limits[1])), (&v, &kv, None)];
                for (want, heads, limit) in parts {
                    for column in heads.start * dim..heads.end * dim {
                        for row in 0..4 {
                            let error = (f64::from(y[[row, at]]) - want[[row, column]]).abs();
                            let limit = limit.map_or(1e-4, |limit| limit[[row, column]]);
                            assert!(error <= limit, "{world} ranks, column {at}: {error} > {limit}");
                            seen += 1;
                        }
                        at += 1;
                    }
                }
                assert_eq!(at, y.ncols());
            }
            assert!(seen >= 4 * (heads + 2 * kv_heads) * dim);
        }
    }
}

/// A table gives the dequantized rows, wherever the vocabulary is cut, and the tied head is a
/// product with the same rows.
#[test]
fn tables_and_tied_heads_use_the_same_rows() {
    for format in [Format::Q8_0, Format::Q6K, Format::Q4_1] {
        let (words, hidden) = (41, format.weights());
        let source = Blocks::default().with("weight", format, [words, hidden]);
        let (table, ids) = (source.matrix("weight"), [40, 0, 17, 17, 3]);
        let on = |world| {
            let all = run(world, Reduction::Fast, |group| {
                let embedding = VocabParallelEmbedding::<Replicated, f32, Dev>::load(
                    group,
                    &Weights::new(&source),
                    words,
                    hidden,
                )?;
                let (x, rows) = embedding.forward(&ids, Sequences::one(5))?;
                let found = bits(x.local())?;
                let head = embedding.tied_head();
                let (logits, saved) = head.forward(x)?;
                let dx = head.backward(saved, logits.clone())?;
                embedding.backward(&rows, dx)?;
                assert!(embedding.params()[0].grad().is_none());
                Ok((found, logits.local().shape().cols(), bits(logits.local())?))
            });
            let logits: Vec<Vec<u64>> = (0..5)
                .map(|row| all.iter().flat_map(|(_, width, y)| y[row * width..][..*width].to_vec()).collect())
                .collect();
            (all[0].0.clone(), logits)
        };
        let want: Vec<u64> = ids
            .iter()
            .flat_map(|&id| table.row(id as usize).to_vec())
            .map(|value| (value + 0.0).to_bits())
            .collect();
        let one = on(1);
        finite(&one.1.concat());
        assert_eq!(one.0, want);
        for world in 2..=8 {
            let got = on(world);
            assert!(got.0 == one.0, "{format} on {world} ranks: rows of the table");
            assert!(got.1 == one.1, "{format} on {world} ranks: logits");
        }
    }
}

/// Optimizers and data parallelism train the rest of a model. A save names what it cannot write.
#[test]
fn quantized_weights_are_frozen() {
    let source = Blocks::default()
        .with("up.weight", Format::Q8_0, [12, 32])
        .with_dense("up.bias", &[12])
        .with_dense("down.weight", &[4, 12]);
    let folder = tempfile::tempdir().unwrap();
    run(2, Reduction::Fast, |group| {
        let (alone, weights) = (Group::solo(group.device()), Weights::new(&source));
        let columns = Columns::even(&alone, 12)?;
        let up = ColumnLinear::<f32, Dev>::load(&alone, &weights.at("up"), 32, &columns, Bias::Add)?;
        let down = RowLinear::<f32, Dev>::load(&alone, &weights.at("down"), columns.partition(), 4)?;
        let params = [up.params(), down.params()].concat();
        let frozen = params[0].value()?.to_vec()?;
        let parallel = DataParallel::new(group, &params)?;
        parallel.begin(GradReduce::Sum)?;
        let x = DTensor::copied(&alone, Tensor::full(group.device(), [3, 32], 0.5)?)?;
        let (y, saved_up) = up.forward(x)?;
        let (z, saved_down) = down.forward(y)?;
        let dz = DTensor::copied(&alone, z.into_local())?;
        up.backward(saved_up, down.backward(saved_down, dz)?)?;
        parallel.finish()?;
        assert!(params[0].grad().is_none() && params[1..].iter().all(|param| param.grad().is_some()));
        assert!(grad_norm(&params, &[&alone])? > 0.0);
        AdamW::new(AdamWConfig::default()).step(&params, 0.1, 1.0)?;
        assert_eq!(params[0].value()?.to_vec()?, frozen);
        let saved = weights::save(&alone, &params, folder.path().join(group.rank().to_string()));
        let error = saved.unwrap_err().to_string();
        assert!(error.contains("`up.weight` is quantized"), "{error}");
        let set = params[0].set(params[0].value()?).unwrap_err().to_string();
        assert!(set.contains("no dense store"), "{set}");
        Ok(())
    });
}

#[test]
fn what_cannot_be_computed_is_an_error() {
    let source = Blocks::default().with("weight", Format::Q4_0, [8, 64]);
    let alone = Group::solo(&Cpu::new());
    let load = |inputs| {
        ReplicatedLinear::<f64, Cpu>::load(&alone, &Weights::new(&source), (inputs, 8), false).map(|_| ())
    };
    let error = load(64).unwrap_err().to_string();
    assert!(error.contains("`weight`") && error.contains("Activations::Exact"), "{error}");
    let shape = QuantizedShape { format: Format::Q4_0, rows: 8, columns: 32..64, order: None };
    let region = Region::whole([8, 64]).narrow(1, 32..64);
    let cpu = Cpu::new();
    let mut read = |rows: Range<usize>, out: &mut [u8]| {
        source.read_blocks("weight", &region.clone().narrow(0, rows), out)
    };
    let w = cpu.quantized_matrix(shape.clone(), &mut read).unwrap();
    assert_eq!(Cpu::quantized_shape(&w), &shape);
    // Two panels' rows of codes and scales: 256 bytes and 32 bytes, for one chunk.
    assert_eq!(cpu.memory().live, 256 + 32);
    let product = |columns: Range<usize>, x: [usize; 2], y: [usize; 2]| {
        let (x, mut y) = (Tensor::<f32>::zeros(&cpu, x)?, Tensor::<f32>::zeros(&cpu, y)?);
        cpu.quantized_product(x.mat(), &w, columns, y.mat_mut()?)
    };
    product(0..32, [2, 32], [2, 8]).unwrap();
    product(8..8, [2, 0], [2, 8]).unwrap();
    for (columns, x, y, what) in [
        (0..32, [2, 31], [2, 8], "31"),
        (0..33, [2, 33], [2, 8], "33"),
        (0..32, [2, 32], [3, 8], "3"),
        (0..32, [2, 32], [2, 9], "9"),
    ] {
        let error = product(columns, x, y).unwrap_err();
        assert!(matches!(error, Error::Sizes { .. }) && error.to_string().contains(what), "{error}");
    }
    let mut y = Tensor::<f32>::zeros(&cpu, [1, 32]).unwrap();
    let error = cpu.dequantize(&w, &[8], 0..32, y.mat_mut().unwrap()).unwrap_err().to_string();
    assert!(error.contains("row 8") && error.contains("8 rows"), "{error}");
    // The memory of a matrix is given back.
    drop((w, y));
    assert_eq!(cpu.memory().live, 0);
}

/// A device without memory counts the bytes and the operations that a CPU has.
#[test]
fn a_plan_has_the_memory_and_the_operations_of_the_cpu() {
    fn step<B: Backend>(device: &B, source: &Blocks) -> Result<usize> {
        let group = Group::solo(device);
        let weights = Weights::new(source);
        let columns = Columns::even(&group, 40)?;
        let up = ColumnLinear::<f32, B>::load(&group, &weights.at("up"), 256, &columns, Bias::None)?;
        let down = RowLinear::<f32, B>::load(&group, &weights.at("down"), columns.partition(), 8)?;
        let held = device.memory().live;
        let x = DTensor::copied(&group, shardwise::Tensor::zeros(device, [3, 256])?)?;
        let (y, saved) = up.forward(x)?;
        down.forward(y)?;
        drop(saved);
        Ok(held)
    }
    for format in [Format::Q4K, Format::Q5_1, Format::Q6K] {
        let source =
            Blocks::default().with("up.weight", format, [40, 256]).with("down.weight", Format::Q8_0, [8, 40]);
        let (cpu, meta) = (Cpu::new(), Meta::new());
        assert_eq!(step(&cpu, &source).unwrap(), step(&meta, &source).unwrap());
        assert_eq!((cpu.memory(), cpu.flops()), (meta.memory(), meta.flops()));
        assert!(meta.flops() > 0);
    }
}

/// A matrix takes at most 3 % more memory than its blocks in a file.
#[test]
fn panels_are_as_large_as_the_file() {
    for format in Format::ALL {
        let source = Blocks::default().with("weight", format, [64, 1024]);
        let cpu = Cpu::new();
        let group = Group::solo(&cpu);
        let layer =
            ReplicatedLinear::<f32, Cpu>::load(&group, &Weights::new(&source), (1024, 64), false).unwrap();
        let (held, stored) = (cpu.memory().live, source.matrices["weight"].2.len());
        assert!(held >= stored && held * 100 <= stored * 103, "{format}: {held} for {stored}");
        assert!(layer.params()[0].is_quantized());
    }
}
