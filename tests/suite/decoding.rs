//! The parts of language models that encoders do not have: rotary embedding, head norms, windows,
//! key/value cache, sampling. The tests compare them with the reference and with each other.

use crate::dev::{self, DTensor, Dev, Tensor, ranks};
use crate::support::{Case, arrays, close, grads_close, matrix, random, run};
use ndarray::{Array1, Array2, Axis, concatenate, s};
use proptest::prelude::*;
use shardwise::{
    Error,
    comm::Group,
    device::Element,
    kernels::{AttentionChoices, QkvHeads, RopePairs, RopeSpec},
    ops::{self, CachedKeys, RopeConfig, RopeScaling, Rotary},
    parallel::{
        Attention, AttentionConfig, Context, KvCache, Layer, ParallelAttention, QkNorm, QkvLayout, Sampler,
    },
    reference,
    shard::{Heads, Partition, Placement, Replicated, Sequences, Shard},
    tensor::{Random, Weights},
};

const EXACT: f64 = 1e-12;

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn tensor<T: Element>(cpu: &Dev, x: &Array2<f64>) -> Tensor<T> {
    Tensor::from_array(cpu, &x.mapv(T::from_f64)).unwrap()
}

fn wide<T: Element>(x: &Tensor<T>) -> Array2<f64> {
    x.to_array().unwrap().mapv(T::to_f64).into_dimensionality().unwrap()
}

fn rope_config(dim: usize, pairs: RopePairs) -> RopeConfig {
    RopeConfig { dim, base: 100.0, pairs, scaling: RopeScaling::None }
}

/// Let u be one rounding to T. The inputs are exact. A rotation rounds the cosine and the sine, two
/// products, their sum, and the result. So it errs by at most 5 u (|a| + |b|).
fn rope_agrees<T: Element>(config: &RopeConfig, head_dim: usize, sequences: &Sequences, seed: u64) {
    let cpu = dev::poisoned();
    let x = matrix(seed, "x", sequences.rows(), 2 * head_dim + 3).mapv(|x| T::from_f64(x).to_f64());
    let rotary = Rotary::new(config, head_dim).unwrap();
    let positions: Vec<usize> = sequences.positions().map(|position| position as usize).collect();
    let (frequencies, interleaved) = (config.frequencies(0), config.pairs == RopePairs::Interleaved);
    let part = x.slice(s![.., 1..1 + 2 * head_dim]).to_owned();
    let bound = match T::EPSILON {
        epsilon if epsilon < 1e-12 => EXACT,
        epsilon => 5.0 * epsilon,
    };
    for transposed in [false, true] {
        let want = if transposed {
            reference::rope_backward(&part, head_dim, &positions, &frequencies, interleaved, 1.0)
        } else {
            reference::rope(&part, head_dim, &positions, &frequencies, interleaved, 1.0)
        };
        let mut got = tensor::<T>(&cpu, &x);
        rotary.turn(&mut got, 1..1 + 2 * head_dim, sequences, transposed).unwrap();
        let got = wide(&got);
        close("rope", &got.slice(s![.., 1..1 + 2 * head_dim]).to_owned().into_dyn(), &want, bound);
        for column in [0, 2 * head_dim + 1, 2 * head_dim + 2] {
            assert_eq!(got.column(column), x.column(column), "columns outside the heads stay");
        }
    }
}

