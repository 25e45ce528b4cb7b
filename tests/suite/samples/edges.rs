//! Several microbatches, gradients that are not finite, layers of one's own, and errors.

use super::{
    Batch, BoxModel, Each, Grads, Load, Model, bits, brute_force, clipped, models, norms_close, of_layer,
    replicated, shapes, step, sums_close, take_grads, tensor, together,
};
use crate::{
    dev::{DTensor, Dev, Tensor, ranks},
    quantized::Blocks,
    support::Spread,
};
use ndarray::s;
use shardwise::{
    Error, Result,
    comm::Group,
    device::Element,
    kernels::{Activation, AttentionChoices, Format, NormKind},
    ops,
    optim::sample_norms,
    parallel::{
        AttentionConfig, Bias, BlockConfig, ColumnLinear, ColumnParallelLinear, Columns, GatherFrom, Layer,
        QkNorm, ResidualStream, TransformerBlock,
    },
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Param, Random, Region, Role, SampleTerm, Weights},
};

const WORDS: usize = models::VOCABULARY;

/// The samples of a range.
fn part(batch: &Batch, range: std::ops::Range<usize>) -> Batch {
    let all: Vec<_> = batch.sequences.iter().collect();
    let rows = all[range.start].start..all[range.end - 1].end;
    Batch {
        sequences: Sequences::packed(all[range].iter().map(|rows| rows.len())),
        ids: batch.ids[rows.clone()].to_vec(),
        targets: batch.targets[rows.clone()].to_vec(),
        x: batch.x.slice(s![rows.clone(), ..]).to_owned(),
        dy: batch.dy.slice(s![rows, ..]).to_owned(),
    }
}

fn accumulate<S: ResidualStream>(world: usize, reduction: Reduction) {
    let (source, config) = models::gpt();
    let batch = Batch::random(&Sequences::packed([3, 5, 1, 2, 4]), WORDS, [1, 1]);
    let load: Load<'_, f64> = &|group| models::of_decoder::<S, f64>(group, &source, &config);
    let bound = Each::run(load, &batch).median();
    let factors = |norms: &[f64]| clipped(norms, bound);
    let one = together(load, &batch, (world, reduction), &factors);
    let outcomes = ranks(world).run(|world| {
        let group = world.with_reduction(reduction);
        let model = load(&group)?;
        let params = model.params();
        params.iter().for_each(|param| param.set_microbatches(2));
        let mut steps = Vec::new();
        for _ in 0..2 {
            let mut norms = step(&*model, &group, &part(&batch, 0..2), &factors)?;
            norms.extend(step(&*model, &group, &part(&batch, 2..5), &factors)?);
            steps.push((norms, take_grads(&params)?));
        }
        Ok(steps)
    });
    let outcomes = outcomes.unwrap();
    let norms = &outcomes[0][0].0;
    norms_close("microbatches", norms, &one.norms, super::EXACT);
    let whole = |step: usize| super::assembled(outcomes.iter().map(|steps| steps[step].1.clone()));
    sums_close("microbatches", &whole(0), &one.sum, super::EXACT);
    assert_eq!(bits(&outcomes[0][1].0), bits(norms), "the second step's norms");
    same_grads("the second step", &whole(1), &whole(0));
}

#[test]
fn microbatches_add_up_to_the_batch() {
    for world in [1, 2, 3] {
        accumulate::<Replicated>(world, Reduction::Fast);
        accumulate::<Shard<0>>(world, Reduction::Fast);
    }
    accumulate::<Shard<0>>(2, Reduction::Invariant { blocks: 8 });
}

/// Asserts that gradients are finite and have the same bits.
#[track_caller]
fn same_grads(what: &str, got: &Grads, want: &Grads) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    for (name, want) in want {
        assert!(want.iter().all(|value| value.is_finite()), "{what}: {name} is not finite");
        assert!(bits(&got[name]) == bits(want), "{what}: {name}");
    }
}

