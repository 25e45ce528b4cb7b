//! A user-defined layer: a mixture of experts that replaces the MLP of a transformer block. The
//! experts are distributed over the ranks.
//!
//! `cargo run --release --bin experts` compares the layer on 1 to 4 ranks with a loop over
//! tokens on one device, forward and backward. The docs of `Layer` explain how to write such
//! layers.

use ndarray::{Array2, s};
use shardwise::{
    prelude::*,
    reference::{self, MlpWeights, worst},
    rng::Philox,
};
use std::{collections::BTreeMap, marker::PhantomData};

const OP: &str = "mixture of experts";
const OP_BACKWARD: &str = "mixture of experts backward";

/// The sizes of a [`Moe`].
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    ffn: usize,
    experts: usize,
    /// The number of experts per token.
    top_k: usize,
}

/// y = Σ gate · down silu(up x) over the experts with the `top_k` largest logits: S → S.
///
/// logits = router x. The gates are the softmax of the chosen logits. The router is replicated. One
/// rank holds the whole of each expert.
///
/// * Forward: enters the tensor-parallel region (S → `Copied`), so that every rank sees all tokens.
///   A rank's term of y is the sum over its own experts. Leaving the region (`Partial` → S) sums
///   the ranks' terms.
/// * Backward: the same collectives, plus an all-reduce of the router's gradient for every S.
///
/// The forward's `leave` rejects `Reduction::Invariant`, because each rank first sums over its own
/// experts. So the bits depend on the number of ranks.
struct Moe<S: ResidualStream, T: Element, B: Backend> {
    group: Group<B>,
    /// A group of this rank alone, in which the experts run.
    solo: Group<B>,
    router: Param<T, B>,
    /// This rank's experts and their indices.
    experts: Vec<(u32, Expert<T, B>)>,
    top_k: usize,
    stream: PhantomData<S>,
}

type Expert<T, B> = ParallelMlp<Replicated, T, B>;

/// The saved tensors for the backward.
struct MoeSaved<T: Element, B: Backend> {
    /// The inputs of all tokens.
    x: Tensor<T, B>,
    /// `[tokens, top_k]`. `chosen` has the expert of each gate.
    gates: Tensor<T, B>,
    chosen: Vec<u32>,
    /// One entry per expert of this rank.
    routed: Vec<Routed<T, B>>,
}

/// The tokens routed to one expert, one row each.
struct Routed<T: Element, B: Backend> {
    tokens: Vec<u32>,
    /// The indices of the expert's gates among all `tokens · top_k` gates.
    slots: Vec<u32>,
    gates: Tensor<T, B>,
    y: Tensor<T, B>,
    saved: MlpSaved<T, B>,
}

impl<S: ResidualStream, T: Element, B: Backend> Moe<S, T, B> {
    /// Reads `router.weight`, and `experts.N.{up,down}.weight` for each expert N of this rank.
    fn load(group: &Group<B>, weights: &Weights<'_>, sizes: Sizes) -> Result<Self> {
        let Sizes { hidden, ffn, experts, top_k } = sizes;
        if !(1..=experts).contains(&top_k) {
            return Err(Error::invalid(OP, format!("top {top_k} of {experts} experts")));
        }
        // All ranks hold the router; rank 0 owns it in the parameter count.
        let (region, owned) = (Region::whole([experts, hidden]), group.rank() == 0);
        let router =
            Param::load_region(group.device(), weights, "router.weight", Role::Weight, region, owned)?;
        let solo = Group::solo(group.device());
        let expert = |number: usize| {
            let (weights, names) = (weights.at(&format!("experts.{number}")), MlpNames::default());
            let mlp = Expert::load(&solo, &weights, &names, (hidden, ffn), Activation::Silu, false)?;
            Ok((number as u32, mlp))
        };
        // `partition` returns an error if there are more ranks than experts.
        let own = group.partition(OP, "experts", experts, 1)?.range(group.rank());
        let experts = own.map(expert).collect::<Result<_>>()?;
        Ok(Self { group: group.clone(), solo, router, experts, top_k, stream: PhantomData })
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for Moe<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = MoeSaved<T, B>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let _site = self.router.site().enter();
        x.check(OP, &self.group)?;
        let (x, device) = (x.enter()?, self.group.device());
        // All ranks compute the same logits, because all have the same tokens and the same router.
        let (logits, _) = ops::linear(x.local(), &self.router.value()?, None, None)?;
        let (logits, chosen) = ops::top_k(&logits, self.top_k)?;
        let gates = softmax(&logits)?;
        let column = gates.clone().reshape([chosen.len(), 1])?;
        let mut y = Tensor::<T::Acc, B>::zeros(device, x.shape())?;
        let mut routed = Vec::with_capacity(self.experts.len());
        for (number, expert) in &self.experts {
            let is_own = |&slot: &u32| chosen[slot as usize] == *number;
            let slots: Vec<u32> = (0..chosen.len() as u32).filter(is_own).collect();
            let tokens: Vec<u32> = slots.iter().map(|slot| slot / self.top_k as u32).collect();
            let own = DTensor::replicated(&self.solo, x.local().rows(&tokens)?)?;
            let (out, saved) = expert.forward(own)?;
            let (gates, out) = (column.rows(&slots)?, out.into_local());
            device.scatter_add(&tokens, ops::scale_rows(&gates, &out)?.mat(), y.mat_mut()?)?;
            routed.push(Routed { tokens, slots, gates, y: out, saved });
        }
        let y = x.term(y.into_element()?)?.leave()?;
        Ok((y, MoeSaved { x: x.into_local(), gates, chosen, routed }))
    }

