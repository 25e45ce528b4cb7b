//! Compares products with quantized weights on the GPU with those of the CPU, bit by bit, and
//! layers with such weights.

use crate::{
    dev::{self, ranks},
    support::close,
};
use half::{bf16, f16};
use ndarray::ArrayD;
use shardwise::{
    Error, Result, Tensor,
    comm::Group,
    device::{Cpu, Device, Element},
    kernels::{Activations, Backend, ColumnGroups, Format, GroupSize, NO_ROW, Quantized, QuantizedShape},
    launch::Threads,
    parallel::{
        Bias, ColumnParallelLinear, Columns, DTensor, Layer, RowParallelLinear, VocabParallelEmbedding,
    },
    rng::Philox,
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Random, Weights},
    weights::Quantization,
};
use std::ops::Range;

/// The rows of a matrix: three panels of 16 rows, the last of which is not full.
const ROWS: usize = 37;

/// Random blocks of `ROWS` rows, whose f16 numbers are finite. Some are subnormal.
fn random_blocks(shape: &QuantizedShape) -> Vec<u8> {
    let (format, random) = (shape.format, Philox::stream(3, 0));
    let len = shape.rows * format.blocks(shape.columns.clone()).len() * format.bytes();
    let mut blocks: Vec<u8> = (0..len as u64).map(|at| (random.uniform(at) * 256.0) as u8).collect();
    if let Format::Int4(_) | Format::Int8(_) | Format::Fp8(_) = format {
        for (at, block) in blocks.chunks_exact_mut(format.bytes()).enumerate() {
            let scale = random.normal((1 << 40) + at as u64) as f32;
            block[..4].copy_from_slice(&scale.to_le_bytes());
            // FP8 codes are not NaN.
            block[4..].iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code -= 1);
        }
        return blocks;
    }
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q6K => &[208],
        _ => &[0, 2],
    };
    for block in blocks.chunks_exact_mut(format.bytes()) {
        // Exponents 0 to 15.
        halves.iter().for_each(|&at| block[at + 1] &= 0xbf);
    }
    blocks
}

/// Loads a matrix on a device, and checks that its rows are read in order.
fn load<B: Backend>(device: &B, shape: &QuantizedShape, blocks: &[u8]) -> B::QuantizedMatrix {
    let row_bytes = shape.format.blocks(shape.columns.clone()).len() * shape.format.bytes();
    let mut next = 0;
    let w = device.quantized_matrix(shape.clone(), &mut |rows, out| {
        assert_eq!(rows.start, next);
        next = rows.end;
        out.copy_from_slice(&blocks[rows.start * row_bytes..rows.end * row_bytes]);
        Ok(())
    });
    assert_eq!(next, shape.rows);
    w.unwrap()
}

/// The bits of numbers. All NaNs have the same.
fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values
        .iter()
        .map(|value| if value.to_f64().is_nan() { u64::MAX } else { value.to_f64().to_bits() })
        .collect()
}

/// Activations: the first five rows have NaN, infinity, only zeros, numbers too small to be divided
/// by, and large numbers.
fn activations<T: Element>(tokens: usize, cols: usize) -> Vec<T> {
    let random = Philox::stream(4, 1);
    let mut x: Vec<T> = (0..(tokens * cols) as u64).map(|at| T::from_f64(random.normal(at) * 3.0)).collect();
    for (row, x) in x.chunks_exact_mut(cols.max(1)).enumerate().filter(|_| tokens > 2) {
        match row {
            0 => x[cols / 2] = T::from_f64(f64::NAN),
            1 => x[cols - 1] = T::from_f64(f64::NEG_INFINITY),
            2 => x.fill(T::default()),
            3 => x.fill(T::from_f64(1e-42)),
            4 => x.iter_mut().for_each(|x| *x = T::from_f64(x.to_f64() * 1e3)),
            _ => {}
        }
    }
    x
}