/// Runs a model with some samples whose gradients are not finite, and with finite ones in their
/// place. `damage` changes the rows of a sample.
fn not_finite<T: Element>(
    what: &str,
    load: Load<'_, T>,
    batch: &Batch,
    on: (usize, Reduction),
    damage: fn(&mut Batch, std::ops::Range<usize>),
) {
    let mut broken = batch.clone();
    let lost = [1, 3];
    for at in lost {
        let rows = batch.sequences.iter().nth(at).unwrap();
        damage(&mut broken, rows);
    }
    let fine = together(load, batch, on, &|norms| {
        norms.iter().enumerate().map(|(at, _)| if lost.contains(&at) { 0.0 } else { 0.5 }).collect()
    });
    let got = together(load, &broken, on, &|norms| {
        norms.iter().map(|norm| if norm.is_finite() { 0.5 } else { 0.0 }).collect()
    });
    for (at, (got, fine)) in got.norms.iter().zip(&fine.norms).enumerate() {
        assert_eq!(got.is_finite(), !lost.contains(&at), "{what}: the norm of sample {at} is {got}");
        assert!(lost.contains(&at) || got.to_bits() == fine.to_bits(), "{what}: the norm of sample {at}");
        assert!(fine.is_finite() && *fine > 0.0, "{what}: {fine}");
    }
    same_grads(what, &got.sum, &fine.sum);
}

fn blocks<S: ResidualStream + Spread, T: Element>() -> usize {
    let mut count = 0;
    let inputs: [fn(&mut Batch, std::ops::Range<usize>); 4] = [
        |batch, rows| batch.x[[rows.start, 2]] = f64::INFINITY,
        |batch, rows| batch.x.slice_mut(s![rows, ..]).fill(f64::NAN),
        |batch, rows| batch.dy[[rows.end - 1, 0]] = f64::NAN,
        |batch, rows| batch.dy.slice_mut(s![rows, ..]).fill(f64::NEG_INFINITY),
    ];
    let batch = Batch::random(&Sequences::packed([3, 2, 4, 1, 5, 1]), WORDS, [6, 6]);
    for gated in [false, true] {
        let norm = if gated { NormKind::RmsNorm { eps: 0.1 } } else { NormKind::LayerNorm { eps: 0.1 } };
        let attention = AttentionConfig::new(6, 4)
            .with_kv_heads(2)
            .with_head_dim(2)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qk_norm(gated.then(|| QkNorm::new(1e-3, "qn", "kn")))
            .with_qkv_bias(!gated)
            .with_out_bias(!gated);
        let config =
            BlockConfig::new(attention, 9, Activation::Silu, norm).with_gate(gated).with_mlp_bias(!gated);
        let load: Load<'_, T> = &|group| {
            let source = Random::normal(1, 0.5);
            let block = TransformerBlock::<S, T, Dev>::load(group, &Weights::new(&source), &config)?;
            Ok(of_layer(block))
        };
        for damage in inputs {
            for on in [1, 3].map(|world| (world, Reduction::Fast)) {
                not_finite(&format!("gated {gated}"), load, &batch, on, damage);
                count += 1;
            }
            let on = (2, Reduction::Invariant { blocks: 4 });
            not_finite(&format!("gated {gated}, invariant"), load, &batch, on, damage);
            count += 1;
        }
    }
    count
}

#[test]
fn samples_that_are_not_finite_leave_no_trace() {
    let count = blocks::<Replicated, f64>() + blocks::<Shard<0>, f64>() + blocks::<Shard<0>, f32>();
    assert_eq!(count, 3 * 2 * 4 * 3);
}

/// The gradient of the loss overflows: in embeddings, positions and a tied head, too.
#[test]
fn models_whose_samples_overflow_add_the_others() {
    fn check<S: ResidualStream, T: Element>(value: f64) {
        let (source, config) = models::gpt();
        let load: Load<'_, T> = &|group| models::of_decoder::<S, T>(group, &source, &config);
        let batch = Batch::random(&Sequences::packed([3, 2, 4, 1, 5]), WORDS, [1, 1]);
        let damage: fn(&mut Batch, std::ops::Range<usize>) = if value.is_nan() {
            |batch, rows| batch.x[[rows.start, 0]] = f64::NAN
        } else {
            |batch, rows| batch.x.slice_mut(s![rows, ..]).fill(1e300)
        };
        for on in [1, 2].map(|world| (world, Reduction::Fast)) {
            not_finite("gpt", load, &batch, on, damage);
        }
        not_finite("gpt", load, &batch, (2, Reduction::Invariant { blocks: 8 }), damage);
    }
    check::<Replicated, f64>(f64::NAN);
    check::<Shard<0>, f64>(f64::NAN);
    // 10³⁰⁰ is infinite in f32.
    check::<Replicated, f32>(1e300);
    check::<Shard<0>, f32>(1e300);
}

