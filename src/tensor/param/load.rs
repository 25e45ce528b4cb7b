//! Reading parameters from a source of weights.

use super::{OP, Param, ParamRegion, QuantizedRows, region::merged_name};
use crate::{
    device::{AnyMut, Cpu, Element, zeroed},
    error::{Error, Result, same_size},
    kernels::Backend,
    shard::Shape,
    tensor::{Region, Role, Tensor, Weights},
};

impl<T: Element, B: Backend> Param<T, B> {
    /// Reads a parameter. The given regions fill its rows. On a device without values
    /// ([`Device::HAS_VALUES`](crate::device::Device::HAS_VALUES)), checks the regions and reads
    /// nothing.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let mut arrays = Arrays::default();
    /// arrays.0.insert("q".into(), ndarray::array![[1.0, 2.0], [3.0, 4.0]].into_dyn());
    /// arrays.0.insert("k".into(), ndarray::array![[5.0, 6.0]].into_dyn());
    /// let (q, k) = (Region::whole([2, 2]).narrow(0, 1..2), Region::whole([1, 2]));
    /// let q = ParamRegion { tensor: "q".into(), region: q, row: 0, owned: true };
    /// let k = ParamRegion { tensor: "k".into(), region: k, row: 1, owned: true };
    /// let (cpu, weights) = (Cpu::new(), Weights::new(&arrays));
    /// let qk = Param::<f32, _>::load(&cpu, &weights, "qk", Role::Weight, [2, 2], vec![q, k])?;
    /// assert_eq!((qk.name(), qk.value()?.to_vec()?), ("q|k", vec![3.0, 4.0, 5.0, 6.0]));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// When the source lacks one of the tensors or has it in another shape; when a region exceeds
    /// the parameter; when memory runs out.
    pub fn load(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        shape: impl Into<Shape>,
        regions: Vec<ParamRegion>,
    ) -> Result<Self> {
        let shape = shape.into();
        if shape.rank() == 0 {
            return Err(Error::invalid(
                OP,
                format!("`{name}` has no dimension: give it a dimension of size 1"),
            ));
        }
        for own in &regions {
            weights.source().check(&own.tensor, &own.region)?;
        }
        let (len, width) = (shape.checked_len(OP)?, shape.split_at(0).1);
        for own in &regions {
            let own_width = own.region.extent().split_at(0).1;
            let what = format!("the width of the region of `{}`", own.tensor);
            same_size(OP, &what, own_width, "that of the parameter", width)?;
            let end = own.row.saturating_mul(width).saturating_add(own.region.extent().len());
            if end > len {
                let what = format!("the end of the region of `{}`", own.tensor);
                return Err(Error::sizes(OP, what, end, "the number of elements of the parameter", len));
            }
        }
        let tensors = regions.iter().map(|own| own.tensor.as_str());
        let name = merged_name(tensors).unwrap_or_else(|| weights.name(name));
        let size = [shape.rows(), shape.cols()];
        if let Some(rows) = QuantizedRows::load(device, weights.source(), role, size, &regions)? {
            return Ok(Self::with_store(name, (device.clone(), shape), Box::new(rows), regions));
        }
        let mut host = zeroed::<T>(if B::HAS_VALUES { len } else { 0 })?;
        for own in regions.iter().filter(|_| B::HAS_VALUES) {
            let start = own.row.saturating_mul(width);
            let out: AnyMut<'_, Cpu> = T::any_mut(&mut host[start..start + own.region.extent().len()]);
            weights.source().read(&own.tensor, role, &own.region, out)?;
        }
        let value = if B::HAS_VALUES {
            Tensor::from_vec(device, shape, host)?
        } else {
            Tensor::empty(device, shape)?
        };
        Ok(Self::new(name, value, regions))
    }

    /// Reads a parameter that is one region of the tensor of the same name.
    ///
    /// # Errors
    /// As [`Param::load`].
    pub fn load_region(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        region: Region,
        owned: bool,
    ) -> Result<Self> {
        let shape = region.extent();
        let own = ParamRegion { tensor: weights.name(name), region, row: 0, owned };
        Self::load(device, weights, name, role, shape, vec![own])
    }
}
