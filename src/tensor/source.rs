//! Sources of parameter values: arrays, random numbers, checkpoints.
//!
//! A layer reads its rank's shard of each tensor as a region of the whole tensor. So a source does
//! not depend on ranks, and the value at a global index does not depend on the partition.

use crate::{
    device::{AnyMut, Cpu, Element, each_dtype},
    error::{Error, Result, same_size},
    kernels::{Activations, ColumnGroups, Format},
    rng::Philox,
    shard::Shape,
};
use ndarray::{ArrayD, Slice};
use std::{collections::BTreeMap, ops::Range};

/// A rectangular index range of a whole tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    shape: Shape,
    ranges: Vec<Range<usize>>,
}

impl Region {
    /// Returns the region that covers the whole tensor.
    pub fn whole(shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Self { shape, ranges: shape.dims().iter().map(|&size| 0..size).collect() }
    }

    /// Restricts dimension `dim` to `range`.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let region = Region::whole([4, 6]).narrow(0, 1..3).narrow(1, 2..5);
    /// assert_eq!(region.extent().dims(), [2, 3]);
    /// assert_eq!(region.runs(), [8..11, 14..17]);
    /// ```
    ///
    /// # Panics
    /// When the range exceeds the dimension.
    pub fn narrow(mut self, dim: usize, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.shape.dims()[dim],
            "range {range:?} is not in dimension {dim} of a tensor of shape {}",
            self.shape
        );
        self.ranges[dim] = range;
        self
    }

    /// Returns the shape of the whole tensor.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Returns the range of indices along each dimension.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Returns the shape of the region.
    pub fn extent(&self) -> Shape {
        Shape::new(&self.ranges.iter().map(ExactSizeIterator::len).collect::<Vec<_>>())
    }

    /// Whether two regions of a tensor have elements in common. Neither may be empty.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.ranges.iter().zip(&other.ranges).all(|(a, b)| a.start < b.end && b.start < a.end)
    }

    /// Whether the region has the tensor's first element, unless it is empty.
    pub(crate) fn has_first(&self) -> bool {
        self.ranges.iter().all(|range| range.start == 0)
    }

    /// Returns the region as ranges of consecutive elements of the row-major tensor, in order and
    /// of maximal length. The tensor's [`Shape::len`] has to be below `usize::MAX`, because larger
    /// offsets saturate.
    pub fn runs(&self) -> Vec<Range<usize>> {
        // Trailing dimensions that the region covers fully are contiguous with the dimension before
        // them.
        let dims = self.shape.dims();
        let mut inner = 1;
        let mut depth = dims.len();
        while depth > 0 && self.ranges[depth - 1] == (0..dims[depth - 1]) {
            depth -= 1;
            inner = dims[depth].saturating_mul(inner);
        }
        let Some(last) = depth.checked_sub(1) else {
            // The whole tensor is contiguous.
            return std::iter::once(0..inner).collect();
        };
        let len = self.ranges[last].len().saturating_mul(inner);
        if len == 0 {
            return Vec::new();
        }
        let mut starts = vec![self.ranges[last].start.saturating_mul(inner)];
        let mut stride = dims[last].saturating_mul(inner);
        for dim in (0..last).rev() {
            starts = self.ranges[dim]
                .clone()
                .flat_map(|index| {
                    starts.iter().map(move |start| index.saturating_mul(stride).saturating_add(*start))
                })
                .collect();
            stride = stride.saturating_mul(dims[dim]);
        }
        starts.into_iter().map(|start| start..start.saturating_add(len)).collect()
    }
}

/// The kind of a parameter, which determines its initial value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// The matrix of a product, or an embedding table.
    Weight,
    /// An added vector, initially 0.
    Bias,
    /// The γ of a normalization, initially 1.
    Scale,
}

/// A source of parameter values by name.
pub trait WeightSource {
    /// Writes a region of a tensor to `out`, in row-major order, converted to `out`'s element type.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()>;

    /// Whether the source has a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// Returns the names of all tensors, or `None` if every name is valid.
    fn names(&self) -> Option<Vec<String>> {
        None
    }

    /// Checks that a region can be read. [`Param::load`](super::Param::load) calls it before it
    /// allocates memory for the region. The default accepts every region.
    ///
    /// # Errors
    /// As [`WeightSource::read`].
    fn check(&self, name: &str, region: &Region) -> Result<()> {
        let _ = (name, region);
        Ok(())
    }

    /// Returns the format of a quantized matrix, or `None` for a tensor of floating-point numbers.
    /// [`Param::load`](super::Param::load) keeps a matrix with a format quantized, and reads it by
    /// [`WeightSource::read_blocks`].
    fn format(&self, name: &str) -> Option<Format> {
        let _ = name;
        None
    }

