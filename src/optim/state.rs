//! The state that an optimizer keeps for each parameter.

use super::{ParamGroup, within};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, ParamRegion, Region, Role, Tensor, WeightSource, Weights, check_once},
};
use std::{
    collections::{HashMap, HashSet},
    fmt,
};

/// The tensors that an optimizer keeps for each parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The name of the optimizer.
    pub(super) op: &'static str,
    /// The names of the sums (moments, velocity). They have the accumulator type and are initially
    /// 0.
    pub(super) sums: &'static [&'static str],
    /// Whether the optimizer keeps the number of steps of each parameter.
    pub(super) counts: bool,
}

const MASTER: &str = "master";
const STEP: &str = "step";

impl Layout {
    /// Returns the kinds of tensors kept for a parameter of this element type.
    fn kinds<T: Element>(&self) -> impl Iterator<Item = &'static str> + use<T> {
        let master = (T::DTYPE != T::Acc::DTYPE).then_some(MASTER);
        self.sums.iter().copied().chain(master).chain(self.counts.then_some(STEP))
    }

    fn name(&self, kind: &str, of: &str) -> String {
        format!("{}.{kind}.{of}", self.op)
    }
}

/// The states by parameter name. [`States::load`] or the first step with a gradient makes a
/// parameter's state.
pub(super) struct States<T: Element, B: Device> {
    layout: Layout,
    /// In the order in which the states were made. The order is equal on all ranks that step the
    /// same parameters.
    all: Vec<State<T, B>>,
    /// The index in `all` of each parameter's state, by the parameter's name.
    places: HashMap<String, usize>,
    groups: Option<Box<dyn Fn(&Param<T, B>) -> ParamGroup>>,
}

/// The state of one parameter. Its tensors are `Param`s. All of them but `count` have the
/// parameter's regions, but tensor names of their own.
#[derive(Debug)]
pub(super) struct State<T: Element, B: Device> {
    /// The regions of the parameter.
    regions: Vec<ParamRegion>,
    /// The revision of the parameter's value that the master weight matches ([`Param::revision`]).
    revision: u64,
    /// The number of the parameter's steps.
    pub(super) steps: u64,
    sums: Vec<Param<T::Acc, B>>,
    /// The master weight, in the accumulator type. `None` if the accumulator type is the element
    /// type.
    master: Option<Param<T::Acc, B>>,
    /// `steps` as a tensor for checkpoints, with one element for each tensor of the model that the
    /// parameter holds.
    count: Option<Param<T::Acc, B>>,
    /// The revision of `count` when this state last wrote or read it.
    count_revision: Option<u64>,
}

/// An exclusive view of a tensor of the state.
type SliceMut<'a, T, B> = <B as Device>::SliceMut<'a, <T as Element>::Acc>;

impl<T: Element, B: Device> fmt::Debug for States<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("States").field("layout", &self.layout).field("all", &self.all).finish_non_exhaustive()
    }
}

impl<T: Element, B: Device> States<T, B> {
    /// Makes an empty map.
    pub(super) fn new(layout: Layout) -> Self {
        Self { layout, all: Vec::new(), places: HashMap::new(), groups: None }
    }

    /// Sets the function that returns the options of each parameter.
    pub(super) fn set_groups(&mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) {
        self.groups = Some(Box::new(groups));
    }

    fn group(&self, param: &Param<T, B>) -> ParamGroup {
        self.groups.as_ref().map_or(ParamGroup::default(), |groups| groups(param))
    }
}

impl<T: Element, B: Backend> States<T, B> {
    /// Returns the largest number of steps of any parameter.
    pub(super) fn steps(&self) -> u64 {
        // Ignore an invalid number that the caller set in `count`, because the next step returns
        // the error.
        let steps = |state: &State<T, B>| {
            if state.is_count_set() {
                state.read_count(self.layout.op).unwrap_or(state.steps)
            } else {
                state.steps
            }
        };
        self.all.iter().map(steps).max().unwrap_or(0)
    }

    /// Reads the states of the given parameters. Skips parameters without state in the source.
    pub(super) fn load(layout: Layout, source: &dyn WeightSource, params: &[Param<T, B>]) -> Result<Self> {
        let mut states = Self::new(layout);
        states.check(params)?;
        for param in params {
            if let Some(state) = State::load(layout, source, param)? {
                states.push(param, state);
            }
        }
        Ok(states)
    }

    /// Lists every tensor of every state.
    pub(super) fn params(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        let mut all = Vec::new();
        for state in &mut self.all {
            state.list(self.layout.op, &mut all)?;
        }
        Ok(all)
    }

    /// Checks all parameters, and then calls `update` for each parameter that has a gradient.
    pub(super) fn each(
        &mut self,
        params: &[Param<T, B>],
        update: impl Fn(&Param<T, B>, &Tensor<T::Acc, B>, ParamGroup, &State<T, B>) -> Result<()>,
    ) -> Result<()> {
        self.check(params)?;
        let op = self.layout.op;
        for param in params {
            let Some(grad) = param.grad() else { continue };
            let (group, state) = (self.group(param), self.of(param)?);
            if state.revision != param.revision() {
                state.update_master(param)?;
            }
            state.take_count(op)?;
            state.steps += 1;
            update(param, &grad, group, state)?;
            // If the caller holds a handle of `count`, write the new number there too.
            if state.count.as_ref().is_some_and(Param::is_shared) {
                state.write_count()?;
            }
        }
        Ok(())
    }

