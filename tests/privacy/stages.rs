//! Private training of a decoder on pipeline stages, each part of which is clipped by itself.

use crate::models::{Gradients, ledger, owned_gradients};
use shardwise::{
    models::{Decoder, DecoderConfig, DecoderEnds, ModelConfig, Tokens},
    prelude::*,
    privacy::*,
    reference::worst_relative,
    train::{DataParallel, Microbatch, Pipeline, Schedule},
};

const SAMPLES: usize = 8;
const LENGTH: usize = 5;
const LAYERS: usize = 4;
const CLIP: f64 = 40.0;

fn config(tied: bool) -> DecoderConfig {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 17, "hidden_size": 16, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": tied, "attention_bias": false, "mlp_bias": false,
    });
    match ModelConfig::parse(&config.to_string()) {
        Ok(ModelConfig::Decoder(config)) => config,
        other => panic!("{other:?}"),
    }
}

/// The ids of samples, and the ids that follow.
fn tokens(samples: &[usize]) -> [Vec<u32>; 2] {
    [0, 1].map(|shift| {
        let of = |&at: &usize| (0..LENGTH).map(move |token| ((at * 5 + (token + shift) * 3) % 17) as u32);
        samples.iter().flat_map(of).collect()
    })
}

fn source() -> Random {
    Random::normal(1, 0.4)
}

/// The sum of the samples' gradients on one rank, divided by q N, where each part is clipped to
/// C / √P by itself. `part_of` says to which part a tensor belongs. Also returns how many gradients
/// of parts are clipped, and how many are not.
fn brute_force(
    samples: &[usize],
    rate: f64,
    parts: usize,
    part_of: impl Fn(&str) -> usize,
) -> Result<(Gradients, [usize; 2])> {
    let alone = Group::solo(&Cpu::new());
    let model = Decoder::<Replicated, f64, Cpu>::load(&alone, &source(), &config(false))?;
    let (params, loss) = (model.params(), VocabParallelCrossEntropy::default());
    let (mut sums, mut counts) = (Gradients::new(), [0; 2]);
    for &at in samples {
        params.iter().for_each(Param::zero_grad);
        let [ids, targets] = tokens(&[at]);
        let (logits, saved) = model.forward(&ids, Sequences::one(LENGTH))?;
        let (_, of_loss) = loss.forward(logits, &targets)?;
        model.backward(saved, loss.backward(of_loss, 1.0)?)?;
        let grads = owned_gradients(&params)?;
        let mut squares = vec![0.0; parts];
        for (name, grad) in &grads {
            squares[part_of(name)] += grad.iter().map(|g| g * g).sum::<f64>();
        }
        let bound = CLIP / (parts as f64).sqrt();
        squares.iter().for_each(|square| counts[usize::from(square.sqrt() <= bound)] += 1);
        for (name, grad) in grads {
            let factor = (bound / squares[part_of(&name)].sqrt()).min(1.0) / (rate * SAMPLES as f64);
            let sum = sums.entry(name).or_insert_with(|| vec![0.0; grad.len()]);
            sum.iter_mut().zip(&grad).for_each(|(sum, g)| *sum += factor * g);
        }
    }
    Ok((sums, counts))
}

