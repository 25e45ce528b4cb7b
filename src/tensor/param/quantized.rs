//! A store of quantized weights.

use super::{OP, ParamRegion};
use crate::{
    device::{DType, Element, zeroed},
    error::{Error, Result, same_size},
    kernels::{Activations, Backend, ColumnGroups, Format, MatMut, MatRef, QuantizedShape},
    tensor::{Role, Tensor, WeightSource},
};
use std::{fmt, ops::Range, rc::Rc};

/// The quantized rows of a parameter. The parts come from tensors of different formats, and some of
/// them may be dense, for example if a merged q/k/v weight has q in `Q4_K`, k in `Q6_K` and v in
/// f32.
///
/// The weights are frozen: they have no gradient, and optimizers skip them.
pub struct QuantizedRows<T: Element, B: Backend> {
    device: B,
    cols: usize,
    parts: Vec<(Range<usize>, Part<T, B>)>,
    activations: Activations,
}

enum Part<T: Element, B: Backend> {
    Quantized(B::QuantizedMatrix),
    Dense(Tensor<T, B>),
}

/// Regions with the same columns and groups of tensors of one format, one after another.
struct Run<'a> {
    format: Option<Format>,
    columns: Range<usize>,
    order: Option<ColumnGroups>,
    rows: Range<usize>,
    regions: Vec<&'a ParamRegion>,
}

