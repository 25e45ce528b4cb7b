//! What an optimizer keeps for each parameter.

use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::Backend,
    tensor::{Param, Piece, Tensor, Visit},
};
use std::collections::{HashMap, HashSet};

/// The state of each parameter that has had a gradient, by the parameter's name.
#[derive(Debug)]
pub(super) struct States<T: Element, B: Device> {
    op: &'static str,
    /// The sums that every parameter has.
    sums: &'static [&'static str],
    /// In the order of the parameters' first gradients, which is the same on every rank.
    all: Vec<State<T, B>>,
    places: HashMap<String, usize>,
}

/// The state of one parameter. Its tensors are parameters of the same pieces, renamed.
#[derive(Debug)]
pub(super) struct State<T: Element, B: Device> {
    /// What the parameter holds.
    pieces: Vec<Piece>,
    /// The value that the master belongs to ([`Param::revision`]).
    revision: u64,
    /// The number of the parameter's steps.
    pub(super) steps: u64,
    /// The weight in the accumulator, where the element is narrower.
    master: Option<Param<T::Acc, B>>,
    /// 0 at first.
    sums: Vec<Param<T::Acc, B>>,
}

/// An exclusive view of a tensor of a state.
type SliceMut<'a, T, B> = <B as Device>::SliceMut<'a, <T as Element>::Acc>;

impl<T: Element, B: Device> States<T, B> {
    /// None so far, of these sums.
    pub(super) fn new(op: &'static str, sums: &'static [&'static str]) -> Self {
        Self { op, sums, all: Vec::new(), places: HashMap::new() }
    }

    /// The largest number of steps of a parameter.
    pub(super) fn steps(&self) -> u64 {
        self.all.iter().map(|state| state.steps).max().unwrap_or(0)
    }
}

impl<T: Element, B: Backend> States<T, B> {
    /// Calls `update` on every parameter that has a gradient, with its state, if all parameters fit their states.
    pub(super) fn each(
        &mut self,
        mut visit: impl Visit<T, B>,
        update: impl Fn(&mut Param<T, B>, &Tensor<T::Acc, B>, &mut State<T, B>) -> Result<()>,
    ) -> Result<()> {
        self.check(&mut visit)?;
        visit(&mut |param| {
            // Shares memory with the parameter's; it is only read.
            let Some(grad) = param.grad().cloned() else { return Ok(()) };
            let state = self.of(param)?;
            state.follow(param)?;
            state.steps += 1;
            update(param, &grad, state)
        })
    }

    /// Looks at all parameters before any of them is changed.
    fn check(&self, visit: &mut impl Visit<T, B>) -> Result<()> {
        let mut seen = HashSet::new();
        visit(&mut |param| {
            param.settle()?;
            if !seen.insert(param.name().to_string()) {
                let reason = format!("{} is visited twice in one step", param.name());
                return Err(Error::invalid(self.op, reason));
            }
            match self.places.get(param.name()) {
                Some(&at) => self.all[at].check(self.op, param),
                None => Ok(()),
            }
        })
    }

    /// The state of a parameter, which is made if there is none.
    fn of(&mut self, param: &Param<T, B>) -> Result<&mut State<T, B>> {
        let at = match self.places.get(param.name()) {
            Some(&at) => at,
            None => {
                self.places.insert(param.name().to_string(), self.all.len());
                self.all.push(State::new(self.op, self.sums, param)?);
                self.all.len() - 1
            }
        };
        Ok(&mut self.all[at])
    }
}

impl<T: Element, B: Backend> State<T, B> {
    fn new(op: &str, sums: &[&str], param: &Param<T, B>) -> Result<Self> {
        let value = param.value();
        let make = |kind: &str, value| {
            let renamed =
                |piece: &Piece| Piece { tensor: format!("{op}.{kind}.{}", piece.tensor), ..piece.clone() };
            Param::new(
                format!("{op}.{kind}.{}", param.name()),
                value,
                param.pieces().iter().map(renamed).collect(),
            )
        };
        let zeros = |kind: &&str| Ok(make(kind, Tensor::zeros(value.device(), value.shape())?));
        Ok(Self {
            pieces: param.pieces().to_vec(),
            revision: param.revision(),
            steps: 0,
            master: match T::DTYPE == T::Acc::DTYPE {
                true => None,
                false => Some(make("master", value.convert()?)),
            },
            sums: sums.iter().map(zeros).collect::<Result<_>>()?,
        })
    }

    /// Whether the state is that of this parameter.
    fn check(&self, op: &'static str, param: &Param<T, B>) -> Result<()> {
        let (shape, name) = (param.value().shape(), param.name());
        if let Some(own) = self.master.as_ref().or(self.sums.first()) {
            same_shape(op, name, shape.dims(), "its state", own.value().shape().dims())?;
        }
        if param.pieces() == self.pieces {
            return Ok(());
        }
        let (now, then) = (describe(param.pieces()), describe(&self.pieces));
        Err(Error::invalid(op, format!("{name} holds {now}, but its state is of {then}")))
    }

    /// Takes the master from a value that was set after it. One that still rounds to the value is kept: the value was
    /// put back, or set to what it was.
    fn follow(&mut self, param: &Param<T, B>) -> Result<()> {
        if let Some(master) = &mut self.master
            && self.revision != param.revision()
            && !rounds_to(master.value(), param.value())?
        {
            *master.update_mut() = param.value().convert()?;
        }
        self.revision = param.revision();
        Ok(())
    }

    /// What a step writes: the master weight, and the sums.
    pub(super) fn slices(&mut self) -> Result<(Option<SliceMut<'_, T, B>>, Vec<SliceMut<'_, T, B>>)> {
        let master = self.master.as_mut().map(|master| master.update_mut().slice_mut()).transpose()?;
        let sums = self.sums.iter_mut().map(|sum| sum.update_mut().slice_mut());
        Ok((master, sums.collect::<Result<_>>()?))
    }
}

/// Whether the master weights, rounded, are these values.
fn rounds_to<T: Element, B: Backend>(master: &Tensor<T::Acc, B>, value: &Tensor<T, B>) -> Result<bool> {
    let (rounded, value) = (master.convert::<T>()?.to_vec()?, value.to_vec()?);
    let bits = |value: &T| value.to_f64().to_bits();
    Ok(rounded.iter().map(bits).eq(value.iter().map(bits)))
}

/// The pieces of a parameter, in words.
fn describe(pieces: &[Piece]) -> String {
    let piece = |piece: &Piece| {
        let copy = if piece.owned { "" } else { " (not owned)" };
        format!("{} {:?}{copy}", piece.tensor, piece.region.ranges())
    };
    pieces.iter().map(piece).collect::<Vec<_>>().join(", ")
}
