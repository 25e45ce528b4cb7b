//! Reads the tensors of GGUF files.

use super::super::{
    region::{Items, Run, check_bytes, check_elements, runs},
    stored::{convert, decode_as},
};
use super::{
    Gguf, Tensor,
    names::stored_row,
    types::{Encoding, Type},
};
use crate::{
    device::{AnyMut, Cpu, Element, each_dtype},
    error::{Error, Result},
    kernels::{Activations, Format},
    tensor::{Region, Role, WeightSource},
};

impl Gguf {
    fn encoding(&self, name: &str, tensor: &Tensor) -> Result<Encoding> {
        let of = Type::of(tensor.entry.number);
        of.and_then(|of| of.encoding).ok_or_else(|| Error::TensorElement {
            name: name.into(),
            place: self.files[tensor.file].path().display().to_string(),
            found: of.map_or(format!("of the unknown type {}", tensor.entry.number), |of| of.name.into()),
        })
    }

    /// Returns the tensor of a region.
    fn tensor_of(&self, name: &str, region: &Region) -> Result<(&Tensor, Encoding)> {
        let tensor = self.tensor(name)?;
        if tensor.entry.shape != region.shape().dims() {
            return Err(Error::TensorShape {
                name: name.into(),
                place: self.files[tensor.file].path().display().to_string(),
                found: tensor.entry.shape.clone(),
                needed: region.shape().dims().to_vec(),
            });
        }
        Ok((tensor, self.encoding(name, tensor)?))
    }

    fn items<'a>(&'a self, tensor: &Tensor, size: usize) -> Items<'a> {
        let file = &self.files[tensor.file];
        Items { file, start: tensor.entry.start, size, bytes_read: &self.bytes_read }
    }

    /// Reads the blocks that hold a region. Passes them to `visit` one by one, each with its
    /// position in the region of blocks.
    fn each_block(
        &self,
        (name, tensor, format): (&str, &Tensor, Format),
        region: &Region,
        mut visit: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let grid = grid(region, format);
        let width = grid.ranges().last().map_or(1, |range| range.len());
        self.items(tensor, format.bytes()).read(tensor_runs(tensor, &grid), |to, bytes| {
            for (at, block) in bytes.chunks_exact(format.bytes()).enumerate() {
                if !format.is_finite(block) {
                    let [row, column] = [(to + at) / width, (to + at) % width];
                    let first = |dim: usize| grid.ranges()[dim].start;
                    let (row, block) = match grid.ranges().len() {
                        1 => (0, first(0) + column),
                        2 => (first(0) + row, first(1) + column),
                        rank => (row, first(rank - 1) + column),
                    };
                    let name = name.escape_debug();
                    let reason =
                        format!("tensor `{name}`: row {row}, block {block}: the scale is not finite");
                    return Err(self.files[tensor.file].bad(reason));
                }
                visit(to + at, block);
            }
            Ok(())
        })
    }

    fn read_as<T: Element>(
        &self,
        name: &str,
        (tensor, encoding): (&Tensor, Encoding),
        region: &Region,
        out: &mut [T],
    ) -> Result<()> {
        let format = match encoding {
            Encoding::Blocks(format) => format,
            Encoding::Float(dtype) => {
                let size = dtype.size();
                return self.items(tensor, size).read(tensor_runs(tensor, region), |to, bytes| {
                    decode_as(dtype, bytes, &mut out[to..to + bytes.len() / size]);
                    Ok(())
                });
            }
        };
        let columns = region.ranges().last().cloned().unwrap_or(0..1);
        let blocks = format.blocks(columns.clone());
        let mut weights = vec![0.0; format.weights()];
        self.each_block((name, tensor, format), region, |at, block| {
            format.decode(block, &mut weights);
            let (row, start) = (at / blocks.len(), (blocks.start + at % blocks.len()) * format.weights());
            let part = columns.start.max(start)..columns.end.min(start + format.weights());
            let to = row * columns.len() + part.start - columns.start;
            convert(&weights[part.start - start..part.end - start], &mut out[to..to + part.len()]);
        })
    }
}

/// Returns the region of the blocks that hold a region of elements.
fn grid(region: &Region, format: Format) -> Region {
    let (mut dims, mut ranges) = (region.shape().dims().to_vec(), region.ranges().to_vec());
    if let (Some(dim), Some(range)) = (dims.last_mut(), ranges.last_mut()) {
        *dim /= format.weights();
        *range = format.blocks(range.clone());
    }
    let narrow = |of: Region, (dim, range)| of.narrow(dim, range);
    ranges.into_iter().enumerate().fold(Region::whole(&dims[..]), narrow)
}

/// Returns the runs of a region of a tensor's items, which are elements or blocks.
fn tensor_runs(tensor: &Tensor, region: &Region) -> impl Iterator<Item = Run> + use<> {
    let Some(head) = tensor.head else { return runs(region).collect::<Vec<_>>().into_iter() };
    let width = region.shape().dims().get(1).copied().unwrap_or(1);
    let columns = region.ranges().get(1).cloned().unwrap_or(0..1);
    // A matrix without columns may have any number of rows.
    let rows = if columns.is_empty() { 0..0 } else { region.ranges()[0].clone() };
    let run = |(at, row)| {
        let start = stored_row(row, head) * width;
        Run { items: start + columns.start..start + columns.end, to: at * columns.len() }
    };
    let mut runs: Vec<_> = rows.enumerate().map(run).collect();
    runs.sort_unstable_by_key(|run| run.items.start);
    runs.into_iter()
}

impl WeightSource for Gguf {
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorElement`]; [`Error::Sizes`]
    /// when the lengths of `out` and of the region differ; [`Error::Io`] when reading fails;
    /// [`Error::Checkpoint`] when the scale of a block is not finite.
    fn read(&self, name: &str, _: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        let of = self.tensor_of(name, region)?;
        check_elements(region.extent().len(), out.len())?;
        each_dtype!(AnyMut, out, out => self.read_as(name, of, region, out))
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn names(&self) -> Option<Vec<String>> {
        Some(self.tensors.keys().cloned().collect())
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        self.tensor_of(name, region).map(|_| ())
    }

    fn format(&self, name: &str) -> Option<Format> {
        let tensor = self.tensors.get(name).filter(|_| !self.dequantized)?;
        match Type::of(tensor.entry.number)?.encoding? {
            Encoding::Blocks(format) if tensor.entry.shape.len() == 2 => Some(format),
            _ => None,
        }
    }

    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        let (tensor, encoding) = self.tensor_of(name, region)?;
        let Encoding::Blocks(format) = encoding else {
            return Err(Error::invalid(
                "weights",
                format!("tensor `{}` is not quantized", name.escape_debug()),
            ));
        };
        let (size, blocks) = (format.bytes(), grid(region, format).extent().len());
        check_bytes(blocks.saturating_mul(size), out.len())?;
        self.each_block((name, tensor, format), region, |at, block| {
            out[at * size..(at + 1) * size].copy_from_slice(block);
        })
    }

    fn activations(&self) -> Activations {
        self.activations
    }
}