/// Fills a matrix that is part of a larger one, and returns the bits of all of it. The memory has
/// NaN before.
fn fill<T: Element, B: Backend>(
    device: &B,
    [rows, cols]: [usize; 2],
    write: impl FnOnce(shardwise::kernels::MatMut<'_, T, B>) -> Result<()>,
) -> Vec<u64> {
    let nans = vec![T::from_f64(f64::NAN); rows * (cols + 3)];
    let mut y = Tensor::from_slice(device, [rows, cols + 3], &nans).unwrap();
    write(y.mat_mut().unwrap().columns(1..1 + cols)).unwrap();
    bits(&y.to_vec().unwrap())
}

fn product<T: Element, C: Element, B: Backend>(
    device: &B,
    w: &B::QuantizedMatrix,
    columns: &Range<usize>,
    tokens: usize,
) -> Vec<u64> {
    let values = activations::<T>(tokens, columns.len() + 5);
    let x = Tensor::from_slice(device, [tokens, columns.len() + 5], &values).unwrap();
    fill::<C, B>(device, [tokens, ROWS], |y| {
        device.quantized_product(x.mat().columns(2..2 + columns.len()), w, columns.clone(), y)
    })
}

fn dequantized<T: Element, B: Backend>(
    device: &B,
    w: &B::QuantizedMatrix,
    columns: &Range<usize>,
    rows: &[u32],
) -> Vec<u64> {
    fill::<T, B>(device, [rows.len(), columns.len()], |y| device.dequantize(w, rows, columns.clone(), y))
}

#[track_caller]
fn same_bits(what: &str, got: &[u64], want: &[u64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differs = got.iter().zip(want).position(|(got, want)| got != want);
    assert!(
        differs.is_none(),
        "{what}, element {differs:?}: {:?}",
        differs.map(|at| [got[at], want[at]].map(f64::from_bits))
    );
}

#[test]
fn products_and_dequantized_rows_have_the_cpus_bits() {
    let (cuda, cpu) = (dev::poisoned(), Cpu::poisoned());
    let rows = [3, NO_ROW, 36, 0, 3, 15, 16];
    for format in Format::ALL {
        // The cuts are inside chunks of 32 and blocks of 256, and the longest has three times as
        // many chunks as a block of the kernel multiplies at once.
        for columns in [5..1105, 250..262, 300..310, 224..320, 7..7] {
            let len = columns.len();
            let shape = QuantizedShape { format, rows: ROWS, columns, order: None };
            let blocks = random_blocks(&shape);
            let (on_cuda, on_cpu) = (load(&cuda, &shape, &blocks), load(&cpu, &shape, &blocks));
            assert_eq!(dev::Dev::quantized_shape(&on_cuda), &shape);
            for columns in [0..len, len / 3..len - len / 4, len / 2..len / 2] {
                macro_rules! compare {
                    ($tokens:expr, $($x:ty, $y:ty;)*) => {$(
                        let got = product::<$x, $y, _>(&cuda, &on_cuda, &columns, $tokens);
                        let want = product::<$x, $y, _>(&cpu, &on_cpu, &columns, $tokens);
                        let what = format!("{format}, {columns:?} of {:?}, {} tokens", shape.columns, $tokens);
                        same_bits(&what, &got, &want);
                    )*};
                }
                for tokens in [1, 2, 5, 9, 33] {
                    compare!(tokens, bf16, bf16;);
                }
                compare!(5, f32, f32; f16, f16; bf16, f32; f32, f64;);
                compare!(33, f32, f32;);
                macro_rules! dequantize {
                    ($($y:ty),*) => {$(
                        let got = dequantized::<$y, _>(&cuda, &on_cuda, &columns, &rows);
                        let want = dequantized::<$y, _>(&cpu, &on_cpu, &columns, &rows);
                        same_bits(&format!("{format}, {columns:?} of {:?}", shape.columns), &got, &want);
                    )*};
                }
                dequantize!(f64, f32, bf16, f16);
                assert!(dequantized::<f32, _>(&cuda, &on_cuda, &columns, &[]).is_empty());
                assert!(product::<f32, f32, _>(&cuda, &on_cuda, &columns, 0).is_empty());
            }
            let number = |bits: &&u64| f64::from_bits(**bits).is_finite();
            let y = product::<f32, f32, _>(&cuda, &on_cuda, &(0..len), 5);
            let (width, numbers) = (ROWS + 3, [0, 1, 2, 3, 4].map(|row| row * (ROWS + 3)));
            let counts = numbers.map(|row| y[row..row + width].iter().filter(number).count());
            // NaN and infinity are in these columns only where they have at least half of x's.
            assert_eq!(counts[2..], [ROWS; 3], "{format}");
            assert!(len < 6 || counts[0] == 0, "{format}, {counts:?}");
        }
    }
}

/// Groups of columns in any order: rows are dequantized, and products are refused.
#[test]
fn groups_in_any_order_have_the_cpus_bits() {
    let (cuda, cpu, random) = (dev::poisoned(), Cpu::poisoned(), Philox::stream(5, 2));
    for format in [Format::Int4(GroupSize::G32), Format::Int8(GroupSize::G128)] {
        let (columns, groups) = (37..333, 11);
        let of: Vec<u32> = columns.clone().map(|at| (random.uniform(at as u64) * 11.0) as u32).collect();
        let order = Some(ColumnGroups { groups, of: of.into() });
        let shape = QuantizedShape { format, rows: ROWS, columns: columns.clone(), order };
        let mut rows: Vec<u8> = (0..ROWS * shape.row_bytes())
            .map(|at| (random.uniform((1 << 30) + at as u64) * 256.0) as u8)
            .collect();
        for (at, row) in rows.chunks_exact_mut(shape.row_bytes()).enumerate() {
            for (group, head) in row.chunks_exact_mut(5).take(groups).enumerate() {
                let scale = random.normal((1 << 40) + (at * groups + group) as u64) as f32;
                head[..4].copy_from_slice(&scale.to_le_bytes());
            }
        }
        fn read<B: Backend>(device: &B, shape: &QuantizedShape, rows: &[u8]) -> B::QuantizedMatrix {
            let w = device.quantized_matrix(shape.clone(), &mut |own, out| {
                out.copy_from_slice(&rows[own.start * shape.row_bytes()..own.end * shape.row_bytes()]);
                Ok(())
            });
            w.unwrap()
        }
        let (on_cuda, on_cpu) = (read(&cuda, &shape, &rows), read(&cpu, &shape, &rows));
        for columns in [0..296, 3..290, 100..101] {
            let got = dequantized::<f32, _>(&cuda, &on_cuda, &columns, &[3, NO_ROW, 36, 0, 16]);
            let want = dequantized::<f32, _>(&cpu, &on_cpu, &columns, &[3, NO_ROW, 36, 0, 16]);
            same_bits(&format!("{format}, {columns:?}"), &got, &want);
        }
        let (x, mut y) = (
            Tensor::<f32, _>::zeros(&cuda, [1, 296]).unwrap(),
            Tensor::<f32, _>::zeros(&cuda, [1, ROWS]).unwrap(),
        );
        let error = cuda.quantized_product(x.mat(), &on_cuda, 0..296, y.mat_mut().unwrap()).unwrap_err();
        assert!(error.to_string().contains("not consecutive columns"), "{error}");
    }
}

/// A matrix that is larger than what the host builds at a time, and its memory.
#[test]
fn large_matrices_are_loaded_in_pieces() {
    let (cuda, cpu) = (dev::poisoned(), Cpu::poisoned());
    let shape = QuantizedShape { format: Format::Q8_0, rows: 9001, columns: 0..1024, order: None };
    let blocks: Vec<u8> =
        (0..9001 * 32 * 34_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 25) as u8).collect();
    let (on_cuda, on_cpu) = (load(&cuda, &shape, &blocks), load(&cpu, &shape, &blocks));
    // A full panel has the bytes of its blocks.
    assert_eq!(cuda.memory().live, 9008 * 32 * 34);
    let rows = [0, 4095, 7695, 7696, 7711, 8999, 9000];
    let got = dequantized::<f32, _>(&cuda, &on_cuda, &(0..1024), &rows);
    same_bits("dequantized rows", &got, &dequantized::<f32, _>(&cpu, &on_cpu, &(0..1024), &rows));
    drop(on_cuda);
    assert_eq!(cuda.memory().live, 0);
}

/// The errors of wrong operands.
fn errors<B: Backend>(device: &B) -> Vec<Error> {
    let shape = QuantizedShape { format: Format::Q4K, rows: ROWS, columns: 10..80, order: None };
    let w = load(device, &shape, &random_blocks(&shape));
    fn tensor<T: Element, B: Backend>(device: &B, rows: usize, cols: usize) -> Tensor<T, B> {
        Tensor::zeros(device, [rows, cols]).unwrap()
    }
    let multiply = |x: [usize; 2], columns: Range<usize>, y: [usize; 2]| {
        let (x, mut y) = (tensor::<f32, B>(device, x[0], x[1]), tensor::<f32, B>(device, y[0], y[1]));
        device.quantized_product(x.mat(), &w, columns, y.mat_mut().unwrap())
    };
    let dequantize = |rows: &[u32], columns: Range<usize>, y: [usize; 2]| {
        let mut y = tensor::<bf16, B>(device, y[0], y[1]);
        device.dequantize(&w, rows, columns, y.mat_mut().unwrap())
    };
    let (x, mut y) = (tensor::<f64, B>(device, 2, 70), tensor::<f64, B>(device, 2, ROWS));
    #[allow(clippy::reversed_empty_ranges)]
    let outcomes = [
        device.quantized_product(x.mat(), &w, 0..70, y.mat_mut().unwrap()),
        multiply([2, 71], 0..71, [2, ROWS]),
        multiply([2, 1], 3..2, [2, ROWS]),
        multiply([2, 60], 0..61, [2, ROWS]),
        multiply([2, 70], 0..70, [3, ROWS]),
        multiply([2, 70], 0..70, [2, ROWS - 1]),
        dequantize(&[0, ROWS as u32], 0..70, [2, 70]),
        dequantize(&[0], 0..71, [1, 71]),
        dequantize(&[0, 1], 0..70, [1, 70]),
        dequantize(&[0], 1..70, [1, 70]),
        // A source that cannot be read.
        device.quantized_matrix(shape, &mut |_, _| Err(Error::invalid("blocks", "lost"))).map(drop),
    ];
    outcomes.map(Result::unwrap_err).into()
}

#[test]
fn errors_are_the_cpus() {
    let (got, want) = (errors(&dev::fresh()), errors(&Cpu::new()));
    assert_eq!(got, want);
    assert!(matches!(got[0], Error::Unsupported { .. }), "{}", got[0]);
}

/// The sizes of layers: words, features and hidden features, none of which ranks share evenly.
const WORDS: usize = 45;
const HIDDEN: usize = 70;
const INNER: usize = 101;

/// Runs an embedding, a column-parallel layer, a row-parallel layer and the tied head, and returns
/// the results of each: x, h, y, the logits, and the gradient of h.
fn layers<T: Element, B: Backend>(
    group: &Group<B>,
    format: Format,
    activations: Activations,
    reduction: Reduction,
) -> Result<Vec<Vec<T>>> {
    let group = &group.with_reduction(reduction);
    let random = Random::normal(1, 0.3);
    let source = Quantization::new(&random, format)?.with_activations(activations);
    let weights = Weights::new(&source);
    let embedding =
        VocabParallelEmbedding::<Replicated, T, B>::load(group, &weights.at("table"), WORDS, HIDDEN)?;
    let (x, _) = embedding.forward(&[7, 44, 0, 7, 22], Sequences::one(5))?;
    let mut results = vec![x.local().to_vec()?];
    let inner = Columns::even(group, INNER)?;
    let up =
        ColumnParallelLinear::<Replicated, T, B>::load(group, &weights.at("up"), HIDDEN, &inner, Bias::None)?;
    let (h, _) = up.forward(x.clone())?;
    results.push(h.local().to_vec()?);
    let h = DTensor::<Shard<1>, T, B>::shard(group, h.into_local(), inner.partition())?;
    let down = RowParallelLinear::<Replicated, T, B>::load(
        group,
        &weights.at("down"),
        inner.partition(),
        HIDDEN,
        false,
    )?;
    let (y, saved) = down.forward(h)?;
    results.push(y.local().to_vec()?);
    results.push(embedding.tied_head().forward(y.clone())?.0.local().to_vec()?);
    results.push(down.backward(saved, y)?.local().to_vec()?);
    assert!(down.params().iter().chain(&up.params()).all(|param| param.is_quantized()));
    Ok(results)
}

/// Products with activations of 8 bits have the CPU's bits, also at cuts inside chunks. Products
/// with exact activations, and the gradient, are cuBLASLt's. With an invariant reduction, both have
/// the same bits on any number of ranks.
#[test]
fn layers_are_the_cpus() {
    /// Returns the results of rank 0.
    fn one<T: Element>(
        world: usize,
        (format, activations): (Format, Activations),
        reduction: Reduction,
        most: f64,
    ) -> Vec<Vec<u64>> {
        let all = ranks(world).run(|group| layers::<T, _>(&group, format, activations, reduction)).unwrap();
        let want =
            Threads::new(world).run(|group| layers::<T, _>(&group, format, activations, reduction)).unwrap();
        assert_eq!(all.len(), world);
        for (rank, (got, want)) in all.iter().zip(&want).enumerate() {
            assert_eq!(got.len(), want.len());
            for (at, (got, want)) in got.iter().zip(want).enumerate() {
                let what = format!("{format}, {activations:?}, {}, rank {rank} of {world}, {at}", T::DTYPE);
                assert!(!got.is_empty() && got.iter().all(|value| value.to_f64().is_finite()), "{what}");
                // The table's rows have the same bits in any case, and the gradient never.
                if at == 0 || activations == Activations::Int8 && at < 4 {
                    same_bits(&what, &bits(got), &bits(want));
                    continue;
                }
                let array =
                    |values: &[T]| ArrayD::from_shape_fn(vec![values.len()], |at| values[at[0]].to_f64());
                close(&what, &array(got), &array(want), most);
            }
        }
        all[0].iter().map(|values| bits(values)).collect()
    }
    /// Compares what every rank has as a whole: x and y.
    fn same_on_all_worlds(run: impl Fn(usize) -> Vec<Vec<u64>>) {
        let want = run(1);
        for world in [2, 3] {
            let got = run(world);
            for at in [0, 2] {
                same_bits(&format!("{world} ranks, result {at}"), &got[at], &want[at]);
            }
        }
    }
    let blocks = Reduction::Invariant { blocks: 8 };
    for world in [1, 2, 3] {
        one::<f32>(world, (Format::Q8_0, Activations::Int8), Reduction::Fast, 1e-5);
        one::<f64>(world, (Format::Q8_0, Activations::Exact), Reduction::Fast, 1e-12);
    }
    same_on_all_worlds(|world| one::<bf16>(world, (Format::Q4_1, Activations::Int8), blocks, 2e-2));
    same_on_all_worlds(|world| one::<f16>(world, (Format::Q4_0, Activations::Int8), blocks, 4e-3));
    same_on_all_worlds(|world| one::<bf16>(world, (Format::Q4_0, Activations::Exact), blocks, 2e-2));
    same_on_all_worlds(|world| one::<f32>(world, (Format::Q8_0, Activations::Exact), blocks, 1e-5));
}