/// The reference's RMSNorm, applied to each head.
fn norm_heads(x: &Array2<f64>, gamma: &Array1<f64>, eps: f64) -> Array2<f64> {
    let heads = x.axis_chunks_iter(Axis(1), gamma.len());
    let parts: Vec<_> = heads.map(|head| reference::rms_norm(&head.to_owned(), gamma, eps)).collect();
    concatenate(Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap()
}

fn norm_heads_backward(
    x: &Array2<f64>,
    gamma: &Array1<f64>,
    eps: f64,
    dy: &Array2<f64>,
) -> (Array2<f64>, Array1<f64>) {
    let mut dgamma = Array1::zeros(gamma.len());
    let mut parts = Vec::new();
    for (x, dy) in x.axis_chunks_iter(Axis(1), gamma.len()).zip(dy.axis_chunks_iter(Axis(1), gamma.len())) {
        let grads = reference::rms_norm_backward(&x.to_owned(), gamma, eps, &dy.to_owned());
        dgamma += &grads.dgamma;
        parts.push(grads.dx);
    }
    (concatenate(Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap(), dgamma)
}

/// Returns the columns of `[q | k | v]` by rank. A rank has its query heads, and the key/value
/// heads that they use.
fn spread(heads: &Heads, q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>) -> Array2<f64> {
    let dim = heads.head_dim();
    let mut parts = Vec::new();
    for rank in 0..heads.ranks() {
        let (query, kv) = (heads.query_range(rank), heads.kv_range(rank));
        parts.push(q.slice(s![.., query.start * dim..query.end * dim]));
        parts.push(k.slice(s![.., kv.start * dim..kv.end * dim]));
        parts.push(v.slice(s![.., kv.start * dim..kv.end * dim]));
    }
    concatenate(Axis(1), &parts).unwrap()
}

#[derive(Clone, Copy, Debug)]
struct RandomHeads {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<usize>,
    interleaved: bool,
    seed: u64,
}

impl RandomHeads {
    fn config(&self) -> AttentionConfig {
        let pairs = if self.interleaved { RopePairs::Interleaved } else { RopePairs::Halves };
        AttentionConfig::new(6, self.heads)
            .with_kv_heads(self.kv_heads)
            .with_head_dim(self.dim)
            .with_choices(AttentionChoices { window: self.window, ..AttentionChoices::CAUSAL })
            .with_rope(rope_config(self.dim / 2 * 2, pairs))
            .with_qk_norm(QkNorm::new(1e-5, "q_norm", "k_norm"))
    }
}

/// Compares head norms, rotation and windowed attention over ranks with the reference, forward and
/// all gradients. If several ranks hold a key/value head, the sum of their gradients is the
/// reference's.
fn attention_agrees(sizes: RandomHeads, world: usize, sequences: &Sequences) {
    let RandomHeads { heads, kv_heads, dim, window, interleaved, seed } = sizes;
    let rows = sequences.rows();
    let (q, k, v) = (
        matrix(seed, "q", rows, heads * dim),
        matrix(seed, "k", rows, kv_heads * dim),
        matrix(seed, "v", rows, kv_heads * dim),
    );
    let dy = matrix(seed, "dy", rows, heads * dim);
    let gamma = |name| random(seed, name, &[dim]).into_dimensionality::<ndarray::Ix1>().unwrap();
    let (q_gamma, k_gamma) = (gamma("q_norm"), gamma("k_norm"));
    let positions: Vec<usize> = sequences.positions().map(|position| position as usize).collect();
    let frequencies = sizes.config().rope.unwrap().frequencies(0);
    let turn = |x: &Array2<f64>| reference::rope(x, dim, &positions, &frequencies, interleaved, 1.0);
    let turn_back =
        |x: &Array2<f64>| reference::rope_backward(x, dim, &positions, &frequencies, interleaved, 1.0);
    let (turned_q, turned_k) = (turn(&norm_heads(&q, &q_gamma, 1e-5)), turn(&norm_heads(&k, &k_gamma, 1e-5)));
    let scale = 1.0 / (dim as f64).sqrt();
    let spec = reference::AttentionSpec { heads, kv_heads, head_dim: dim, causal: true, window, scale };
    let ranges: Vec<_> = sequences.iter().collect();
    let want = reference::attention(&spec, &turned_q, &turned_k, &v, &ranges, sequences.valid());
    let grads =
        reference::attention_backward(&spec, &turned_q, &turned_k, &v, &ranges, sequences.valid(), &dy);
    let (want_dq, dq_gamma) = norm_heads_backward(&q, &q_gamma, 1e-5, &turn_back(&grads.dq));
    let (want_dk, dk_gamma) = norm_heads_backward(&k, &k_gamma, 1e-5, &turn_back(&grads.dk));

    let plan = Heads::new(heads, kv_heads, dim, world).unwrap();
    let x = spread(&plan, &q, &k, &v);
    let weights = arrays([
        ("q_norm.weight", q_gamma.clone().into_dyn()),
        ("k_norm.weight", k_gamma.clone().into_dyn()),
    ]);
    let case = Case {
        sequences: sequences.clone(),
        x_partition: Some(plan.qkv_features()),
        dy_partition: Some(plan.query_features()),
        ..Case::new(world, &x, &dy, &weights)
    };
    let got = run!(f64, &case, |group, weights| {
        Attention::<f64, Dev>::load(group, weights, &plan, &sizes.config())
    })
    .unwrap();
    close("attention", &got.y.into_dyn(), &want, EXACT);
    let wants = [("q_norm.weight", dq_gamma.into_dyn()), ("k_norm.weight", dk_gamma.into_dyn())];
    grads_close(&got.grads, &wants, EXACT);
    let mut sums = [(); 3].map(|()| Array2::<f64>::zeros((rows, 0)));
    sums[0] = Array2::zeros((rows, heads * dim));
    sums[1] = Array2::zeros((rows, kv_heads * dim));
    sums[2] = sums[1].clone();
    let mut first = 0;
    for rank in 0..world {
        let (query, kv) = (plan.query_range(rank), plan.kv_range(rank));
        for (sum, range) in sums.iter_mut().zip([query, kv.clone(), kv]) {
            let (to, count) = (range.start * dim..range.end * dim, range.len() * dim);
            let mut sum = sum.slice_mut(s![.., to]);
            sum += &got.dx.slice(s![.., first..first + count]);
            first += count;
        }
    }
    for (what, (sum, want)) in
        ["dq", "dk", "dv"].into_iter().zip(sums.into_iter().zip([want_dq, want_dk, grads.dv]))
    {
        close(what, &sum.into_dyn(), &want, EXACT);
    }
}

/// Compares cached attention, in steps of `step` tokens, with the reference over the whole
/// sequences.
fn cache_agrees<T: Element>(heads: &QkvHeads, lengths: &[usize], step: usize, seed: u64, bound: f64) {
    let cpu = dev::poisoned();
    let (query, kv) = (heads.query_width(), heads.kv_heads * heads.head_dim);
    let sequences = Sequences::packed(lengths.iter().copied());
    let qkv = matrix(seed, "qkv", sequences.rows(), heads.width()).mapv(|x| T::from_f64(x).to_f64());
    let spec = reference::AttentionSpec {
        heads: heads.kv_of_query.len(),
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        causal: true,
        window: heads.choices.window,
        scale: heads.scale(),
    };
    let columns = |range: std::ops::Range<usize>| qkv.slice(s![.., range]).to_owned();
    let (q, k, v) = (columns(0..query), columns(query..query + kv), columns(query + kv..query + 2 * kv));
    let want = reference::attention(&spec, &q, &k, &v, &sequences.iter().collect::<Vec<_>>(), None);
    // Sequence i is in slot n − i, and one slot stays unused.
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut cache = CachedKeys::<T, Dev>::new(&cpu, heads, lengths.len() + 1, longest + 1).unwrap();
    let mut got = Array2::<f64>::from_elem(want.dim(), f64::NAN);
    for start in (0..longest).step_by(step) {
        let parts: Vec<_> = sequences
            .iter()
            .enumerate()
            .map(|(at, rows)| {
                (at, rows.start + start.min(rows.len())..rows.start + (start + step).min(rows.len()))
            })
            .collect();
        let rows: Vec<usize> = parts.iter().flat_map(|(_, rows)| rows.clone()).collect();
        let starts: Vec<usize> =
            parts.iter().zip(sequences.iter()).map(|((_, part), rows)| part.start - rows.start).collect();
        let now = Sequences::packed(parts.iter().map(|(_, rows)| rows.len())).starting_at(&starts).unwrap();
        let slots: Vec<usize> = parts.iter().map(|(at, _)| lengths.len() - at).collect();
        let x = tensor::<T>(&cpu, &qkv.select(Axis(0), &rows));
        ops::append_to_cache(heads, &x, &now, &slots, &mut cache).unwrap();
        let out = wide(&ops::attention_cached(heads, &x, &now, &slots, &cache).unwrap());
        for (row, out) in rows.into_iter().zip(out.rows()) {
            got.row_mut(row).assign(&out);
        }
    }
    close("cached attention", &got.into_dyn(), &want, bound);
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn rope_turns_as_the_reference_does(
        (head_dim, share) in (1..9usize, 0.0..=1.0), interleaved: bool,
        lengths in prop::collection::vec(0..5usize, 1..4), start in 0..100_000usize, seed: u64,
    ) {
        let pairs = if interleaved { RopePairs::Interleaved } else { RopePairs::Halves };
        let config = rope_config((head_dim as f64 * share) as usize / 2 * 2, pairs);
        let starts: Vec<usize> = (0..lengths.len()).map(|at| at * start).collect();
        let sequences = Sequences::packed(lengths).starting_at(&starts).unwrap();
        rope_agrees::<f64>(&config, head_dim, &sequences, seed);
        rope_agrees::<f32>(&config, head_dim, &sequences, seed);
        rope_agrees::<half::bf16>(&config, head_dim, &sequences, seed);
        rope_agrees::<half::f16>(&config, head_dim, &sequences, seed);
    }

    #[test]
    fn attention_with_norms_and_rotation_equals_the_reference(
        (kv_heads, group, world) in (1..=3usize, 1..=3usize, 1..=8usize), dim in 2..5usize,
        window in prop::option::of(1..5usize), (interleaved, padded) in (any::<bool>(), any::<bool>()), seed: u64,
    ) {
        let heads = kv_heads * group;
        let sizes = RandomHeads { heads, kv_heads, dim, window, interleaved, seed };
        let sequences = if padded {
            Sequences::padded(&[2, 5, 1], 5).unwrap()
        } else {
            Sequences::packed([4, 0, 6]).starting_at(&[3, 0, 40]).unwrap()
        };
        attention_agrees(sizes, world.min(heads), &sequences);
    }

    #[test]
    fn attention_to_a_cache_equals_the_reference(
        (kv_heads, group, dim) in (1..=3usize, 1..=10usize, 1..20usize),
        lengths in prop::collection::vec(0..30usize, 1..4), step in 1..12usize,
        window in prop::option::of(1..12usize), seed: u64,
    ) {
        let heads = QkvHeads {
            kv_of_query: (0..kv_heads * group).map(|head| head / group).collect(),
            kv_heads,
            head_dim: dim,
            choices: AttentionChoices { causal: true, window, scale: Some(0.6) },
        };
        cache_agrees::<f64>(&heads, &lengths, step, seed, EXACT);
        cache_agrees::<f32>(&heads, &lengths, step, seed, 2e-5);
        cache_agrees::<half::bf16>(&heads, &lengths, step, seed, 0.1);
    }
}

/// A prompt of more queries than fit a tile has the bits of the attention in training. The prompt
/// is read in one step into an empty cache.
#[test]
fn a_prompt_has_the_bits_of_training() {
    let cpu = dev::poisoned();
    for window in [None, Some(7), Some(150)] {
        let heads = QkvHeads {
            kv_of_query: vec![0, 0, 1],
            kv_heads: 2,
            head_dim: 5,
            choices: AttentionChoices { causal: true, window, scale: Some(0.3) },
        };
        let qkv = tensor::<f32>(&cpu, &matrix(3, "qkv", 300, heads.width()));
        let sequences = Sequences::one(300);
        let mut cache = CachedKeys::new(&cpu, &heads, 1, 300).unwrap();
        ops::append_to_cache(&heads, &qkv, &sequences, &[0], &mut cache).unwrap();
        let got = ops::attention_cached(&heads, &qkv, &sequences, &[0], &cache).unwrap();
        let (want, _) = ops::attention(&heads, &qkv, &sequences).unwrap();
        assert_eq!(got.to_vec().unwrap(), want.to_vec().unwrap());
    }
}

/// Cache contents after the last token and before the window have no influence.
#[test]
fn a_cache_hides_what_is_not_seen() {
    let cpu = dev::fresh();
    let heads = QkvHeads {
        kv_of_query: vec![0, 0],
        kv_heads: 1,
        head_dim: 3,
        choices: AttentionChoices { causal: true, window: Some(3), scale: Some(0.5) },
    };
    let clean = matrix(1, "qkv", 6, heads.width());
    let mut spoiled = clean.clone();
    for column in 6..12 {
        spoiled[[0, column]] = f64::NAN;
        spoiled[[5, column]] = f64::INFINITY;
    }
    for rows in [1, 2] {
        let out = |qkv: &Array2<f64>| {
            let mut cache = CachedKeys::<f64, Dev>::new(&cpu, &heads, 1, 6).unwrap();
            let all = tensor(&cpu, qkv);
            ops::append_to_cache(&heads, &all, &Sequences::one(6), &[0], &mut cache).unwrap();
            let now = Sequences::one(rows).starting_at(&[5 - rows]).unwrap();
            let x = tensor(&cpu, &clean.slice(s![5 - rows..5, ..]).to_owned());
            wide(&ops::attention_cached(&heads, &x, &now, &[0], &cache).unwrap())
        };
        close("cached", &out(&spoiled).into_dyn(), &out(&clean), EXACT);
    }
}

#[test]
fn caches_and_rotations_name_what_disagrees() {
    let cpu = dev::fresh();
    let heads = QkvHeads {
        kv_of_query: vec![0, 0],
        kv_heads: 1,
        head_dim: 3,
        choices: AttentionChoices { scale: Some(0.5), ..AttentionChoices::CAUSAL },
    };
    let mut cache = CachedKeys::<f32, Dev>::new(&cpu, &heads, 2, 4).unwrap();
    let x = Tensor::<f32>::zeros(&cpu, [2, 12]).unwrap();
    let mut error = |start: usize, slots: &[usize]| {
        let now = Sequences::one(2).starting_at(&[start]).unwrap();
        let append = ops::append_to_cache(&heads, &x, &now, slots, &mut cache).err();
        let attend = ops::attention_cached(&heads, &x, &now, slots, &cache).err();
        (append.map(|error| error.to_string()), attend.map(|error| error.to_string()))
    };
    assert_eq!(error(2, &[1]), (None, None));
    let (append, attend) = error(3, &[1]);
    assert_eq!(append.unwrap(), "append to cache: the end of sequence 0 is 5, but the capacity is 4");
    assert_eq!(
        attend.unwrap(),
        "cached attention: the end of sequence 0 is 5, but the capacity of the cache is 4"
    );
    let (append, attend) = error(0, &[2]);
    assert_eq!(append.unwrap(), "append to cache: the end of slot 2 is 12, but rows is 8");
    assert_eq!(attend.unwrap(), "cached attention: the end of slot 2 is 12, but rows of the cache is 8");
    assert!(error(0, &[0, 1]).0.unwrap().contains("the number of slots is 2, but that of sequences is 1"));

    for (config, head_dim) in [
        (rope_config(3, RopePairs::Halves), 4),
        (rope_config(6, RopePairs::Halves), 4),
        (RopeConfig { base: f64::NAN, ..rope_config(4, RopePairs::Halves) }, 4),
        (RopeConfig { scaling: RopeScaling::Linear { factor: 0.0 }, ..rope_config(4, RopePairs::Halves) }, 4),
        (
            RopeConfig {
                scaling: RopeScaling::DynamicNtk { factor: 2.0, trained: 8 },
                ..rope_config(2, RopePairs::Halves)
            },
            4,
        ),
    ] {
        assert!(
            matches!(Rotary::new(&config, head_dim), Err(Error::Invalid { op: "rope", .. })),
            "{config:?}"
        );
    }
    use shardwise::kernels::Rope;
    let spec = RopeSpec { head_dim: 5, frequencies: &[1.0], pairs: RopePairs::Halves, magnitude: 1.0 };
    let mut y = x.clone();
    let error = cpu.rope(&spec, &[0, 1], false, y.mat_mut().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "rope: 12 columns are not a multiple of the head dimension 5");
    let error = cpu.rope(&spec, &[0], false, y.mat_mut().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "rope: the number of positions is 1, but the number of rows is 2");
}

/// Samples from logits that are sharded over ranks.
fn sample(
    sampler: &Sampler,
    logits: &Array2<f64>,
    partition: &Partition,
    numbers: &[u64],
) -> Result<Vec<u32>, Error> {
    let all = ranks(partition.shards()).run(|group| {
        let part = logits.slice(s![.., partition.range(group.rank())]).to_owned();
        let part = Tensor::<f32>::from_array(group.device(), &part.mapv(|x| x as f32))?;
        sampler.sample(&DTensor::<Shard<1>, f32>::shard(&group, part, partition)?, numbers)
    })?;
    assert!(all.iter().all(|tokens| *tokens == all[0]), "the ranks drew different tokens");
    Ok(all.into_iter().next().unwrap())
}

#[test]
fn every_number_of_ranks_samples_the_same_tokens() {
    let logits = matrix(5, "logits", 7, 203);
    let numbers: Vec<u64> = (100..107).collect();
    for (temperature, top_k, top_p) in [
        (0.0, None, None),
        (1.0, None, None),
        (0.7, Some(3), None),
        (1.3, Some(60), None),
        (1.0, None, Some(0.5)),
        (2.0, None, Some(0.999)),
        (1.0, Some(20), Some(0.8)),
        (1.0, Some(1), None),
    ] {
        let sampler = Sampler { temperature, top_k, top_p, seed: 9 };
        let one = sample(&sampler, &logits, &Partition::even(203, 1), &numbers).unwrap();
        for partition in
            [Partition::even(203, 2), Partition::even(203, 8), Partition::from_sizes([1, 200, 2])]
        {
            assert_eq!(sample(&sampler, &logits, &partition, &numbers).unwrap(), one, "{sampler:?}");
        }
        if temperature == 0.0 || top_k == Some(1) {
            let best = |row: ndarray::ArrayView1<f64>| {
                (0..203).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
            };
            assert_eq!(one, logits.rows().into_iter().map(best).collect::<Vec<_>>());
        }
    }
    // Greedy sampling takes the first of equal logits.
    let flat = Array2::zeros((1, 9));
    assert_eq!(sample(&Sampler::greedy(), &flat, &Partition::even(9, 4), &[0]).unwrap(), [0]);
    let mut nan = flat.clone();
    nan[[0, 7]] = f64::NAN;
    for sampler in [Sampler::greedy(), Sampler { temperature: 1.0, top_p: Some(0.5), ..Sampler::greedy() }] {
        let error = sample(&sampler, &nan, &Partition::even(9, 4), &[0]).unwrap_err();
        assert!(error.to_string().contains("the logits of row 0 are NaN"), "{error}");
    }
    let senseless = Sampler { top_k: Some(0), ..Sampler::greedy() };
    assert!(sample(&senseless, &flat, &Partition::even(9, 1), &[0]).is_err());
}

/// The frequencies of 4000 samples are the probabilities after top-k and top-p, within four
/// standard deviations.
#[test]
fn samples_have_the_distribution() {
    let weights = [0.4, 0.05, 0.25, 0.2, 0.1];
    let count = 4000;
    let logits = Array2::from_shape_fn((count, 5), |(_, token)| 2.0 * f64::ln(weights[token]));
    let numbers: Vec<u64> = (0..count as u64).collect();
    for (top_k, top_p, kept) in [
        (None, None, vec![0, 1, 2, 3, 4]),
        (Some(3), None, vec![0, 2, 3]),
        (None, Some(0.84), vec![0, 2, 3]),
        (None, Some(0.86), vec![0, 2, 3, 4]),
        (Some(4), Some(0.5), vec![0, 2]),
    ] {
        let sampler = Sampler { temperature: 2.0, top_k, top_p, seed: 4 };
        let tokens = sample(&sampler, &logits, &Partition::even(5, 2), &numbers).unwrap();
        let total: f64 = kept.iter().map(|&token| weights[token]).sum();
        for (token, weight) in weights.into_iter().enumerate() {
            let p = if kept.contains(&token) { weight / total } else { 0.0 };
            let found = tokens.iter().filter(|&&sampled| sampled == token as u32).count() as f64;
            let slack = 4.0 * (count as f64 * p * (1.0 - p)).sqrt();
            assert!((found - count as f64 * p).abs() <= slack, "{sampler:?}: {token} {found} times, p {p}");
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let logits = matrix(6, "logits", 4, 11);
    let tokens = [3, 0, 10, 5];
    let want = reference::softmax(&logits, None);
    for world in [1, 3] {
        let partition = Partition::even(11, world);
        let got = ranks(world).run(|group| {
            let part = logits.slice(s![.., partition.range(group.rank())]).to_owned();
            let part = Tensor::<f64>::from_array(group.device(), &part)?;
            Sampler::log_probabilities(&DTensor::<Shard<1>, f64>::shard(&group, part, &partition)?, &tokens)
        });
        for rank in got.unwrap() {
            for (row, got) in rank.into_iter().enumerate() {
                assert!((got - want[[row, tokens[row] as usize]].ln()).abs() < EXACT);
            }
        }
    }
}

/// Wraps a layer but does not implement inference.
struct Unaware<L>(L);

impl<L: Layer<f64, Dev>> Layer<f64, Dev> for Unaware<L> {
    type In = L::In;
    type Out = L::Out;
    type Saved = L::Saved;

    fn forward(&self, x: DTensor<L::In, f64>) -> shardwise::Result<(DTensor<L::Out, f64>, L::Saved)> {
        self.0.forward(x)
    }

    fn backward(
        &self,
        saved: L::Saved,
        dy: DTensor<<L::Out as Placement>::Dual, f64>,
    ) -> shardwise::Result<DTensor<<L::In as Placement>::Dual, f64>> {
        self.0.backward(saved, dy)
    }
}

/// A step in which an attention layer does not get its context of the cache returns an error and
/// leaves the cache unchanged.
#[test]
fn a_step_that_is_not_done_right_is_refused() {
    let group = Group::solo(&dev::fresh());
    let config = AttentionConfig::new(6, 2).with_choices(AttentionChoices::CAUSAL);
    let layer = |name: &str| {
        let (source, layout) = (Random::normal(1, 0.3), QkvLayout::separate("q", "k", "v"));
        let weights = Weights::new(&source).at(name);
        ParallelAttention::<Replicated, f64, Dev>::load(&group, &weights, &layout, "o", &config).unwrap()
    };
    let one = vec![layer("0")];
    let two = vec![layer("0"), layer("1")];
    let tokens = |count: usize, sequences: Sequences| {
        let x = Tensor::full(group.device(), [count, 6], 0.5).unwrap();
        DTensor::<Replicated, f64>::replicated(&group, x).unwrap().with_sequences(sequences).unwrap()
    };
    let mut cache = KvCache::new(2, 4).unwrap();
    let attend = |layers: &Vec<_>, cache: &mut KvCache<f64, Dev>| {
        let (sequences, mut step) = cache.step(&[1], &[2])?;
        layers.infer(tokens(2, sequences), &mut step)?;
        step.finish()
    };
    attend(&one, &mut cache).unwrap();
    assert_eq!((cache.len(0), cache.len(1)), (0, 2));
    let deeper = attend(&two, &mut cache).unwrap_err().to_string();
    assert_eq!(
        deeper,
        "kv cache: slot 1 has 2 tokens, but the cache has no keys of attention layer 1: the tokens passed fewer layers, or \
         the context was used twice"
    );
    let mut of_two = KvCache::new(2, 4).unwrap();
    attend(&two, &mut of_two).unwrap();
    let shallower = attend(&one, &mut of_two).unwrap_err().to_string();
    assert_eq!(
        shallower,
        "kv cache: the number of attention layers of the step is 1, but that of the cache is 2"
    );

    let (sequences, mut step) = cache.step(&[1], &[2]).unwrap();
    let unaware = vec![Unaware(layer("0"))].infer(tokens(2, sequences.clone()), &mut step).unwrap_err();
    let without = one.infer(tokens(2, sequences), &mut Context::default()).unwrap_err();
    for error in [unaware, without] {
        assert!(error.to_string().contains("attention did not get the step's context"), "{error}");
    }
    let other = one.infer(tokens(2, Sequences::one(2)), &mut step).unwrap_err().to_string();
    assert!(other.contains("are not those of the cache's step"), "{other}");
    let unused = step.finish().unwrap_err().to_string();
    assert_eq!(unused, "kv cache: no attention layer was given the context of the step");

    // In an empty slot, a model with a different number of layers may continue the cache, even
    // after a step in which one context served two models.
    for layers in [&two, &one, &two] {
        of_two.truncate(1, 0).unwrap();
        attend(layers, &mut of_two).unwrap();
    }
    of_two.truncate(1, 0).unwrap();
    let (sequences, mut step) = of_two.step(&[1], &[2]).unwrap();
    for _ in 0..2 {
        one.infer(tokens(2, sequences.clone()), &mut step).unwrap();
    }
    step.finish().unwrap();
    attend(&one, &mut of_two).unwrap_err();
    of_two.truncate(1, 0).unwrap();
    attend(&one, &mut of_two).unwrap();

    // A step that was not finished adds no tokens to the cache.
    let (sequences, mut step) = cache.step(&[1], &[1]).unwrap();
    one.infer(tokens(1, sequences), &mut step).unwrap();
    drop(step);
    assert_eq!((cache.len(0), cache.len(1), of_two.len(1)), (0, 2, 2));
    attend(&one, &mut cache).unwrap();
    assert_eq!(cache.len(1), 4);
}