/// Runs one step without noise on a mesh, in microbatches that padding fills up to the same size.
/// Returns the released gradients and the batch.
fn step(
    [dp, pp, tp]: [usize; 3],
    chunks: usize,
    gpipe: bool,
    tied: bool,
    rate: f64,
) -> Result<(Gradients, Vec<usize>)> {
    let ranks = launch::Threads::new(dp * pp * tp).device(Cpu::poisoned).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let (data, tensor, stages) =
            (mesh.group(Axis::Data), mesh.group(Axis::Tensor), mesh.group(Axis::Pipeline));
        let (config, microbatches) = (config(tied), 4 / dp);
        let schedule = match (gpipe, chunks) {
            (true, _) => Schedule::gpipe(pp, microbatches),
            (false, 1) => Schedule::one_forward_one_backward(pp, microbatches),
            (false, chunks) => Schedule::interleaved(pp, chunks, microbatches)?,
        };
        let model = Decoder::<Replicated, f64, Cpu>::load_stages(
            tensor,
            &source(),
            &config,
            &schedule,
            stages.rank(),
        )?;
        let pipeline = Pipeline::new(stages, tensor, schedule, config.hidden())?;
        let params = model.params();
        let replicas = DataParallel::new(data, &params)?;
        let mechanism = DpSgd::new(SAMPLES, rate, CLIP, 0.0);
        let key = RunKey::known_without_privacy(1);
        let mut private = Private::new(&mesh, model.parts(), mechanism, key, ledger()?)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        // There is room for all samples, in every step. What is in padding must not matter.
        let room = SAMPLES / dp / microbatches;
        let mut rows = own.clone();
        rows.extend((own.len()..room * microbatches).map(|at| 100 + at));
        let batches: Vec<_> = rows.chunks(room).collect();
        let texts: Vec<_> = batches.iter().map(|samples| tokens(samples)).collect();
        let inputs = texts.iter().map(|[ids, targets]| Tokens { ids, targets }).collect();
        let described: Vec<_> = batches
            .iter()
            .map(|samples| Microbatch {
                sequences: Sequences::packed(samples.iter().map(|_| LENGTH)),
                dropout: None,
            })
            .collect();
        let real = |at: usize| own.len().saturating_sub(at * room).min(room);
        let samples =
            (0..microbatches).map(|at| Samples::padded(real(at), room)).collect::<Result<Vec<_>>>()?;
        let mut ends = DecoderEnds::new(&model, inputs, VocabParallelCrossEntropy::default(), Some(1.0));
        let mut ends = PrivateEnds::new(&pipeline, &mut ends, &mut step, &samples);
        pipeline.run(model.chunks(), &described, &mut ends)?;
        step.release(Some(&replicas))?;
        let grads = if data.rank() == 0 { owned_gradients(&params)? } else { Gradients::new() };
        let is_first = stages.rank() == 0 && tensor.rank() == 0;
        Ok((grads, if is_first { own } else { Vec::new() }))
    })?;
    let (grads, batches): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
    let mut whole = Gradients::new();
    for (name, grad) in grads.into_iter().flatten() {
        let sum = whole.entry(name).or_insert_with(|| vec![0.0; grad.len()]);
        sum.iter_mut().zip(&grad).for_each(|(sum, g)| *sum += g);
    }
    Ok((whole, batches.concat()))
}

#[test]
fn parts_of_a_pipeline_are_clipped_by_themselves() -> Result<()> {
    let mut counts = [0; 2];
    for (mesh, chunks, gpipe, rate) in [
        ([1, 2, 1], 1, false, 1.0),
        ([1, 2, 1], 1, true, 1.0),
        ([1, 2, 2], 1, false, 1.0),
        ([2, 2, 1], 1, false, 1.0),
        ([1, 2, 1], 2, false, 1.0),
        ([1, 4, 1], 1, false, 1.0),
        ([1, 2, 1], 1, false, 0.6),
        ([2, 2, 1], 1, true, 0.6),
    ] {
        let (got, batch) = step(mesh, chunks, gpipe, false, rate)?;
        let expected = if rate == 1.0 { SAMPLES..=SAMPLES } else { 1..=SAMPLES - 1 };
        assert!(expected.contains(&batch.len()), "rate {rate}: {batch:?}");
        let (stages, of_stage) = (mesh[1] * chunks, Partition::even(LAYERS, mesh[1] * chunks));
        let part_of = |name: &str| {
            let layer = name.split_once("layers.").and_then(|(_, rest)| rest.split('.').next());
            match layer.map(|layer| layer.parse::<usize>().expect("a number")) {
                Some(layer) => {
                    (0..stages).position(|stage| of_stage.range(stage).contains(&layer)).expect("a stage")
                }
                None if name.contains("embed_tokens") => 0,
                None => stages,
            }
        };
        let (want, of_case) = brute_force(&batch, rate, stages + 1, part_of)?;
        assert!(got.keys().eq(want.keys()), "{:?} {:?}", got.keys(), want.keys());
        for (name, want) in &want {
            let error = worst_relative(&got[name], want);
            assert!(error < 1e-12, "{mesh:?}, {chunks} chunks, {name}: {error:e}");
        }
        (0..2).for_each(|at| counts[at] += of_case[at]);
    }
    assert!(counts[0] > 20 && counts[1] > 20, "clipped and not: {counts:?}");
    Ok(())
}

#[test]
fn a_table_that_is_tied_across_stages_is_refused() {
    let error = step([1, 2, 1], 1, false, true, 1.0).unwrap_err().to_string();
    assert!(error.contains("`embed_tokens.weight` belongs to another pipeline stage"), "{error}");
}