    #[track_caller]
    fn backward(&self, saved: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let _site = self.router.site().enter();
        let MoeSaved { x, gates, chosen, routed } = saved;
        dy.check(OP_BACKWARD, &self.group)?;
        if dy.shape() != x.shape() {
            let reason = format!("dy has shape {}, but y has {}", dy.shape(), x.shape());
            return Err(Error::invalid(OP_BACKWARD, reason));
        }
        let (dy, device) = (dy.enter()?, self.group.device());
        let mut dx = Tensor::<T::Acc, B>::zeros(device, x.shape())?;
        let mut dgates = Tensor::<T::Acc, B>::zeros(device, [gates.len(), 1])?;
        // Each backward must add a gradient to every parameter, so an expert without tokens adds
        // zeros.
        for ((_, expert), own) in self.experts.iter().zip(routed) {
            let dy = dy.local().rows(&own.tokens)?;
            let dgate = ops::dot_rows(&own.y, &dy)?.reshape([own.slots.len(), 1])?;
            device.scatter_add(&own.slots, dgate.mat(), dgates.mat_mut()?)?;
            let dy = DTensor::replicated(&self.solo, ops::scale_rows(&own.gates, &dy)?)?;
            let own_dx = expert.backward(own.saved, dy)?;
            device.scatter_add(&own.tokens, own_dx.local().mat(), dx.mat_mut()?)?;
        }
        // The softmax's backward is linear in the gates' gradient. So this rank's term of the
        // gates' gradient determines this rank's terms of the gradients of the logits, the router
        // and x.
        let dlogits = logits_grad(&gates, &dgates, &chosen, self.router.shape().rows())?;
        let mut drouter = Tensor::empty(device, self.router.shape())?;
        ops::linear_dw(device, (dlogits.mat(), x.mat()), 0.0, drouter.mat_mut()?, None)?;
        self.group.all_reduce(ReduceOp::Sum, &mut drouter)?;
        self.router.add_grad(drouter)?;
        let through_router = ops::linear_dx(&dlogits, &self.router.value()?, None)?;
        dy.term(ops::add(dx.into_element()?, &through_router)?)?.leave()
    }

    fn params(&self) -> Vec<Param<T, B>> {
        let experts = self.experts.iter().flat_map(|(_, expert)| expert.params());
        [self.router.clone()].into_iter().chain(experts).collect()
    }
}

/// Returns the softmax of each row, computed on the host. A row's first element is its largest.
fn softmax<T: Element, B: Backend>(logits: &Tensor<T, B>) -> Result<Tensor<T, B>> {
    let mut rows = logits.to_vec()?;
    for row in rows.chunks_mut(logits.shape().cols()) {
        let exp: Vec<f64> = row.iter().map(|logit| (logit.to_f64() - row[0].to_f64()).exp()).collect();
        let sum: f64 = exp.iter().sum();
        row.iter_mut().zip(exp).for_each(|(gate, exp)| *gate = T::from_f64(exp / sum));
    }
    Tensor::from_vec(logits.device(), logits.shape(), rows)
}

/// Returns the gradient of all logits, `[tokens, experts]`, computed on the host. A logit that was
/// not chosen has gradient 0.
fn logits_grad<T: Element, B: Backend>(
    gates: &Tensor<T, B>,
    dgates: &Tensor<T::Acc, B>,
    chosen: &[u32],
    experts: usize,
) -> Result<Tensor<T, B>> {
    let (device, tokens, top_k) = (gates.device(), gates.shape().rows(), gates.shape().cols());
    let (gates, dgates) = (gates.to_vec()?, dgates.to_vec()?);
    let term = |slot: usize| gates[slot].to_f64() * dgates[slot].to_f64();
    let mut dlogits = vec![T::default(); tokens * experts];
    for (slot, &expert) in chosen.iter().enumerate() {
        let token = slot / top_k;
        let mean: f64 = (token * top_k..(token + 1) * top_k).map(term).sum();
        let dlogit = term(slot) - gates[slot].to_f64() * mean;
        dlogits[token * experts + expert as usize] = T::from_f64(dlogit);
    }
    Tensor::from_vec(device, [tokens, experts], dlogits)
}

