//! Quantized weights on NVIDIA GPUs by the kernels of `cuda/quantized.cu`, with the bits of the
//! CPU.

use super::{
    CHUNK, Quantized, QuantizedShape, ReadBlocks, check, check_rows,
    panel::{Layout, Line, Panels, ROWS},
};
use crate::{
    device::{
        DType, Device, Element,
        cuda::{Cuda, CudaBuffer, Grid, Kernel, Launch, Table},
    },
    error::Result,
    kernels::{MatMut, MatRef},
};
use std::{fmt, ops::Range};

/// The bytes of panels that are built on the host at a time, unless a panel has more.
const PIECE: usize = 8 << 20;

/// The tokens of a block of threads of the product, and the chunks that it multiplies at a time.
const TOKENS: usize = 16;
const LANES: u32 = 16;

/// The words of 32 bits of a chunk of activations: its codes, d, the sums of both halves, and one
/// that is not used.
const CHUNK_WORDS: usize = CHUNK / 4 + 4;

/// A quantized matrix in the memory of a GPU: the codes and the scales of [`Panels`].
pub struct CudaQuantized {
    shape: QuantizedShape,
    layout: Layout,
    /// Words of 32 bits. Buffers hold elements, and f32 is the element of that size.
    codes: CudaBuffer<f32>,
    scales: CudaBuffer<f32>,
}

impl fmt::Debug for CudaQuantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaQuantized({:?})", self.shape)
    }
}

impl CudaQuantized {
    /// The first column of the first block that a row has. The kernels count columns from there.
    fn origin(&self) -> usize {
        self.shape.blocks().start * self.layout.span * CHUNK
    }

    /// Prepares a launch of a kernel whose first parameters are WEIGHTS.
    /// `order` has the groups of the columns if they are not consecutive columns.
    fn launch<'a>(&self, cuda: &'a Cuda, kernel: Kernel, of: DType, order: Option<&Table>) -> Launch<'a> {
        let Layout { bits, offset, minimum, factors, span, wide, zeros, is_float } = self.layout;
        let (chunks, blocks) = (self.shape.chunks(), self.shape.blocks());
        let offset = usize::try_from(offset).expect("offsets are not negative");
        let launch = cuda.kernel(kernel, of).ints([bits, offset, usize::from(minimum), factors, span]);
        let launch = launch.ints([wide, zeros, is_float].map(usize::from));
        let launch = launch.ints([chunks.start - blocks.start * span, chunks.len(), blocks.len()]);
        let launch = launch.read(Cuda::slice(&self.codes)).read(Cuda::slice(&self.scales));
        launch.table_if(order).int(order.map_or(0, |_| self.shape.columns.start))
    }
}

/// The words of 32 bits of a panel's codes and of its scales.
fn panel_words(shape: &QuantizedShape, layout: Layout) -> [usize; 2] {
    let lines = shape.chunks().len().saturating_mul(layout.lines());
    [lines.saturating_mul(size_of::<Line>() / 4), shape.blocks().len().saturating_mul(layout.scales() / 4)]
}

/// Bytes as words of 32 bits. Their bits are those of the bytes, whichever numbers they are.
fn words<'a>(bytes: impl Iterator<Item = &'a [u8; 4]>) -> Vec<f32> {
    bytes.map(|word| f32::from_bits(u32::from_ne_bytes(*word))).collect()
}

impl Quantized for Cuda {
    type QuantizedMatrix = CudaQuantized;

    /// As many as keep a GPU busy.
    const STRIP: usize = 1 << 24;