/// A layer of one's own, y = x Wᵀ + b on every rank. It keeps its terms, if `keeps`.
struct Own {
    weight: Param<f64, Dev>,
    bias: Param<f64, Dev>,
    keeps: bool,
}

impl Own {
    fn load(group: &Group<Dev>, keeps: bool) -> Result<Self> {
        let source = Random::normal(4, 0.5);
        let weights = Weights::new(&source).at("own");
        let load = |name: &str, role, shape: &[usize]| {
            Param::load_region(group.device(), &weights, name, role, Region::whole(shape), group.rank() == 0)
        };
        let weight = load("weight", Role::Weight, &[3, 5])?;
        Ok(Self { weight, bias: load("bias", Role::Bias, &[3])?, keeps })
    }
}

impl Model<f64> for Own {
    fn params(&self) -> Vec<Param<f64, Dev>> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()> {
        let device = group.device().clone();
        let (x, dy): (Tensor<f64>, Tensor<f64>) = (tensor(group, &batch.x)?, tensor(group, &batch.dy)?);
        if self.weight.keeps_terms() && self.keeps {
            let sums: Vec<f64> = (batch.sequences.iter())
                .flat_map(|rows| batch.dy.slice(s![rows, ..]).sum_axis(ndarray::Axis(0)).to_vec())
                .collect();
            let each = Tensor::from_slice(&device, [batch.samples(), 3], &sums)?;
            self.bias.keep_term(SampleTerm::Each(each));
            self.weight.keep_term(SampleTerm::Product {
                dy: (dy, 0..3),
                x,
                samples: batch.sequences.clone(),
                write: Box::new(move |operands, beta, dw| ops::linear_dw(&device, operands, beta, dw, None)),
            });
            return Ok(());
        }
        let mut dw = Tensor::empty(&device, [3, 5])?;
        ops::linear_dw(&device, (dy.mat(), x.mat()), 0.0, dw.mat_mut()?, None)?;
        self.weight.add_grad(dw)?;
        let sum = batch.dy.sum_axis(ndarray::Axis(0)).to_vec();
        self.bias.add_grad(Tensor::from_slice(&device, [3], &sum)?)
    }
}

#[test]
fn a_layer_of_ones_own_keeps_its_terms() {
    let load: Load<'_, f64> = &|group| Ok(Box::new(Own::load(group, true)?));
    let run =
        |sequences: &Sequences| brute_force("own", load, &Batch::random(sequences, 9, [5, 3]), &[1, 2, 3]);
    assert_eq!(shapes().iter().map(run).sum::<usize>(), 6 * 3);
}

/// Runs on every rank of two, and returns the error of all of them.
fn fails(what: impl Fn(&Group<Dev>) -> Result<()> + Sync) -> Error {
    let mut errors: Vec<_> =
        ranks(2).run_each(|group| what(&group)).unwrap().into_iter().map(Result::unwrap_err).collect();
    assert_eq!(errors[0].to_string(), errors[1].to_string());
    errors.remove(0)
}

fn column(group: &Group<Dev>) -> Result<BoxModel<f64>> {
    let (source, columns) = (Random::normal(1, 0.5), Columns::even(group, 4)?);
    let weights = Weights::new(&source).at("up");
    let up = ColumnParallelLinear::<Replicated, f64, Dev>::load(group, &weights, 5, &columns, Bias::Add)?;
    Ok(of_layer(up.then(GatherFrom::<1>)))
}

fn batch() -> Batch {
    Batch::random(&Sequences::packed([3, 1, 2]), 9, [5, 4])
}

