//! Parameters: a rank's part of a weight, its gradient, and what part that is.

use super::{Region, Role, Tensor, Weights};
use crate::{
    device::{AnyMut, Cpu, Device, Element},
    error::{Result, same_shape},
    kernels::{Backend, MatMut},
    shard::Shape,
};

/// A part of a parameter that comes from one region of one tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name, as in a checkpoint.
    pub tensor: String,
    /// Which part of it.
    pub region: Region,
    /// The first row of the parameter that it fills.
    pub row: usize,
    /// Whether this rank is the one that counts it: each element of the model is owned by exactly one rank, however
    /// many hold a copy.
    pub owned: bool,
}

/// A rank's part of a trainable tensor, and the gradient that has been summed for it.
///
/// The gradient is kept in the element's accumulator: those of bf16 parameters are f32.
#[derive(Debug)]
pub struct Param<T: Element, B: Device> {
    name: String,
    value: Tensor<T, B>,
    grad: Option<Tensor<T::Acc, B>>,
    pieces: Vec<Piece>,
}

impl<T: Element, B: Backend> Param<T, B> {
    /// Reads a parameter whose pieces lie one below the other in its rows.
    ///
    /// # Errors
    /// When the source lacks one of the tensors, or it has another shape.
    pub fn load(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        shape: impl Into<Shape>,
        pieces: Vec<Piece>,
    ) -> Result<Self> {
        let shape = shape.into();
        let mut host = vec![T::default(); shape.len()];
        let width = shape.split_at(0).1;
        for piece in &pieces {
            let extent = piece.region.extent();
            let start = piece.row * width;
            let out: AnyMut<'_, Cpu> = T::any_mut(&mut host[start..start + extent.len()]);
            weights.source().read(&piece.tensor, role, &piece.region, out)?;
        }
        Ok(Self {
            name: weights.name(name),
            value: Tensor::from_slice(device, shape, &host)?,
            grad: None,
            pieces,
        })
    }

    /// Reads a parameter that is one region of one tensor, called the same.
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
        let piece = Piece { tensor: weights.name(name), region, row: 0, owned };
        Self::load(device, weights, name, role, shape, vec![piece])
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value.
    pub fn value(&self) -> &Tensor<T, B> {
        &self.value
    }

    /// The value, to be updated.
    pub fn value_mut(&mut self) -> &mut Tensor<T, B> {
        &mut self.value
    }

    /// The sum of the gradients since the last [`Param::zero_grad`]; none before the first backward.
    pub fn grad(&self) -> Option<&Tensor<T::Acc, B>> {
        self.grad.as_ref()
    }

    /// Which parts of which tensors this parameter holds.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Forgets the gradient.
    pub fn zero_grad(&mut self) {
        self.grad = None;
    }

    /// Adds to the gradient.
    ///
    /// # Errors
    /// When the shape is another than the parameter's.
    pub fn add_grad(&mut self, grad: Tensor<T::Acc, B>) -> Result<()> {
        let shape = self.value.shape();
        same_shape("gradient", &self.name, shape.dims(), "its gradient", grad.shape().dims())?;
        match &mut self.grad {
            Some(sum) => {
                let device = sum.device().clone();
                device.accumulate(grad.mat(), sum.mat_mut()?)
            }
            none => {
                *none = Some(grad);
                Ok(())
            }
        }
    }

    /// Lets `write` add to the gradient in place: it gets the gradient as a matrix and the β with which to keep what is
    /// there, which is 0 the first time, when there is nothing yet.
    pub(crate) fn accumulate_grad(
        &mut self,
        write: impl FnOnce(f64, MatMut<'_, T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        match &mut self.grad {
            Some(sum) => write(1.0, sum.mat_mut()?),
            none => {
                let mut first = Tensor::empty(self.value.device(), self.value.shape())?;
                write(0.0, first.mat_mut()?)?;
                *none = Some(first);
                Ok(())
            }
        }
    }
}