    /// Checks all parameters before any of them is changed.
    fn check(&self, params: &[Param<T, B>]) -> Result<()> {
        let (op, mut seen) = (self.layout.op, HashSet::new());
        check_once(op, params)?;
        for param in params {
            param.check_complete(op)?;
            let name = param.name();
            if !seen.insert(name.to_string()) {
                let reason = format!(
                    "{name} is listed twice: state is kept by name, so each parameter needs a unique name \
                     (`Weights::at`)"
                );
                return Err(Error::invalid(op, reason));
            }
            let ParamGroup { lr_scale, weight_decay } = self.group(param);
            within(op, format_args!("lr_scale of {name}"), lr_scale, 0.0..f64::INFINITY)?;
            let weight_decay = weight_decay.unwrap_or_default();
            within(op, format_args!("weight_decay of {name}"), weight_decay, 0.0..f64::INFINITY)?;
            if param.grad().is_some() {
                drop(param.value_mut()?);
            }
            if let Some(&at) = self.places.get(name) {
                self.all[at].check(op, param)?;
            }
        }
        Ok(())
    }

    /// Returns the state of a parameter. Makes the state if the parameter has none.
    fn of(&mut self, param: &Param<T, B>) -> Result<&mut State<T, B>> {
        let at = match self.places.get(param.name()) {
            Some(&at) => at,
            None => self.push(param, State::new(self.layout, param)?),
        };
        Ok(&mut self.all[at])
    }

    fn push(&mut self, param: &Param<T, B>, state: State<T, B>) -> usize {
        let at = self.all.len();
        self.places.insert(param.name().to_string(), at);
        self.all.push(state);
        at
    }
}

impl<T: Element, B: Backend> State<T, B> {
    /// Makes the state of a parameter. `make` makes each tensor from its kind, name, shape and
    /// regions.
    fn of(
        layout: Layout,
        param: &Param<T, B>,
        make: impl Fn(&str, String, Shape, Vec<ParamRegion>) -> Result<Param<T::Acc, B>>,
    ) -> Result<Self> {
        let (mut sums, mut master, mut count) = (Vec::new(), None, None);
        for kind in layout.kinds::<T>() {
            let (mut shape, mut regions) = (param.shape(), param.regions().to_vec());
            if kind == STEP {
                regions = count_regions(&regions);
                shape = [regions.len()].into();
            }
            regions.iter_mut().for_each(|own| own.tensor = layout.name(kind, &own.tensor));
            let tensor = make(kind, layout.name(kind, param.name()), shape, regions)?;
            match kind {
                MASTER => master = Some(tensor),
                STEP => count = Some(tensor),
                _ => sums.push(tensor),
            }
        }
        let (regions, revision) = (param.regions().to_vec(), param.revision());
        let count_revision = count.as_ref().map(Param::revision);
        Ok(Self { regions, revision, steps: 0, sums, master, count, count_revision })
    }

    /// Makes the initial state: the sums and the number of steps are 0, and the master weight is
    /// the value.
    fn new(layout: Layout, param: &Param<T, B>) -> Result<Self> {
        Self::of(layout, param, |kind, name, shape, regions| {
            let value = match kind {
                MASTER => param.value()?.convert()?,
                _ => Tensor::zeros(param.device(), shape)?,
            };
            Ok(Param::new(name, value, regions))
        })
    }

    /// Reads the state of a parameter. Returns `None` if the source has no tensor of that state.
    fn load(layout: Layout, source: &dyn WeightSource, param: &Param<T, B>) -> Result<Option<Self>> {
        let regions = param.regions();
        let of = |kind| regions.iter().map(move |own| layout.name(kind, &own.tensor));
        let names = layout.kinds::<T>().flat_map(of);
        let (there, absent): (Vec<_>, Vec<_>) = names.partition(|name| source.contains(name));
        match (there.first(), absent.first()) {
            (None, _) => return Ok(None),
            (Some(there), Some(absent)) => {
                let reason = format!("the source has `{there}`, but not `{absent}`");
                return Err(Error::invalid(layout.op, reason));
            }
            (Some(_), None) => {}
        }
        let (device, weights) = (param.device(), Weights::new(source));
        let mut state = Self::of(layout, param, |_, name, shape, regions| {
            Param::load(device, &weights, &name, Role::Bias, shape, regions)
        })?;
        state.steps = state.read_count(layout.op)?;
        state.update_master(param)?;
        Ok(Some(state))
    }