impl<T: Element, B: Backend> QuantizedRows<T, B> {
    /// Reads the regions of a parameter of `rows` rows. Returns `None` if no region is of a
    /// quantized matrix.
    pub(super) fn load(
        device: &B,
        source: &dyn WeightSource,
        role: Role,
        [rows, cols]: [usize; 2],
        regions: &[ParamRegion],
    ) -> Result<Option<Rc<Self>>> {
        let format = |own: &ParamRegion| match own.region.ranges() {
            [_, _] if role == Role::Weight => source.format(&own.tensor),
            _ => None,
        };
        if !regions.iter().any(|own| format(own).is_some()) {
            return Ok(None);
        }
        let activations = source.activations();
        let mut runs: Vec<Run<'_>> = Vec::new();
        let mut end = 0;
        for own in regions {
            let what = format!("the first row of the region of `{}`", own.tensor);
            same_size(OP, &what, own.row, "the end of the region before", end)?;
            end += own.region.extent().rows();
            let (format, columns) = (format(own), own.region.ranges().get(1).cloned().unwrap_or(0..1));
            let order = match format {
                Some(_) => source.column_groups(&own.tensor, columns.clone())?,
                None => None,
            };
            match runs.last_mut() {
                Some(run) if run.format == format && run.columns == columns && run.order == order => {
                    run.rows.end = end;
                    run.regions.push(own);
                }
                _ => runs.push(Run { format, columns, order, rows: own.row..end, regions: vec![own] }),
            }
        }
        same_size(OP, "the end of the last region", end, "rows of the parameter", rows)?;
        let part = |run: Run<'_>| {
            let part = match run.format {
                Some(format) => Part::Quantized(Self::matrix(device, source, format, &run)?),
                None => Part::Dense(Self::dense(device, source, role, cols, &run)?),
            };
            Ok((run.rows, part))
        };
        let parts = runs.into_iter().map(part).collect::<Result<_>>()?;
        Ok(Some(Rc::new(Self { device: device.clone(), cols, parts, activations })))
    }

    fn matrix(
        device: &B,
        source: &dyn WeightSource,
        format: Format,
        run: &Run<'_>,
    ) -> Result<B::QuantizedMatrix> {
        let shape = QuantizedShape {
            format,
            rows: run.rows.len(),
            columns: run.columns.clone(),
            order: run.order.clone(),
        };
        if T::DTYPE == DType::F64 && source.activations() == Activations::Int8 && shape.rounds_activations() {
            let reason = format!(
                "`{}` is quantized, and a product with activations of 8 bits has no precision of f64: use \
                 `Activations::Exact`",
                run.regions[0].tensor
            );
            return Err(Error::Unsupported { op: OP, reason });
        }
        let row_bytes = shape.row_bytes();
        device.quantized_matrix(shape, &mut |rows, out| {
            let rows = run.rows.start + rows.start..run.rows.start + rows.end;
            let mut rest = out;
            for own in &run.regions {
                let count = own.region.extent().rows();
                let (start, end) = (rows.start.max(own.row), rows.end.min(own.row + count));
                if start < end {
                    let first = own.region.ranges()[0].start;
                    let part = first + start - own.row..first + end - own.row;
                    let (to, after) = std::mem::take(&mut rest).split_at_mut((end - start) * row_bytes);
                    source.read_blocks(&own.tensor, &own.region.clone().narrow(0, part), to)?;
                    rest = after;
                }
            }
            Ok(())
        })
    }

    fn dense(
        device: &B,
        source: &dyn WeightSource,
        role: Role,
        cols: usize,
        run: &Run<'_>,
    ) -> Result<Tensor<T, B>> {
        let mut host = zeroed::<T>(if B::HAS_VALUES { run.rows.len().saturating_mul(cols) } else { 0 })?;
        let mut rest = &mut host[..];
        for own in run.regions.iter().filter(|_| B::HAS_VALUES) {
            let (to, after) = std::mem::take(&mut rest).split_at_mut(own.region.extent().len());
            source.read(&own.tensor, role, &own.region, T::any_mut(to))?;
            rest = after;
        }
        if B::HAS_VALUES {
            Tensor::from_vec(device, [run.rows.len(), cols], host)
        } else {
            Tensor::empty(device, [run.rows.len(), cols])
        }
    }

    /// Returns the format of a row, or `None` if it is dense.
    pub(crate) fn format(&self, row: usize) -> Option<Format> {
        match self.parts.iter().find(|(rows, _)| rows.contains(&row)) {
            Some((_, Part::Quantized(w))) => Some(B::quantized_shape(w).format),
            _ => None,
        }
    }

    fn height(&self) -> usize {
        self.parts.last().map_or(0, |(rows, _)| rows.end)
    }

    /// Whether some rows are multiplied as dense weights, by [`Gemm`](crate::kernels::Gemm).
    pub(crate) fn has_dense_products(&self) -> bool {
        self.parts.iter().any(|(_, part)| match part {
            Part::Quantized(w) => !self.has_product(w),
            Part::Dense(_) => true,
        })
    }

    /// y ← x wᵀ over a range of columns of w. An element of y has the same bits however the rows of
    /// w are divided, if there are no dense products or the device splits products exactly.
    ///
    /// `x`: `[tokens, columns]`, `y`: `[tokens, rows]`.
    ///
    /// # Errors
    /// When sizes disagree, or the device fails.
    pub(crate) fn product<C: Element<Acc = T::Acc>>(
        &self,
        x: MatRef<'_, T, B>,
        columns: Range<usize>,
        mut y: MatMut<'_, C, B>,
    ) -> Result<()> {
        for (rows, part) in &self.parts {
            let mut y = y.reborrow().columns(rows.clone());
            match part {
                Part::Dense(w) => {
                    self.device.gemm_block(x, w.mat().columns(columns.clone()).t(), 0.0, y)?;
                }
                Part::Quantized(w) if self.has_product(w) => {
                    self.device.quantized_product(x, w, columns.clone(), y)?;
                }
                Part::Quantized(w) => {
                    let strip = (B::STRIP / columns.len().max(1)).max(1);
                    for start in (0..rows.len()).step_by(strip) {
                        let own = start..rows.len().min(start + strip);
                        let ids: Vec<u32> = own.clone().map(|row| row as u32).collect();
                        let mut dense = Tensor::empty(&self.device, [own.len(), columns.len()])?;
                        self.device.dequantize(w, &ids, columns.clone(), dense.mat_mut()?)?;
                        let y = y.reborrow().columns(own);
                        self.device.gemm_block::<T, C>(x, dense.mat().t(), 0.0, y)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether products with a part do not dequantize it.
    fn has_product(&self, w: &B::QuantizedMatrix) -> bool {
        let shape = B::quantized_shape(w);
        if shape.format.is_integer() {
            self.activations == Activations::Int8 && shape.rounds_activations()
        } else {
            T::DTYPE != DType::F64
        }
    }

    /// Dequantizes all rows.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub(super) fn value(&self) -> Result<Tensor<T, B>> {
        let mut value = Tensor::empty(&self.device, [self.height(), self.cols])?;
        for (rows, part) in &self.parts {
            let to = value.mat_mut()?.block(rows.clone(), 0..self.cols);
            match part {
                Part::Quantized(w) => {
                    let all: Vec<u32> = (0..rows.len() as u32).collect();
                    self.device.dequantize(w, &all, 0..self.cols, to)?;
                }
                Part::Dense(w) => self.device.copy(w.mat(), to)?,
            }
        }
        Ok(value)
    }

    /// Dequantizes some rows, as [`Tensor::rows`].
    ///
    /// # Errors
    /// When an id other than [`NO_ROW`](crate::kernels::NO_ROW) is not a row, or the device is out
    /// of memory.
    pub(super) fn some_rows(&self, ids: &[u32]) -> Result<Tensor<T, B>> {
        match &self.parts[..] {
            [(_, Part::Quantized(w))] => {
                let mut y = Tensor::empty(&self.device, [ids.len(), self.cols])?;
                self.device.dequantize(w, ids, 0..self.cols, y.mat_mut()?)?;
                Ok(y)
            }
            _ => self.value()?.rows(ids),
        }
    }
}

impl<T: Element, B: Backend> fmt::Debug for QuantizedRows<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |(rows, part): &(Range<usize>, Part<T, B>)| match part {
            Part::Quantized(w) => format!("{} rows in {}", rows.len(), B::quantized_shape(w).format),
            Part::Dense(_) => format!("{} rows in {}", rows.len(), T::DTYPE),
        };
        write!(f, "QuantizedRows({})", self.parts.iter().map(part).collect::<Vec<_>>().join(", "))
    }
}