    /// Builds some panels at a time on the host.
    fn quantized_matrix(&self, shape: QuantizedShape, read: &mut ReadBlocks<'_>) -> Result<CudaQuantized> {
        shape.check()?;
        let layout = Layout::of(shape.format);
        let (panels, [codes, scales]) = (shape.rows.div_ceil(ROWS), panel_words(&shape, layout));
        let mut w = CudaQuantized {
            layout,
            codes: self.empty(panels.saturating_mul(codes))?,
            scales: self.empty(panels.saturating_mul(scales))?,
            shape,
        };
        let piece = (PIECE / 4 / codes.saturating_add(scales).max(1)).clamp(1, panels.max(1));
        for first in (0..panels).step_by(piece) {
            let (end, start) = (panels.min(first + piece), first * ROWS);
            let rows = w.shape.rows.min(end * ROWS) - start;
            let some = Panels::load(QuantizedShape { rows, ..w.shape.clone() }, &mut |rows, out| {
                read(start + rows.start..start + rows.end, out)
            })?;
            let to = Cuda::narrow_mut(Cuda::slice_mut(&mut w.codes), first * codes..end * codes);
            self.upload(&words(some.codes.iter().flat_map(|line| line.0.as_chunks().0)), to)?;
            let to = Cuda::narrow_mut(Cuda::slice_mut(&mut w.scales), first * scales..end * scales);
            self.upload(&words(some.scales.as_chunks().0.iter()), to)?;
        }
        Ok(w)
    }

    fn quantized_shape(w: &CudaQuantized) -> &QuantizedShape {
        &w.shape
    }

    fn quantized_product<T: Element, C: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: &CudaQuantized,
        columns: Range<usize>,
        y: MatMut<'_, C, Self>,
    ) -> Result<()> {
        check(&x, &w.shape, &columns, &y)?;
        let (tokens, cols, sy) = (x.rows(), x.cols(), y.dims().row_stride);
        let first = w.shape.columns.start + columns.start - w.origin();
        let chunks = first / CHUNK..(first + cols).div_ceil(CHUNK);
        let (kernel, words) = match w.layout.is_float {
            true => (Kernel::WidenRows, CHUNK),
            false => (Kernel::QuantizeRows, CHUNK_WORDS),
        };
        let mut codes = self.empty::<f32>(tokens.saturating_mul(chunks.len()).saturating_mul(words))?;
        let codes_mut = Cuda::slice_mut(&mut codes);
        let launch = self.kernel(kernel, T::DTYPE);
        let launch = launch.ints([tokens, chunks.len(), first - chunks.start * CHUNK, cols]);
        let launch = launch.read(x.data()).int(x.dims().row_stride).write(&codes_mut);
        // SAFETY: the arguments are those of the kernels quantize_rows and widen_rows, which write
        // one chunk of `words` words for each row of x and each of the chunks. The element is not
        // f64: `check` has verified that.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(match w.layout.is_float {
                true => Grid::over(tokens * chunks.len() * CHUNK),
                false => Grid::rows(tokens * chunks.len(), CHUNK),
            })?;
        }
        let y = y.into_data();
        let launch = w.launch(self, Kernel::QuantizedProduct, C::DTYPE, None);
        let launch = launch.ints([tokens, w.shape.rows, chunks.start, chunks.len()]);
        let launch = launch.read(Cuda::slice(&codes)).write(&y).int(sy);
        let blocks = w.shape.rows.div_ceil(ROWS) * tokens.div_ceil(TOKENS);
        // SAFETY: the arguments are those of the kernel quantized_product. `check` has verified
        // that y has one row per row of x and one column per row of w, and that w has the columns,
        // so it has their chunks. The codes are those that the launch before has written.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid { blocks: [blocks, 1], threads: [ROWS as u32, LANES], shared: 0 })
        }
    }

    fn dequantize<T: Element>(
        &self,
        w: &CudaQuantized,
        rows: &[u32],
        columns: Range<usize>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_rows(&w.shape, rows, &columns, &y)?;
        let (sy, first) = (y.dims().row_stride, w.shape.columns.start + columns.start - w.origin());
        let y = y.into_data();
        let ids = self.table_u32(rows)?;
        let order = w.shape.order.as_ref().map(|order| self.table_u32(&order.of)).transpose()?;
        let launch = w.launch(self, Kernel::Dequantize, T::DTYPE, order.as_ref());
        let launch = launch.ints([rows.len(), columns.len(), first]).table(&ids).write(&y).int(sy);
        // SAFETY: the arguments are those of the kernel dequantize. `check_rows` has verified that
        // y has one row per id and one column per column, and that w has the columns and the rows
        // of all ids but `NO_ROW`.
        #[allow(unsafe_code)]
        unsafe {
            launch.run(Grid::over(rows.len() * columns.len()))
        }
    }
}
