//! What an optimizer keeps for each parameter.

use crate::{
    device::{Device, Element},
    error::{Result, same_shape},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, Tensor, Visit},
};

/// `N` tensors in the accumulator for each parameter, 0 at first, and a master weight where the element is narrower.
#[derive(Debug)]
pub(super) struct States<T: Element, B: Device, const N: usize>(Vec<State<T, B, N>>);

#[derive(Debug)]
pub(super) struct State<T: Element, B: Device, const N: usize> {
    shape: Shape,
    pub(super) master: Option<Tensor<T::Acc, B>>,
    pub(super) sums: [Tensor<T::Acc, B>; N],
}

impl<T: Element, B: Device, const N: usize> Default for States<T, B, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Element, B: Backend, const N: usize> States<T, B, N> {
    /// Calls `update` on every parameter that has a gradient, with its state. `visit` passes them in the same order at
    /// every call.
    pub(super) fn each(
        &mut self,
        op: &'static str,
        mut visit: impl Visit<T, B>,
        update: impl Fn(&B, &Tensor<T::Acc, B>, &mut Tensor<T, B>, &mut State<T, B, N>) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        visit(&mut |param| {
            if at == self.0.len() {
                self.0.push(State::new(param)?);
            }
            let (state, shape) = (&mut self.0[at], param.value().shape());
            same_shape(op, param.name(), shape.dims(), "its state", state.shape.dims())?;
            at += 1;
            // Shares memory with the parameter's; it is only read.
            param.settle()?;
            let Some(grad) = param.grad().cloned() else { return Ok(()) };
            let device = param.value().device().clone();
            update(&device, &grad, param.value_mut(), state)
        })
    }
}

impl<T: Element, B: Backend, const N: usize> State<T, B, N> {
    fn new(param: &Param<T, B>) -> Result<Self> {
        let (value, shape) = (param.value(), param.value().shape());
        let master = match T::DTYPE == T::Acc::DTYPE {
            true => None,
            false => Some(value.convert()?),
        };
        let sums = [(); N].map(|()| Tensor::zeros(value.device(), shape));
        let mut all = Vec::with_capacity(N);
        for sum in sums {
            all.push(sum?);
        }
        let sums = all.try_into().expect("as many as there were");
        Ok(Self { shape, master, sums })
    }

    /// The master weights, to be written.
    pub(super) fn master(
        master: &mut Option<Tensor<T::Acc, B>>,
    ) -> Result<Option<<B as Device>::SliceMut<'_, T::Acc>>> {
        master.as_mut().map(Tensor::slice_mut).transpose()
    }
}
