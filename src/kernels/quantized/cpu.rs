//! Quantized weights on the CPU.

#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Vnni, with_avx2, with_vnni};
use super::{
    Quantized, QuantizedShape, ReadBlocks, check, check_rows,
    lanes::Portable,
    panel::{self, Panels, ROWS, narrow},
    product::Product,
    rows::Rows,
};
use crate::{
    device::{Cpu, Device, Element, HeldBytes, Kernel, vectorized},
    error::Result,
    kernels::{MatMut, MatRef, NO_ROW},
};
use std::{fmt, ops::Range};

/// A product with fewer multiplications than this runs on one thread.
const PARALLEL: usize = 1 << 22;

/// A quantized matrix in the CPU's memory.
pub struct CpuQuantized {
    panels: Panels,
    /// Counts the bytes of the panels as memory of the device.
    _held: HeldBytes,
}

impl fmt::Debug for CpuQuantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuQuantized({:?})", self.panels.shape)
    }
}

/// The instructions of a product.
#[derive(Clone, Copy, Debug)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Quantized for Cpu {
    type QuantizedMatrix = CpuQuantized;

    fn quantized_matrix(&self, shape: QuantizedShape, read: &mut ReadBlocks<'_>) -> Result<CpuQuantized> {
        let panels = Panels::load(shape, read)?;
        Ok(CpuQuantized { _held: self.hold(panel::bytes(&panels.shape)), panels })
    }

    fn quantized_shape(w: &CpuQuantized) -> &QuantizedShape {
        &w.panels.shape
    }

    #[inline(never)]
    fn quantized_product<T: Element, C: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: &CpuQuantized,
        columns: Range<usize>,
        mut y: MatMut<'_, C, Self>,
    ) -> Result<()> {
        let (w, shape) = (&w.panels, &w.panels.shape);
        check(&x, shape, &columns, &y)?;
        let start = shape.columns.start;
        let work = x.rows() * x.cols() * shape.rows;
        self.count(2 * work as u128);
        let columns = start + columns.start..start + columns.end;
        let x = if w.layout.is_float { Rows::widen(x, &columns)? } else { Rows::quantize(x, &columns)? };
        let panels = shape.rows.div_ceil(ROWS);
        let threads = if work < PARALLEL { 1 } else { self.threads().min(panels) };
        let mut store = |row: usize, panel: usize, sums: &[f32; ROWS]| {
            let y = &mut y.row(row)[panel * ROWS..];
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = narrow(*sum));
        };
        if threads <= 1 {
            multiply(Instructions::best(), (w, &x, 0..panels), &mut store);
            return Ok(());
        }
        // Each thread computes some panels to memory of its own, because their columns of y are
        // not contiguous.
        let (each, tokens) = (panels.div_ceil(threads), x.tokens);
        let mut sums = self.empty::<f32>(panels * tokens * ROWS)?;
        let parts = sums.chunks_mut((each * tokens * ROWS).max(1)).enumerate();
        std::thread::scope(|scope| {
            for (part, sums) in parts {
                let (x, own) = (&x, part * each..panels.min((part + 1) * each));
                scope.spawn(move || {
                    multiply(
                        Instructions::best(),
                        (w, x, own.clone()),
                        &mut |row, panel, of: &[f32; ROWS]| {
                            sums[((panel - own.start) * tokens + row) * ROWS..][..ROWS].copy_from_slice(of);
                        },
                    );
                });
            }
        });
        for (at, sums) in sums.as_chunks::<ROWS>().0.iter().enumerate() {
            store(at % tokens, at / tokens, sums);
        }
        Ok(())
    }

    #[inline(never)]
    fn dequantize<T: Element>(
        &self,
        w: &CpuQuantized,
        rows: &[u32],
        columns: Range<usize>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_rows(&w.panels.shape, rows, &columns, &y)?;
        vectorized(Dequantize { panels: &w.panels, rows, columns, y });
        Ok(())
    }
}

/// [`Quantized::dequantize`] as a kernel, because a closure of this length is not inlined.
struct Dequantize<'a, 'y, T: Element> {
    panels: &'a Panels,
    rows: &'a [u32],
    columns: Range<usize>,
    y: MatMut<'y, T, Cpu>,
}

impl<T: Element> Kernel for Dequantize<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn compute(mut self) {
        let mut groups = Vec::new();
        for (at, &row) in self.rows.iter().enumerate() {
            let y = self.y.row(at);
            match row {
                NO_ROW => y.fill(T::default()),
                row => self.panels.row(row as usize, &self.columns, &mut groups, y),
            }
        }
    }
}