    /// Appends the tensors of the state to `all`.
    fn list(&mut self, op: &'static str, all: &mut Vec<Param<T::Acc, B>>) -> Result<()> {
        self.take_count(op)?;
        self.write_count()?;
        all.extend(self.sums.iter().chain(&self.master).chain(&self.count).cloned());
        Ok(())
    }

    /// Writes the number of steps to `count`.
    fn write_count(&mut self) -> Result<()> {
        let Some(count) = &self.count else { return Ok(()) };
        count.set(Tensor::full(count.device(), count.shape(), self.steps as f64)?)?;
        self.count_revision = Some(count.revision());
        Ok(())
    }

    /// Whether the caller has set `count` since this state last wrote or read it.
    fn is_count_set(&self) -> bool {
        self.count.as_ref().map(Param::revision) != self.count_revision
    }

    /// Takes the number of steps from `count` if the caller has set it.
    fn take_count(&mut self, op: &'static str) -> Result<()> {
        if self.is_count_set() {
            self.steps = self.read_count(op)?;
            self.count_revision = self.count.as_ref().map(Param::revision);
        }
        Ok(())
    }

    /// Reads the number of steps from `count`.
    fn read_count(&self, op: &'static str) -> Result<u64> {
        let Some(count) = &self.count else { return Ok(0) };
        let values: Vec<_> = count.value()?.to_vec()?.into_iter().map(Element::to_f64).collect();
        let first = values.first().copied().unwrap_or(0.0);
        // Refuse numbers of about 2⁵³ and more, because f64 does not hold every integer above 2⁵³.
        let countable = (0.0..9e15).contains(&first) && first.fract() == 0.0;
        if countable && values.iter().all(|&value| value == first) {
            return Ok(first as u64);
        }
        Err(Error::invalid(op, format!("{} is {values:?}, which is not a number of steps", count.name())))
    }

    /// Checks that the state matches the parameter.
    fn check(&self, op: &'static str, param: &Param<T, B>) -> Result<()> {
        let (shape, name) = (param.shape(), param.name());
        if let Some(own) = self.sums.iter().chain(&self.master).next() {
            same_shape(op, name, shape.dims(), "its state", own.shape().dims())?;
        }
        for own in self.sums.iter().chain(&self.master) {
            drop(own.value_mut()?);
        }
        if self.is_count_set() {
            self.read_count(op)?;
        }
        if *param.regions() == *self.regions {
            return Ok(());
        }
        let (now, then) = (describe(&param.regions()), describe(&self.regions));
        Err(Error::invalid(op, format!("{name} holds {now}, but its state is of {then}")))
    }

    /// Updates the master weight after the parameter's value was set. Keeps each element that still
    /// rounds to the value's element, and copies the value's element otherwise. Each element is
    /// treated independently, so the result does not depend on how the parameter is sharded.
    fn update_master(&mut self, param: &Param<T, B>) -> Result<()> {
        if let Some(master) = &self.master {
            let bits = |value: T| value.to_f64().to_bits();
            let elements = master.value()?.to_vec()?.into_iter().zip(param.value()?.to_vec()?);
            let elements: Vec<_> = elements
                .map(|(own, value)| if bits(T::narrow(own)) == bits(value) { own } else { value.widen() })
                .collect();
            master.set(Tensor::from_slice(param.device(), param.shape(), &elements)?)?;
        }
        self.revision = param.revision();
        Ok(())
    }

    /// Calls `step` with writable views of the master weight and of the sums.
    pub(super) fn write(
        &self,
        step: impl FnOnce(Option<SliceMut<'_, T, B>>, Vec<SliceMut<'_, T, B>>) -> Result<()>,
    ) -> Result<()> {
        let mut master = self.master.as_ref().map(Param::value_mut).transpose()?;
        let mut sums = self.sums.iter().map(Param::value_mut).collect::<Result<Vec<_>>>()?;
        let master = master.as_mut().map(|master| master.slice_mut()).transpose()?;
        step(master, sums.iter_mut().map(|sum| sum.slice_mut()).collect::<Result<_>>()?)
    }
}

/// Returns the regions of the count, which has one element for each tensor. The rank that owns the
/// first element of the tensor owns its count.
fn count_regions(regions: &[ParamRegion]) -> Vec<ParamRegion> {
    let mut counts: Vec<ParamRegion> = Vec::new();
    for own in regions {
        let is_first = own.region.ranges().iter().all(|range| range.start == 0 && range.end > 0);
        let owned = own.owned && is_first;
        match counts.iter_mut().find(|count| count.tensor == own.tensor) {
            Some(count) => count.owned |= owned,
            None => {
                let (tensor, row) = (own.tensor.clone(), counts.len());
                counts.push(ParamRegion { tensor, region: Region::whole([1]), row, owned });
            }
        }
    }
    counts
}

/// Formats the regions of a parameter for an error.
fn describe(regions: &[ParamRegion]) -> String {
    let describe = |own: &ParamRegion| {
        let copy = if own.owned { "" } else { " (not owned)" };
        format!("{} {:?}{copy}", own.tensor, own.region.ranges())
    };
    regions.iter().map(describe).collect::<Vec<_>>().join(", ")
}