#[test]
fn wrong_numbers_of_samples_are_named() {
    // The layers' input has no `with_sequences`, so its rows are one sample.
    let forgotten = fails(|group| {
        let model = column(group)?;
        let params = model.params();
        params.iter().for_each(|param| param.keep_terms(true));
        model.pass(group, &Batch { sequences: Sequences::one(6), ..batch() })?;
        sample_norms(&params, &[group], 3).map(drop)
    });
    assert_eq!(
        forgotten.to_string(),
        "gradient norm: the number of sequences in the input of the layer of up.weight is 1, but the number of samples is 3"
    );
    let factors = fails(|group| {
        let model = column(group)?;
        step(&*model, group, &batch(), &|_| vec![1.0; 2]).map(drop)
    });
    assert_eq!(
        factors.to_string(),
        "gradients of samples: the number of sequences in the input of the layer of up.weight is 3, but the number of factors is 2"
    );
    // A second backward before the first one's terms are added.
    let twice = fails(|group| {
        let model = column(group)?;
        model.params().iter().for_each(|param| param.keep_terms(true));
        model.pass(group, &batch())?;
        model.pass(group, &batch())?;
        sample_norms(&model.params(), &[group], 3).map(drop)
    });
    let twice = twice.to_string();
    assert!(twice.contains("up.weight keeps 2 terms of 1 layers"), "{twice}");
}

#[test]
fn a_layer_that_adds_a_sum_of_samples_is_refused() {
    let error = fails(|group| {
        let model = Own::load(group, false)?;
        model.params().iter().for_each(|param| param.keep_terms(true));
        model.pass(group, &Batch::random(&Sequences::packed([2, 3]), 9, [5, 3]))
    });
    assert!(
        matches!(&error, Error::Unsupported { reason, .. } if reason.contains("own.weight")),
        "{error:?}"
    );
}

/// `keep_terms(false)` drops the terms. The ordinary backward has the gradient of a model that
/// never kept any.
#[test]
fn dropped_terms_leave_the_ordinary_backward() {
    let (source, config) = models::gpt();
    let batch = Batch::random(&Sequences::packed([3, 5, 2]), WORDS, [1, 1]);
    for world in [1, 2] {
        let run = |kept: bool| {
            let grads = ranks(world).run(|group| {
                let model = models::of_decoder::<Shard<0>, f64>(&group, &source, &config)?;
                let params = model.params();
                if kept {
                    params.iter().for_each(|param| param.keep_terms(true));
                    model.pass(&group, &batch)?;
                    assert!(params.iter().all(|param| param.kept() > 0 && param.grad().is_none()));
                    params.iter().for_each(|param| param.keep_terms(false));
                    assert!(params.iter().all(|param| param.kept() == 0 && !param.keeps_terms()));
                }
                model.pass(&group, &batch)?;
                assert!(params.iter().all(|param| param.grad().is_some()));
                take_grads(&params)
            });
            super::assembled(grads.unwrap())
        };
        let (plain, dropped) = (run(false), run(true));
        same_grads("dropped", &dropped, &plain);
        // With all factors 1, kept terms add up to the same gradient.
        let load: Load<'_, f64> = &|group| models::of_decoder::<Shard<0>, f64>(group, &source, &config);
        let ones = together(load, &batch, (world, Reduction::Fast), &|norms| vec![1.0; norms.len()]);
        sums_close("factors of 1", &ones.sum, &plain, super::EXACT);
    }
}

