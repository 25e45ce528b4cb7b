//! What an optimizer keeps for each parameter.

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

/// Which tensors an optimizer keeps for each parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The optimizer.
    pub(super) op: &'static str,
    /// Its sums in the accumulator, 0 at first.
    pub(super) sums: &'static [&'static str],
    /// Whether it counts a parameter's steps.
    pub(super) counts: bool,
}

const MASTER: &str = "master";
const STEP: &str = "step";

impl Layout {
    /// What there is for a parameter of this element.
    fn kinds<T: Element>(&self) -> impl Iterator<Item = &'static str> + use<T> {
        let master = (T::DTYPE != T::Acc::DTYPE).then_some(MASTER);
        self.sums.iter().copied().chain(master).chain(self.counts.then_some(STEP))
    }

    fn name(&self, kind: &str, of: &str) -> String {
        format!("{}.{kind}.{of}", self.op)
    }
}

/// The state of each parameter that has had a gradient, by the parameter's name.
pub(super) struct States<T: Element, B: Device> {
    layout: Layout,
    /// In the order of the parameters' first gradients, which is the same on every rank.
    all: Vec<State<T, B>>,
    places: HashMap<String, usize>,
    groups: Option<Box<dyn Fn(&Param<T, B>) -> ParamGroup>>,
}

/// The state of one parameter. Its tensors are parameters of the same regions, renamed.
#[derive(Debug)]
pub(super) struct State<T: Element, B: Device> {
    /// What the parameter holds.
    regions: Vec<ParamRegion>,
    /// The value that the master belongs to ([`Param::revision`]).
    revision: u64,
    /// The number of the parameter's steps.
    pub(super) steps: u64,
    sums: Vec<Param<T::Acc, B>>,
    /// The weight in the accumulator, where the element is narrower.
    master: Option<Param<T::Acc, B>>,
    /// Where `steps` is written to be listed: one element for each of the parameter's tensors.
    count: Option<Param<T::Acc, B>>,
    /// The value that `count` had when it was written here ([`Param::revision`]).
    listed: Option<u64>,
}

/// An exclusive view of a tensor of a state.
type SliceMut<'a, T, B> = <B as Device>::SliceMut<'a, <T as Element>::Acc>;

impl<T: Element, B: Device> fmt::Debug for States<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("States").field("layout", &self.layout).field("all", &self.all).finish_non_exhaustive()
    }
}

impl<T: Element, B: Device> States<T, B> {
    /// None so far.
    pub(super) fn new(layout: Layout) -> Self {
        Self { layout, all: Vec::new(), places: HashMap::new(), groups: None }
    }

    /// With what differs between parameters.
    pub(super) fn set_groups(&mut self, groups: impl Fn(&Param<T, B>) -> ParamGroup + 'static) {
        self.groups = Some(Box::new(groups));
    }

    fn group(&self, param: &Param<T, B>) -> ParamGroup {
        self.groups.as_ref().map_or(ParamGroup::default(), |groups| groups(param))
    }
}

impl<T: Element, B: Backend> States<T, B> {
    /// The largest number of steps of a parameter.
    pub(super) fn steps(&self) -> u64 {
        // A number that was written and is none is an error of the next step.
        let steps = |state: &State<T, B>| match state.is_counted_anew() {
            true => state.counted(self.layout.op).unwrap_or(state.steps),
            false => state.steps,
        };
        self.all.iter().map(steps).max().unwrap_or(0)
    }

    /// The states that a source has of some parameters.
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

    /// Every tensor of every state.
    pub(super) fn params(&mut self) -> Result<Vec<Param<T::Acc, B>>> {
        let mut all = Vec::new();
        for state in &mut self.all {
            state.list(self.layout.op, &mut all)?;
        }
        Ok(all)
    }

