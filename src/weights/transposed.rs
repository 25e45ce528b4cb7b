//! A source whose matrices are stored transposed.

use super::region::check_elements;
use crate::{
    device::{AnyMut, Cpu, Element, each_dtype, zeroed},
    error::{Error, Result},
    kernels::{Activations, ColumnGroups, Format},
    tensor::{Region, Role, WeightSource},
};
use std::ops::Range;

/// A source with some matrices stored as `[in, out]`, such as GPT-2's `Conv1D`. Layers read them as
/// `[out, in]`.
///
/// To read a region of such a matrix, `Transposed` reads the transposed region of the stored matrix
/// and transposes it in memory. So a rank still reads only its shard. Tensors that are not matrices
/// are read unchanged. Errors name the shape of the stored matrix.
///
/// ```
/// use shardwise::{prelude::*, weights::Transposed};
/// let mut arrays = Arrays::default();
/// arrays.0.insert("fc".into(), ndarray::array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]].into_dyn());
/// let source = Transposed::new(&arrays, |name| name == "fc");
/// let mut row = [0.0_f32; 2];
/// let region = Region::whole([3, 2]).narrow(0, 1..2);
/// source.read("fc", Role::Weight, &region, AnyMut::F32(row.as_mut_slice()))?;
/// assert_eq!(row, [2.0, 5.0]);
/// # Ok::<(), Error>(())
/// ```
pub struct Transposed<'a, S: ?Sized, F> {
    source: &'a S,
    names: F,
}

impl<'a, S: WeightSource + ?Sized, F: Fn(&str) -> bool> Transposed<'a, S, F> {
    /// Wraps `source`. Transposes each matrix if `names` returns true for the matrix's name.
    pub fn new(source: &'a S, names: F) -> Self {
        Self { source, names }
    }

    fn read_transposed<T: Element>(
        &self,
        name: &str,
        role: Role,
        [rows, cols]: [Range<usize>; 2],
        [height, width]: [usize; 2],
        out: &mut [T],
    ) -> Result<()> {
        let len = rows.len().saturating_mul(cols.len());
        check_elements(len, out.len())?;
        let mut stored = zeroed::<T>(len)?;
        let region = Region::whole([width, height]).narrow(0, cols.clone()).narrow(1, rows.clone());
        self.source.read(name, role, &region, T::any_mut(stored.as_mut_slice()))?;
        for row in 0..rows.len() {
            for col in 0..cols.len() {
                out[row * cols.len() + col] = stored[col * rows.len() + row];
            }
        }
        Ok(())
    }
}

impl<S: WeightSource + ?Sized, F: Fn(&str) -> bool> WeightSource for Transposed<'_, S, F> {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        let shape = region.shape();
        let (&[height, width], [rows, cols]) = (shape.dims(), region.ranges()) else {
            return self.source.read(name, role, region, out);
        };
        if !(self.names)(name) {
            return self.source.read(name, role, region, out);
        }
        let ranges = [rows.clone(), cols.clone()];
        each_dtype!(AnyMut, out, out => self.read_transposed(name, role, ranges, [height, width], out))
    }

    /// # Errors
    /// [`Error::Unsupported`] when the matrix is transposed and the source has it quantized,
    /// because it would be read with other numbers. The errors of the source.
    fn check(&self, name: &str, region: &Region) -> Result<()> {
        match region.shape().dims() {
            &[height, width] if (self.names)(name) => {
                if let Some(format) = self.source.format(name) {
                    let reason = format!(
                        "`{name}` is stored transposed, so it cannot be read in {format}: quantize a `Transposed` source, \
                         and set `transposed` of the configuration to false"
                    );
                    return Err(Error::Unsupported { op: "weights", reason });
                }
                self.source.check(name, &Region::whole([width, height]))
            }
            _ => self.source.check(name, region),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn names(&self) -> Option<Vec<String>> {
        self.source.names()
    }

    // The weights of a block are consecutive in a stored row, which is a column of the matrix.
    fn format(&self, name: &str) -> Option<Format> {
        if (self.names)(name) { None } else { self.source.format(name) }
    }

    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        if (self.names)(name) {
            return Err(Error::internal("weights", format!("`{name}` is transposed, so it has no format")));
        }
        self.source.read_blocks(name, region, out)
    }

    fn column_groups(&self, name: &str, columns: Range<usize>) -> Result<Option<ColumnGroups>> {
        self.source.column_groups(name, columns)
    }

    fn activations(&self) -> Activations {
        self.source.activations()
    }
}