    /// Writes the blocks of a region of a quantized matrix to `out`: for each row, the blocks that
    /// hold the region's columns, with the first and the last block whole.
    ///
    /// # Errors
    /// When the tensor is missing, has another shape or no format, or `out` does not have the
    /// length of the blocks.
    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        let _ = (region, out);
        Err(Error::internal("weights", format!("`{name}` has no format")))
    }

    /// Returns the groups of these columns of a tensor with a format, if groups are not consecutive
    /// columns. [`WeightSource::read_blocks`] then fills [`QuantizedShape::row_bytes`] for each
    /// row.
    ///
    /// [`QuantizedShape::row_bytes`]: crate::kernels::QuantizedShape::row_bytes
    ///
    /// # Errors
    /// When the groups cannot be read.
    fn column_groups(&self, name: &str, columns: Range<usize>) -> Result<Option<ColumnGroups>> {
        let _ = (name, columns);
        Ok(None)
    }

    /// Returns how products with quantized weights of this source treat their other factor.
    fn activations(&self) -> Activations {
        Activations::default()
    }
}

/// A [`WeightSource`] with the path of a layer as prefix of the names.
#[derive(Clone)]
pub struct Weights<'a> {
    source: &'a dyn WeightSource,
    path: String,
}

impl<'a> Weights<'a> {
    /// Returns the source with an empty prefix.
    pub fn new(source: &'a dyn WeightSource) -> Self {
        Self { source, path: String::new() }
    }

    /// Appends a name to the prefix.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let source = Random::normal(0, 0.02);
    /// let attention = Weights::new(&source).at("layer.0").at("attention");
    /// assert_eq!(attention.name("q.weight"), "layer.0.attention.q.weight");
    /// ```
    pub fn at(&self, name: &str) -> Self {
        Self { source: self.source, path: self.name(name) }
    }

    /// Returns the full name of a tensor.
    pub fn name(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// Returns the source.
    pub fn source(&self) -> &'a dyn WeightSource {
        self.source
    }
}

/// A [`WeightSource`] of named arrays of one element type.
///
/// ```
/// use shardwise::prelude::*;
/// let mut arrays = Arrays::default();
/// arrays.0.insert("w".into(), ndarray::array![[1.0, 2.0], [3.0, 4.0]].into_dyn());
/// let mut column = [0.0_f32; 2];
/// let region = Region::whole([2, 2]).narrow(1, 1..2);
/// arrays.read("w", Role::Weight, &region, AnyMut::F32(column.as_mut_slice()))?;
/// assert_eq!(column, [2.0, 4.0]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Arrays<T = f64>(pub BTreeMap<String, ArrayD<T>>);

impl<T> Default for Arrays<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Element> WeightSource for Arrays<T> {
    fn read(&self, name: &str, _: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        self.check(name, region)?;
        let array = &self.0[name];
        let slice = array.slice_each_axis(|axis| Slice::from(region.ranges()[axis.axis.index()].clone()));
        out.fill(slice.iter().map(|value| value.to_f64()))
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        let array = self.0.get(name).ok_or_else(|| missing(name, "the given arrays", self.0.keys()))?;
        if array.shape() == region.shape().dims() {
            return Ok(());
        }
        Err(Error::TensorShape {
            name: name.into(),
            place: "the given arrays".into(),
            found: array.shape().to_vec(),
            needed: region.shape().dims().to_vec(),
        })
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn names(&self) -> Option<Vec<String>> {
        Some(self.0.keys().cloned().collect())
    }
}

/// Returns [`Error::MissingTensor`] with the most similar name as a hint. The hint has the same
/// layer numbers as `name`, because the tensor of another layer is no substitute.
pub(crate) fn missing<'a>(
    name: &str,
    place: impl Into<String>,
    names: impl Iterator<Item = &'a String>,
) -> Error {
    let last = name.rsplit('.').next().unwrap_or(name);
    let common = |other: &str| {
        name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count()
            + name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count()
    };
    fn numbers(name: &str) -> impl Iterator<Item = &str> {
        name.split('.').filter(|segment| segment.bytes().all(|byte| byte.is_ascii_digit()))
    }
    // A likely name ends with the same last segment, or differs in at most two adjacent characters.
    let likely = |other: &&String| {
        let (common, longest) = (common(other), name.len().max(other.len()));
        let misspelt = common + 2 >= longest && 2 * common >= longest;
        (other.ends_with(last) || misspelt) && numbers(other).eq(numbers(name))
    };
    let hint = names.filter(likely).max_by_key(|other| common(other));
    let hint = hint.map_or_else(String::new, |hint| format!("; did you mean `{hint}`?"));
    Error::MissingTensor { name: name.into(), place: place.into(), hint }
}