    /// Calls `update` on every parameter that has a gradient, with its state, if all parameters fit
    /// their states.
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
                state.follow(param)?;
            }
            state.take_count(op)?;
            state.steps += 1;
            update(param, &grad, group, state)?;
            // Who has listed the state sees the step.
            if state.count.as_ref().is_some_and(Param::is_shared) {
                state.write_count()?;
            }
        }
        Ok(())
    }

    /// Looks at all parameters before any of them is changed.
    fn check(&self, params: &[Param<T, B>]) -> Result<()> {
        let (op, mut seen) = (self.layout.op, HashSet::new());
        check_once(op, params)?;
        for param in params {
            param.check_complete(op)?;
            let name = param.name();
            if !seen.insert(name.to_string()) {
                let reason = format!(
                    "{name} is listed twice: state is kept by name, so parameters need names of their own \
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

    /// The state of a parameter, which is made if there is none.
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
    /// The state of a parameter, of tensors that `make` makes by their kind, name, shape and
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
                regions = firsts(&regions);
                shape = [regions.len()].into();
            }
            regions.iter_mut().for_each(|part| part.tensor = layout.name(kind, &part.tensor));
            let tensor = make(kind, layout.name(kind, param.name()), shape, regions)?;
            match kind {
                MASTER => master = Some(tensor),
                STEP => count = Some(tensor),
                _ => sums.push(tensor),
            }
        }
        let (regions, revision) = (param.regions().to_vec(), param.revision());
        let listed = count.as_ref().map(Param::revision);
        Ok(Self { regions, revision, steps: 0, sums, master, count, listed })
    }

    /// The state before the first step.
    fn new(layout: Layout, param: &Param<T, B>) -> Result<Self> {
        Self::of(layout, param, |kind, name, shape, regions| {
            let value = match kind {
                MASTER => param.value()?.convert()?,
                _ => Tensor::zeros(param.device(), shape)?,
            };
            Ok(Param::new(name, value, regions))
        })
    }

    /// The state that a source has of a parameter; none where the source has nothing of it.
    fn load(layout: Layout, source: &dyn WeightSource, param: &Param<T, B>) -> Result<Option<Self>> {
        let regions = param.regions();
        let of = |kind| regions.iter().map(move |part| layout.name(kind, &part.tensor));
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
        state.steps = state.counted(layout.op)?;
        state.follow(param)?;
        Ok(Some(state))
    }

    /// Lists its tensors.
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
        self.listed = Some(count.revision());
        Ok(())
    }

    /// Whether `count` was written since it was listed.
    fn is_counted_anew(&self) -> bool {
        self.count.as_ref().map(Param::revision) != self.listed
    }

    /// Takes the number of steps from `count`, if it was written since it was listed.
    fn take_count(&mut self, op: &'static str) -> Result<()> {
        if self.is_counted_anew() {
            self.steps = self.counted(op)?;
            self.listed = self.count.as_ref().map(Param::revision);
        }
        Ok(())
    }

    /// The number of steps that is written in `count`.
    fn counted(&self, op: &'static str) -> Result<u64> {
        let Some(count) = &self.count else { return Ok(0) };
        let values: Vec<_> = count.value()?.to_vec()?.into_iter().map(Element::to_f64).collect();
        let first = values.first().copied().unwrap_or(0.0);
        // Beyond, whole numbers of f64 are not counted one by one.
        let countable = (0.0..9e15).contains(&first) && first.fract() == 0.0;
        if countable && values.iter().all(|&value| value == first) {
            return Ok(first as u64);
        }
        Err(Error::invalid(op, format!("{} is {values:?}, which is no number of steps", count.name())))
    }

    /// Whether the state is that of this parameter.
    fn check(&self, op: &'static str, param: &Param<T, B>) -> Result<()> {
        let (shape, name) = (param.shape(), param.name());
        if let Some(own) = self.sums.iter().chain(&self.master).next() {
            same_shape(op, name, shape.dims(), "its state", own.shape().dims())?;
        }
        for own in self.sums.iter().chain(&self.master) {
            drop(own.value_mut()?);
        }
        if self.is_counted_anew() {
            self.counted(op)?;
        }
        if *param.regions() == *self.regions {
            return Ok(());
        }
        let (now, then) = (describe(&param.regions()), describe(&self.regions));
        Err(Error::invalid(op, format!("{name} holds {now}, but its state is of {then}")))
    }

    /// Takes the master from a value that was set after it, element by element: one that still
    /// rounds to the value is kept, so that parts of a tensor do not depend on one another.
    fn follow(&mut self, param: &Param<T, B>) -> Result<()> {
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

    /// Lets a step write the master weight and the sums.
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

/// A part of one element for each tensor of some regions, owned together with the tensor's first
/// element.
fn firsts(regions: &[ParamRegion]) -> Vec<ParamRegion> {
    let mut firsts: Vec<ParamRegion> = Vec::new();
    for part in regions {
        let is_first = part.region.ranges().iter().all(|range| range.start == 0 && range.end > 0);
        let owned = part.owned && is_first;
        match firsts.iter_mut().find(|first| first.tensor == part.tensor) {
            Some(first) => first.owned |= owned,
            None => {
                let (tensor, row) = (part.tensor.clone(), firsts.len());
                firsts.push(ParamRegion { tensor, region: Region::whole([1]), row, owned });
            }
        }
    }
    firsts
}

/// The regions of a parameter, in words.
fn describe(regions: &[ParamRegion]) -> String {
    let part = |part: &ParamRegion| {
        let copy = if part.owned { "" } else { " (not owned)" };
        format!("{} {:?}{copy}", part.tensor, part.region.ranges())
    };
    regions.iter().map(part).collect::<Vec<_>>().join(", ")
}