/// The largest allowed difference between results.
const BOUND: f64 = 1e-12;

type Matrices = BTreeMap<String, Array2<f64>>;
/// y, dx, each parameter's gradient by name, and the norm of the whole gradient.
type Results = BTreeMap<String, Vec<f64>>;

/// Computes the layer on one device, token by token.
fn reference(weights: &Matrices, top_k: usize, [x, dy]: &[Array2<f64>; 2]) -> Results {
    let router = &weights["router.weight"];
    let mut sums: Matrices = weights.iter().map(|(name, weight)| (name.clone(), weight * 0.0)).collect();
    sums.extend(["y", "dx"].map(|name| (name.into(), x * 0.0)));
    let mut add = |name: &str, row: usize, term: Array2<f64>| {
        let sum = sums.get_mut(name).expect("`sums` has every name");
        sum.slice_mut(s![row..row + term.nrows(), ..]).scaled_add(1.0, &term);
    };
    for token in 0..x.nrows() {
        let [x, dy] = [x, dy].map(|all| all.slice(s![token..=token, ..]).to_owned());
        let logits = router.dot(&x.row(0));
        let mut chosen: Vec<usize> = (0..logits.len()).collect();
        chosen.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        chosen.truncate(top_k);
        let sum: f64 = chosen.iter().map(|&expert| logits[expert].exp()).sum();
        let (mut terms, mut mean) = (Vec::new(), 0.0);
        for expert in chosen {
            let gate = logits[expert].exp() / sum;
            let [up, down] = ["up", "down"].map(|part| format!("experts.{expert}.{part}.weight"));
            let w = |name| weights[name].clone();
            let w = MlpWeights { up: w(&up), up_bias: None, down: w(&down), down_bias: None };
            let out = reference::mlp(&w, reference::Activation::Silu, &x);
            let grads = reference::mlp_backward(&w, reference::Activation::Silu, &x, &(gate * &dy));
            let dgate = (&out * &dy).sum();
            mean += gate * dgate;
            terms.push((expert, gate, dgate));
            add("y", token, gate * out);
            add("dx", token, grads.dx);
            add(&up, 0, grads.weights.up);
            add(&down, 0, grads.weights.down);
        }
        for (expert, gate, dgate) in terms {
            let dlogit = gate * (dgate - mean);
            add("router.weight", expert, dlogit * &x);
            add("dx", token, dlogit * &router.slice(s![expert..=expert, ..]));
        }
    }
    let grads = sums.iter().filter(|(name, _)| weights.contains_key(*name));
    let norm = grads.flat_map(|(_, grad)| grad).map(|grad| grad * grad).sum::<f64>().sqrt();
    let all = sums.into_iter().map(|(name, sum)| (name, sum.into_iter().collect()));
    all.chain([("norm".into(), vec![norm])]).collect()
}

/// Returns a random x and dy for a layer.
fn inputs(tokens: usize, features: usize) -> [Array2<f64>; 2] {
    [0, 1].map(|number| {
        let stream = Philox::stream(1, number);
        Array2::from_shape_fn((tokens, features), |(row, col)| stream.normal((row * features + col) as u64))
    })
}

/// Runs a forward and a backward on each rank and returns the results.
fn run<S: ResidualStream, L: Layer<f64, Cpu, In = S, Out = S>>(
    ranks: usize,
    [x, dy]: &[Array2<f64>; 2],
    load: impl Fn(&Group<Cpu>) -> Result<L> + Sync,
) -> Result<Vec<Results>> {
    launch::Threads::new(ranks).device(Cpu::poisoned).run(|group| {
        let layer = load(&group)?;
        let (rows, sequences) = (S::local_rows(&group, x.nrows())?, Sequences::packed([2, x.nrows() - 2]));
        let spread = |whole: &Array2<f64>| {
            let local = Tensor::from_array(group.device(), &whole.slice(s![rows.clone(), ..]))?;
            S::of_local(&group, whole.nrows(), local)?.with_sequences(sequences.clone())
        };
        let (y, saved) = layer.forward(spread(x)?)?;
        let dx = layer.backward(saved, spread(dy)?)?;
        if [&y, &dx].iter().any(|tensor| *tensor.sequences() != sequences) {
            return Err(Error::invalid("experts", "the sequences were lost"));
        }
        let params = layer.params();
        let norm = optim::grad_norm(&params, &[&group])?;
        let whole = |tensor: DTensor<S, f64, Cpu>| tensor.enter()?.local().to_vec();
        let results = [("y".into(), whole(y)?), ("dx".into(), whole(dx)?), ("norm".into(), vec![norm])];
        let mut results = Results::from(results);
        for param in params {
            let missing = || Error::invalid("experts", format!("{param:?} has no gradient"));
            results.insert(param.name().into(), param.grad().ok_or_else(missing)?.to_vec()?);
        }
        Ok(results)
    })
}