/// Random initial values. Weights are normally distributed with mean 0, biases are 0, scales are 1.
///
/// The generator is counter based: element `i` of tensor `name` is a function of the seed, the name
/// and `i`. So initial weights do not depend on the sharding.
///
/// ```
/// use shardwise::prelude::*;
/// let (source, cpu) = (Random::normal(7, 0.02), Cpu::new());
/// let weights = Weights::new(&source);
/// let load = |of| Param::<f32, _>::load_region(&cpu, &weights, "w", Role::Weight, of, true);
/// let whole = load(Region::whole([4, 2]))?.value()?.to_vec()?;
/// let shard = load(Region::whole([4, 2]).narrow(0, 2..4))?.value()?.to_vec()?;
/// assert_eq!(shard, whole[4..]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Random {
    seed: u64,
    std: f64,
}

impl Random {
    /// Sets the seed and the standard deviation of weights.
    pub fn normal(seed: u64, std: f64) -> Self {
        Self { seed, std }
    }
}

impl WeightSource for Random {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        region.shape().checked_len("weights")?;
        let stream = Philox::named(self.seed, name);
        let indices = region.runs().into_iter().flatten();
        match role {
            Role::Weight => out.fill(indices.map(|index| self.std * stream.normal(index as u64))),
            Role::Bias => out.fill(indices.map(|_| 0.0)),
            Role::Scale => out.fill(indices.map(|_| 1.0)),
        }
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}

impl AnyMut<'_, Cpu> {
    /// Fills the slice with the first values of an iterator, each rounded to the element type.
    /// Implementations of [`WeightSource::read`] call this on `out`.
    ///
    /// # Errors
    /// When the iterator has fewer values than the slice has elements.
    pub fn fill(self, values: impl IntoIterator<Item = f64>) -> Result<()> {
        fn each<T: Element>(out: &mut [T], values: impl Iterator<Item = f64>) -> Result<()> {
            let len = out.len();
            let mut written = 0;
            for (to, value) in out.iter_mut().zip(values) {
                *to = T::from_f64(value);
                written += 1;
            }
            same_size("weights", "the number of values", written, "the number of elements", len)
        }
        let values = values.into_iter();
        each_dtype!(AnyMut, self, out => each(out, values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_elements_of_the_region() {
        let whole = Region::whole([3, 4, 5]);
        assert_eq!(whole.runs(), vec![0..60]);
        assert_eq!(whole.clone().narrow(0, 1..3).runs(), vec![20..60]);
        assert_eq!(whole.clone().narrow(1, 1..3).runs(), vec![5..15, 25..35, 45..55]);
        assert_eq!(
            whole.clone().narrow(0, 1..2).narrow(2, 3..5).runs(),
            vec![23..25, 28..30, 33..35, 38..40]
        );
        assert!(whole.clone().narrow(1, 2..2).runs().is_empty());
        assert_eq!(Region::whole([0, 3]).runs(), vec![0..0]);
        assert_eq!(whole.narrow(1, 1..3).extent().dims(), [3, 2, 5]);
    }

    fn read(source: &dyn WeightSource, name: &str, region: &Region) -> Result<Vec<f64>> {
        let mut out = vec![0.0; region.extent().len()];
        source.read(name, Role::Weight, region, AnyMut::F64(out.as_mut_slice()))?;
        Ok(out)
    }

    #[test]
    fn random_values_do_not_depend_on_the_region() {
        let source = Random::normal(7, 0.5);
        let whole = read(&source, "w", &Region::whole([4, 6])).unwrap();
        let region = Region::whole([4, 6]).narrow(0, 1..4).narrow(1, 2..4);
        let values = read(&source, "w", &region).unwrap();
        assert_eq!(values, [8, 9, 14, 15, 20, 21].map(|index| whole[index]));
        assert!(whole.iter().all(|value| value.abs() < 3.0 && *value != 0.0));
        let other = read(&source, "w2", &region).unwrap();
        assert_ne!(other[0], whole[8], "each name has its own stream");
    }

    #[test]
    fn a_missing_name_gets_a_hint() {
        let mut arrays = Arrays::<f64>::default();
        arrays.0.insert("layer.0.fc1.weight".into(), ArrayD::zeros(vec![2, 2]));
        let failure = |name| read(&arrays, name, &Region::whole([1])).unwrap_err().to_string();
        assert_eq!(
            failure("layer.0.fc2.weight"),
            "tensor `layer.0.fc2.weight` is not in the given arrays; did you mean `layer.0.fc1.weight`?"
        );
        assert!(failure("layer.0.fc1.weight").contains("has shape [2, 2]"));
    }
}