impl Instructions {
    /// All that this processor has, the fastest first.
    fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors =
            [Vnni::detect().map(|_| Self::Vnni), Avx2::detect().map(|_| Self::Avx2)].into_iter().flatten();
        #[cfg(not(target_arch = "x86_64"))]
        let vectors = std::iter::empty();
        vectors.chain([Self::Portable])
    }

    fn best() -> Self {
        Self::all().next().unwrap_or(Self::Portable)
    }
}

/// Computes some panels of a product and passes each 16 columns of a row of y to `store`.
fn multiply(
    instructions: Instructions,
    (weights, x, panels): (&Panels, &Rows, Range<usize>),
    store: &mut dyn FnMut(usize, usize, &[f32; ROWS]),
) {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Vnni => {
            let lanes = Vnni::detect().expect("detected by `Instructions::all`");
            with_vnni(lanes, Product { lanes, weights, x, panels, store });
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => {
            let lanes = Avx2::detect().expect("detected by `Instructions::all`");
            with_avx2(lanes, Product { lanes, weights, x, panels, store });
        }
        Instructions::Portable => Product { lanes: Portable, weights, x, panels, store }.compute(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::Format, rng::Philox};

    /// Random blocks whose f16 numbers are finite.
    fn random_blocks(format: Format, count: usize, seed: u64) -> Vec<u8> {
        let random = Philox::stream(seed, 0);
        let mut blocks: Vec<u8> =
            (0..count * format.bytes()).map(|at| (random.uniform(at as u64) * 256.0) as u8).collect();
        if format.is_wide() {
            for (at, block) in blocks.chunks_exact_mut(format.bytes()).enumerate() {
                let scale = random.uniform((1 << 40) + at as u64) as f32 - 0.5;
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
            // Exponents 8 to 15, so between 2⁻⁷ and 2.
            halves.iter().for_each(|&at| block[at + 1] = block[at + 1] & 0x9f | 0x20);
        }
        blocks
    }

    #[test]
    fn all_instructions_give_the_same_bits() {
        for format in Format::ALL {
            let columns = 5..5 + 2 * format.weights() + 9;
            let shape = QuantizedShape { format, rows: 37, columns: columns.clone(), order: None };
            let blocks = random_blocks(format, 37 * shape.blocks().len(), 3);
            let row_bytes = shape.blocks().len() * format.bytes();
            let weights = Panels::load(shape, &mut |rows, out| {
                out.copy_from_slice(&blocks[rows.start * row_bytes..rows.end * row_bytes]);
                Ok(())
            })
            .unwrap();
            let random = Philox::stream(4, 1);
            let mut x: Vec<f32> =
                (0..11 * columns.len()).map(|at| random.uniform(at as u64) as f32 - 0.5).collect();
            x[3] = f32::NAN;
            x[columns.len() + 7] = f32::INFINITY;
            x[2 * columns.len()..3 * columns.len()].fill(0.0);
            x[3 * columns.len()..4 * columns.len()].fill(1e-42);
            let of_x = MatRef::new(&x[..], 11, columns.len()).unwrap();
            let rows =
                if format.is_integer() { Rows::quantize } else { Rows::widen }(of_x, &columns).unwrap();
            let product = |instructions| {
                let mut y = vec![f32::MAX; 11 * 48];
                multiply(instructions, (&weights, &rows, 0..3), &mut |row, panel, sums| {
                    y[row * 48 + panel * ROWS..][..ROWS].copy_from_slice(sums);
                });
                y.iter().map(|y| if y.is_nan() { u32::MAX } else { y.to_bits() }).collect::<Vec<_>>()
            };
            let want = product(Instructions::Portable);
            for instructions in Instructions::all() {
                assert_eq!(product(instructions), want, "{format} by {instructions:?}");
            }
            let is_number = |y: &u32| f32::from_bits(*y).is_finite();
            assert!(!want[..37].iter().any(is_number) && !want[48..85].iter().any(is_number), "{format}");
            assert!(want[2 * 48..][..37].iter().all(|y| *y == 0), "{format}");
            // Only integers count numbers that are too small to be divided as 0.
            let is_zero = want[3 * 48..][..37].iter().all(|y| *y == 0);
            assert_eq!(is_zero, format.is_integer(), "{format}");
            assert!(want[4 * 48..].chunks_exact(48).all(|row| row[..37].iter().all(is_number)), "{format}");
        }
    }
}
