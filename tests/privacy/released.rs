//! What a step releases, against one sample at a time on one rank, and its bits on any mesh.

use crate::models::*;
use shardwise::{optim::AdamW, prelude::*, privacy::*, reference::worst_relative, train::DataParallel};

const SAMPLES: usize = 40;
const CLIP: f64 = 1.5;

/// Σ cᵢ gᵢ / (q N) of the given samples, one sample at a time on one rank, and the numbers of
/// samples that are clipped and that are not.
fn brute_force(samples: &[usize], rate: f64) -> Result<(Vec<f64>, [usize; 2])> {
    let alone = Group::solo(&Cpu::new());
    let model = classifier::<f64>(&alone)?;
    let params = model.params();
    let (mut sum, mut counts) = (Vec::new(), [0; 2]);
    for &at in samples {
        params.iter().for_each(Param::zero_grad);
        backward(&model, &alone, &[at], 0)?;
        let grad = gradients(&alone, &params)?;
        let norm = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        counts[usize::from(norm <= CLIP)] += 1;
        sum.resize(grad.len(), 0.0);
        let factor = (CLIP / norm).min(1.0) / (rate * SAMPLES as f64);
        sum.iter_mut().zip(&grad).for_each(|(sum, g)| *sum += factor * g);
    }
    Ok((sum, counts))
}

/// Runs one step of a mesh. Returns the released gradient of the whole model and the batch.
fn step(
    [dp, tp]: [usize; 2],
    mechanism: DpSgd,
    seed: u64,
    microbatch: usize,
) -> Result<(Vec<f64>, Vec<usize>)> {
    let ranks = launch::Threads::new(dp * tp).device(Cpu::poisoned).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, tp)?)?;
        let (data, tensor) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor));
        let model = classifier::<f64>(tensor)?;
        let params = model.params();
        let replicas = DataParallel::new(data, &params)?;
        let key = RunKey::known_without_privacy(seed);
        let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger()?)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        for samples in own.chunks(microbatch) {
            let padding = microbatch - samples.len();
            backward(&model, tensor, samples, padding)?;
            step.clip(Samples::padded(samples.len(), microbatch)?)?;
        }
        step.release(Some(&replicas))?;
        let drawn: Vec<f64> = (0..SAMPLES).map(|at| if own.contains(&at) { 1.0 } else { 0.0 }).collect();
        let drawn = data.all_reduce_host(ReduceOp::Sum, &drawn)?;
        assert!(drawn.iter().all(|count| [0.0, 1.0].contains(count)), "a sample is in two parts");
        let batch = (0..SAMPLES).filter(|&at| drawn[at] == 1.0).collect();
        Ok((gradients(tensor, &params)?, batch))
    })?;
    assert!(ranks.iter().all(|rank| rank == &ranks[0]), "ranks differ");
    Ok(ranks[0].clone())
}

#[test]
fn a_step_without_noise_is_the_sum_of_clipped_gradients() -> Result<()> {
    let mut counts = [0; 2];
    for (seed, mesh) in [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [3, 2]].into_iter().enumerate() {
        for (rate, microbatch) in [(0.4, 5), (1.0, 40), (0.7, 1)] {
            let mechanism = DpSgd::new(SAMPLES, rate, CLIP, 0.0);
            let (got, batch) = step(mesh, mechanism, seed as u64, microbatch)?;
            assert!(rate < 1.0 || batch.len() == SAMPLES);
            let (want, of_case) = brute_force(&batch, rate)?;
            let error = worst_relative(&got, &want);
            assert!(error < 1e-12, "{mesh:?}, rate {rate}: {error:e}");
            counts[0] += of_case[0];
            counts[1] += of_case[1];
        }
    }
    assert!(counts[0] > 50 && counts[1] > 50, "clipped and not: {counts:?}");
    Ok(())
}

#[test]
fn a_loss_scale_changes_nothing_but_rounding() -> Result<()> {
    let plain = DpSgd::new(SAMPLES, 1.0, CLIP, 2.0);
    let ranks = |mechanism: DpSgd, scale: f64| {
        launch::threads(1, move |world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 1)?)?;
            let column = Columns::even(&world, 3)?;
            let source = Random::normal(2, 1.0);
            let layer = ColumnLinear::<f64, _>::load(&world, &Weights::new(&source), 2, &column, Bias::Add)?;
            let params = layer.params();
            let key = RunKey::known_without_privacy(3);
            let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger()?)?;
            let mut step = private.begin()?;
            let x = Tensor::from_vec(
                world.device(),
                [SAMPLES, 2],
                (0..2 * SAMPLES).map(|at| at as f64).collect(),
            )?;
            let x = DTensor::copied(&world, x)?.with_sequences(Sequences::packed(vec![1; SAMPLES]))?;
            let (y, saved) = layer.forward(x)?;
            let dy = y.local().to_vec()?.into_iter().map(|value| value * scale).collect();
            let dy = Tensor::from_vec(world.device(), y.local().shape(), dy)?;
            layer.backward(saved, y.with_local(dy)?)?;
            step.clip(SAMPLES)?;
            step.release(None)?;
            gradients(&world, &params)
        })
    };
    let scaled = DpSgd { loss_scale: 1024.0, ..plain };
    let (one, other) = (ranks(plain, 1.0)?, ranks(scaled, 1024.0)?);
    assert!(worst_relative(&one[0], &other[0]) < 1e-12);
    // Without the scale in the mechanism, nothing is clipped.
    assert!(worst_relative(&one[0], &ranks(plain, 1e-6)?[0]) > 1e-3);
    Ok(())
}