/// A quantized weight keeps no terms and has no gradient. The bias of its layer keeps its own.
#[test]
fn quantized_weights_keep_no_terms() {
    let source = Blocks::default().with("weight", Format::Q8_0, [12, 32]).with_dense("bias", &[12]);
    let batch = Batch::random(&Sequences::packed([3, 1, 2]), 9, [32, 12]);
    let load: Load<'_, f32> = &|group| {
        let (columns, weights) = (Columns::even(group, 12)?, Weights::new(&source));
        let up =
            ColumnParallelLinear::<Replicated, f32, Dev>::load(group, &weights, 32, &columns, Bias::Add)?;
        assert!(up.weight().is_quantized());
        Ok(of_layer(up.then(GatherFrom::<1>)))
    };
    for world in [1, 2, 3] {
        let got = together(load, &batch, (world, Reduction::Fast), &|norms| vec![0.5; norms.len()]);
        // The bias alone has a gradient: the sum of the rows of dy.
        let sums = batch.sequences.iter().map(|rows| batch.dy.slice(s![rows, ..]).sum_axis(ndarray::Axis(0)));
        let want: Vec<f64> = sums.map(|sum| (&sum * &sum).sum().sqrt()).collect();
        norms_close("quantized", &got.norms, &want, 1e-5);
        let want = batch.dy.sum_axis(ndarray::Axis(0)) * 0.5;
        crate::support::close("bias", &got.sum["bias"], &want, 1e-5);
        assert!(got.sum["weight"].iter().all(|value| *value == 0.0));
    }
}

/// A quantized and a dense weight with the same input. Only the dense one counts.
#[test]
fn quantized_and_dense_weights_have_one_input() {
    let source = Blocks::default()
        .with("one.weight", Format::Q8_0, [12, 32])
        .with_dense("one.bias", &[12])
        .with_dense("two.weight", &[9, 32]);
    let batch = Batch::random(&Sequences::packed([3, 1, 2]), 9, [32, 21]);
    let load: Load<'_, f32> = &|group| {
        let weights = Weights::new(&source);
        let load = |name: &str, outputs: usize, bias: Bias| {
            ColumnLinear::load(group, &weights.at(name), 32, &Columns::even(group, outputs)?, bias)
        };
        let both = vec![load("one", 12, Bias::Add)?, load("two", 9, Bias::None)?];
        Ok(of_layer(ColumnParallelLinear::<Replicated, f32, Dev>::concat(both)?.then(GatherFrom::<1>)))
    };
    let got = together(load, &batch, (1, Reduction::Fast), &|norms| vec![0.5; norms.len()]);
    let of = |rows: std::ops::Range<usize>| {
        let (x, dy) = (batch.x.slice(s![rows.clone(), ..]), batch.dy.slice(s![rows, ..]));
        (dy.slice(s![.., ..12]).sum_axis(ndarray::Axis(0)), dy.slice(s![.., 12..]).t().dot(&x))
    };
    let norm = |rows| {
        let (db, dw) = of(rows);
        ((&db * &db).sum() + (&dw * &dw).sum()).sqrt()
    };
    let want: Vec<f64> = batch.sequences.iter().map(norm).collect();
    norms_close("dense", &got.norms, &want, 1e-5);
    let (db, dw) = of(0..6);
    // All factors are 1/2.
    crate::support::close("bias", &got.sum["one.bias"], &(db * 0.5), 1e-5);
    crate::support::close("weight", &got.sum["two.weight"], &(dw * 0.5), 1e-5);
    assert!(got.sum["one.weight"].iter().all(|value| *value == 0.0));
}

/// A parameter without kept terms adds nothing to the norms. No samples have no norms.
#[test]
fn microbatches_without_samples_have_no_norms() {
    let outcomes = ranks(2).run(|group| {
        let model = column(&group)?;
        let params = model.params();
        params.iter().for_each(|param| param.keep_terms(true));
        let none = sample_norms(&params, &[&group], 3)?;
        let x = Batch::random(&Sequences::packed([]), 9, [5, 4]);
        let empty: DTensor<Replicated, f64> = replicated(&group, &x.x, &x.sequences)?;
        assert_eq!(empty.sequences().len(), 0);
        model.pass(&group, &x)?;
        let norms = sample_norms(&params, &[&group], 0)?;
        params.iter().try_for_each(|param| param.add_kept(&[]))?;
        Ok((none, norms, take_grads(&params)?))
    });
    for (none, norms, grads) in outcomes.unwrap() {
        assert_eq!(none, [0.0; 3]);
        assert!(norms.is_empty());
        assert!(grads.iter().flat_map(|(.., values)| values).all(|value| *value == 0.0));
    }
}