/// Returns an error if a rank's results differ from the expected ones by more than [`BOUND`].
fn check<S: ResidualStream, L: Layer<f64, Cpu, In = S, Out = S>>(
    case: &str,
    inputs: &[Array2<f64>; 2],
    load: impl Fn(&Group<Cpu>) -> Result<L> + Sync,
    want: &Results,
) -> Result<()> {
    let (case, mut largest) = (format!("{case}, {}", S::NAME), 0.0_f64);
    for ranks in 1..=4 {
        let results = run(ranks, inputs, &load)?;
        for (name, want) in want {
            let got = results.iter().filter_map(|rank| rank.get(name));
            let got: Vec<f64> = got.map(|got| worst(got, want)).collect();
            // One rank holds each expert's gradients. Every rank holds all other results.
            let holders = if name.contains("experts.") { 1 } else { ranks };
            if got.len() != holders || !got.iter().all(|&difference| difference <= BOUND) {
                let reason = format!("{case}, {ranks} ranks: {name} differs by {got:?} on its ranks");
                return Err(Error::invalid("experts", reason));
            }
            largest = got.into_iter().fold(largest, f64::max);
        }
    }
    println!("{case}, 1 to 4 ranks: largest difference {largest:.1e}");
    Ok(())
}

/// Compares the layer with the reference.
fn check_layer<S: ResidualStream>(tokens: usize, sizes: Sizes) -> Result<()> {
    let source = Random::normal(1, 0.3);
    let load = |group: &Group<Cpu>| Moe::<S, f64, Cpu>::load(group, &Weights::new(&source), sizes);
    let mut weights = Matrices::new();
    for param in load(&Group::solo(&Cpu::new()))?.params() {
        let weight = param.value()?.to_array()?.into_dimensionality();
        weights.insert(param.name().into(), weight.expect("all weights are matrices"));
    }
    let inputs = inputs(tokens, sizes.hidden);
    let want = reference(&weights, sizes.top_k, &inputs);
    let case = format!("top {} of {} experts, {tokens} tokens", sizes.top_k, sizes.experts);
    check::<S, _>(&case, &inputs, load, &want)
}

/// Compares a transformer block that contains a [`Moe`], on 1 to 4 ranks, with the same block on
/// one rank.
fn check_block<S: ResidualStream>(sizes: Sizes) -> Result<()> {
    let load = |group: &Group<Cpu>| {
        let (source, names) = (Random::normal(1, 0.3), BlockNames::default());
        let weights = Weights::new(&source);
        let kind = NormKind::RmsNorm { eps: 1e-5 };
        let norm = |name: &str| Normalize::load(group, &weights.at(name), kind, sizes.hidden);
        let config = AttentionConfig::new(sizes.hidden, 4);
        let attention = ParallelAttention::load(group, &weights, &names.qkv, &names.out, &config)?;
        let experts = Moe::<S, f64, Cpu>::load(group, &weights.at("mlp"), sizes)?;
        let [norm1, norm2] = [norm(&names.norm1)?, norm(&names.norm2)?];
        Ok(TransformerBlock::new(NormPlacement::Pre, (norm1, attention), (norm2, experts)))
    };
    let inputs = inputs(11, sizes.hidden);
    let mut want = run(1, &inputs, load)?.swap_remove(0);
    // The ranks shard the attention's weights, so the shapes of the gradients depend on the number
    // of ranks.
    want.retain(|name, _| !name.starts_with("attention"));
    check::<S, _>("transformer block", &inputs, load, &want)
}

fn main() -> Result<()> {
    let sizes = |experts, top_k| Sizes { hidden: 8, ffn: 6, experts, top_k };
    // Some cases have experts without tokens, or a rank without tokens. In the last case every
    // token uses every expert.
    for (tokens, sizes) in [(11, sizes(5, 2)), (3, sizes(5, 1)), (7, sizes(4, 4))] {
        check_layer::<Replicated>(tokens, sizes)?;
        check_layer::<Shard<0>>(tokens, sizes)?;
    }
    check_block::<Replicated>(sizes(5, 2))?;
    check_block::<Shard<0>>(sizes(5, 2))
}