#[test]
fn noise_has_the_stated_deviation_and_does_not_depend_on_the_mesh() -> Result<()> {
    let (mut squares, mut count) = (0.0, 0);
    for seed in 0..40 {
        let noisy = DpSgd::new(SAMPLES, 0.5, CLIP, 3.0);
        let (with, batch) = step([1, 1], noisy, seed, 8)?;
        let (without, same) = step([1, 1], DpSgd { noise: 0.0, ..noisy }, seed, 8)?;
        assert_eq!(batch, same);
        // In units of σ C / (q N).
        let unit = 3.0 * CLIP / (0.5 * SAMPLES as f64);
        squares += with.iter().zip(&without).map(|(a, b)| ((a - b) / unit).powi(2)).sum::<f64>();
        count += with.len();
        if seed < 3 {
            for mesh in [[1, 2], [1, 4], [2, 1], [2, 2]] {
                let (other, same) = step(mesh, noisy, seed, 8)?;
                assert_eq!(batch, same, "the batch depends on the mesh");
                let error = worst_relative(&other, &with);
                assert!(error < 1e-12, "{mesh:?}: {error:e}");
            }
        }
    }
    // The variance of the mean of `count` squares is 2 / count.
    let (mean, bound) = (squares / count as f64, 5.0 * (2.0 / count as f64).sqrt());
    assert!((mean - 1.0).abs() < bound, "the variance is {mean} of {count} elements");
    Ok(())
}

/// Trains a decoder with shared key/value heads, a tied head and normalizations for some steps.
/// Returns the bits of the weights.
fn decoder_bits<S: ResidualStream, T: Element>(tp: usize) -> Result<Vec<u64>> {
    let config = serde_json::json!({
        "model_type": "qwen3", "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 20,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": true, "attention_bias": false, "use_sliding_window": false,
    });
    let Ok(models::ModelConfig::Decoder(config)) = models::ModelConfig::parse(&config.to_string()) else {
        panic!("not a decoder");
    };
    let ranks = launch::Threads::new(tp).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, tp)?)?
            .with_reduction(Axis::Tensor, Reduction::Invariant { blocks: 4 });
        let tensor = mesh.group(Axis::Tensor);
        let model = models::Decoder::<S, T, Cpu>::load(tensor, &Random::normal(1, 0.3), &config)?;
        let params = model.params();
        let mechanism = DpSgd::new(9, 0.5, 0.7, 1.1);
        let key = RunKey::known_without_privacy(8);
        let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger()?)?;
        let (mut adamw, loss) = (AdamW::default(), VocabParallelCrossEntropy::default());
        let (mut bits, mut drawn) = (Vec::new(), 0);
        for _ in 0..4 {
            let mut step = private.begin()?;
            for samples in step.samples().to_vec().chunks(3) {
                drawn += samples.len();
                // A sample has 3 to 7 tokens.
                let lengths: Vec<usize> = samples.iter().map(|at| 3 + at % 5).collect();
                let id = |at: usize, token: usize| ((at * 7 + token * 5) % 23) as u32;
                let of = |shift: usize| -> Vec<u32> {
                    let tokens =
                        |(&at, &len): (&usize, &usize)| (0..len).map(move |token| id(at, token + shift));
                    samples.iter().zip(&lengths).flat_map(tokens).collect()
                };
                let (logits, saved) = model.forward(&of(0), Sequences::packed(lengths.clone()))?;
                let (_, of_loss) = loss.forward(logits, &of(1))?;
                model.backward(saved, loss.backward(of_loss, 0.1)?)?;
                let norms = step.clip(samples.len())?.disclose("a test compares the bits")?;
                bits.extend(norms.into_iter().map(f64::to_bits));
            }
            step.release(None)?;
            adamw.step(&params, 1e-2, 1.0)?;
            bits.extend(gradients(tensor, &params)?.into_iter().map(f64::to_bits));
        }
        assert!(drawn > 6, "{drawn} samples");
        Ok(bits)
    })?;
    assert!(ranks.iter().all(|rank| rank == &ranks[0]), "ranks differ");
    assert!(ranks[0].iter().all(|bits| f64::from_bits(*bits).is_finite()));
    Ok(ranks.into_iter().next().unwrap_or_default())
}

#[test]
fn every_number_of_ranks_gives_the_same_bits() -> Result<()> {
    fn check<S: ResidualStream, T: Element>() -> Result<()> {
        let one = decoder_bits::<S, T>(1)?;
        for tp in [2, 3, 4] {
            let other = decoder_bits::<S, T>(tp)?;
            assert!(one == other, "{} on {tp} ranks", T::DTYPE);
        }
        Ok(())
    }
    check::<Replicated, f64>()?;
    check::<Shard<0>, f64>()?;
    check::<Replicated, f32>()?;
    check::<Shard<0>, half::bf16>()
}
