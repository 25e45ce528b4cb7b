//! Compares whole models with transformers. `scripts/make_hf_references.py` makes small random
//! checkpoints and PyTorch's results for them.

use crate::dev::{self, Dev, Tensor, ranks};
use crate::support::{close, say};
use ndarray::{Array1, Array2};
use serde_json::Value;
use shardwise::{
    Error, Result,
    comm::Group,
    device::{AnyMut, Device, Element},
    kernels::RopePairs,
    models::{Bert, BertConfig, Decoder, DecoderConfig, ModelConfig},
    ops::{RopeConfig, RopeScaling},
    parallel::{DTensor, ResidualStream, Sampler, VocabParallelCrossEntropy},
    reference::worst,
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Param, Region, Role, WeightSource},
    weights::{Checkpoint, Save},
};
use std::{collections::BTreeMap, fs, path::PathBuf};

pub(crate) const DECODERS: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gpt2"];
const WORLDS: [usize; 6] = [1, 2, 3, 4, 5, 8];

fn folder(name: &str) -> PathBuf {
    // Tests that run on another machine name their folder in `SHARDWISE_TEST_DATA`.
    let carried = std::env::var_os("SHARDWISE_TEST_DATA").map(PathBuf::from);
    carried.unwrap_or_else(|| shardwise_tests::root().join("tests/data")).join(name)
}

pub(crate) fn decoder(name: &str) -> (Checkpoint, DecoderConfig) {
    let ModelConfig::Decoder(config) = ModelConfig::read(folder(name)).unwrap() else { panic!("{name}") };
    (Checkpoint::open(folder(name)).unwrap(), config)
}

pub(crate) fn bert() -> (Checkpoint, BertConfig) {
    let ModelConfig::Bert(config) = ModelConfig::read(folder("bert")).unwrap() else { panic!("bert") };
    (Checkpoint::open(folder("bert")).unwrap(), config)
}

/// The results of transformers.
struct Reference {
    prompts: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
    outputs: Vec<Array2<f64>>,
}

fn reference(name: &str, output: &str) -> Reference {
    let text = fs::read_to_string(folder(name).join("reference.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let lists = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(json[key].clone()).unwrap() };
    let file = Checkpoint::open(folder(name).join("reference.safetensors")).unwrap();
    let read = |at: usize| {
        let name = format!("{output}.{at}");
        let &[rows, cols] = file.shape(&name).unwrap() else { panic!("{name}") };
        let mut all = vec![0.0; rows * cols];
        let whole = Region::whole([rows, cols]);
        file.read(&name, Role::Weight, &whole, AnyMut::F64(all.as_mut_slice())).unwrap();
        Array2::from_shape_vec((rows, cols), all).unwrap()
    };
    let prompts = lists("prompts");
    let outputs = (0..prompts.len()).map(read).collect();
    Reference { prompts, greedy: lists("greedy"), outputs }
}

impl Reference {
    /// Returns all prompts, one after the other, with their outputs.
    fn packed(&self) -> (Vec<u32>, Sequences, Array2<f64>) {
        let views: Vec<_> = self.outputs.iter().map(|rows| rows.view()).collect();
        let outputs = ndarray::concatenate(ndarray::Axis(0), &views).unwrap();
        (self.prompts.concat(), Sequences::packed(self.prompts.iter().map(Vec::len)), outputs)
    }
}

/// Concatenates the ranks' logits.
fn together<T: Element>(parts: Vec<(usize, Vec<T>)>) -> Array2<f64> {
    let rows = parts[0].1.len() / parts[0].0;
    let part = |(cols, values): &(usize, Vec<T>)| {
        Array2::from_shape_vec((rows, *cols), values.iter().map(|value| value.to_f64()).collect()).unwrap()
    };
    let parts: Vec<_> = parts.iter().map(part).collect();
    ndarray::concatenate(ndarray::Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap()
}

fn bits<T: Element>(tensor: &Tensor<T>) -> Result<Vec<u64>> {
    Ok(tensor.to_vec()?.into_iter().map(|value| value.to_f64().to_bits()).collect())
}

fn logits<S: ResidualStream, T: Element>(name: &str, world: usize) -> Array2<f64> {
    let ((checkpoint, config), reference) = (decoder(name), reference(name, "logits"));
    let parts = ranks(world).run(|group| {
        let model = Decoder::<S, T, Dev>::load(&group, &checkpoint, &config)?;
        let (ids, sequences, _) = reference.packed();
        let (logits, _) = model.forward(&ids, sequences.clone())?;
        assert_eq!(logits.shape().dims(), [ids.len(), 591]);
        if world == 3 {
            let inferred = model.infer(&ids, sequences)?;
            assert_eq!(bits(inferred.local())?, bits(logits.local())?, "{name}: inference");
        }
        Ok((logits.local().shape().cols(), logits.local().to_vec()?))
    });
    together(parts.unwrap())
}

#[test]
fn decoders_have_the_logits_of_transformers() {
    for name in DECODERS {
        let (.., want) = reference(name, "logits").packed();
        for world in WORLDS {
            close(name, &logits::<Replicated, f32>(name, world).into_dyn(), &want, 1e-5);
        }
        close(name, &logits::<Shard<0>, f32>(name, 3).into_dyn(), &want, 1e-5);
        let exact = logits::<Replicated, f64>(name, 1);
        for world in [3, 8] {
            close(name, &logits::<Shard<0>, f64>(name, world).into_dyn(), &exact, 1e-12);
        }
        close(name, &logits::<Replicated, half::bf16>(name, 2).into_dyn(), &want, 0.1);
    }
}

/// Decodes prompts of different lengths together, each in its own slot. Each prompt is read in
/// chunks.
fn greedy<T: Element>(group: &Group<Dev>, name: &str, chunk: usize) -> Result<Vec<Vec<u32>>> {
    let ((checkpoint, config), reference) = (decoder(name), reference(name, "logits"));
    let model = Decoder::<Replicated, T, Dev>::load(group, &checkpoint, &config)?;
    let slots: Vec<usize> = (0..reference.prompts.len()).rev().collect();
    let mut cache = model.cache(slots.len(), 16)?;
    let mut next = vec![0; slots.len()];
    let sampler = Sampler::greedy();
    for (sequence, prompt) in reference.prompts.iter().enumerate() {
        for ids in prompt.chunks(chunk) {
            let logits = model.step(ids, &[slots[sequence]], &[ids.len()], &mut cache)?;
            next[sequence] = sampler.sample(&logits, &[0])?[0];
        }
    }
    let mut texts: Vec<Vec<u32>> = next.iter().map(|&token| vec![token]).collect();
    for _ in 1..reference.greedy[0].len() {
        let logits = model.step(&next, &slots, &vec![1; slots.len()], &mut cache)?;
        next = sampler.sample(&logits, &vec![0; slots.len()])?;
        texts.iter_mut().zip(&next).for_each(|(text, &token)| text.push(token));
    }
    Ok(texts)
}

#[test]
fn decoders_write_the_tokens_of_transformers() {
    for name in DECODERS {
        let want = reference(name, "logits").greedy;
        for world in WORLDS {
            let chunk = [100, 3][world % 2];
            let texts = ranks(world).run(|group| greedy::<f32>(&group, name, chunk)).unwrap();
            assert!(texts.iter().all(|text| *text == want), "{name} on {world} ranks");
        }
    }
}

/// Logits computed token by token, in chunks, and all at once agree in f64 up to rounding.
/// Truncating and copying the cache leaves no trace of its earlier contents.
#[test]
fn the_cache_changes_nothing() {
    for name in DECODERS {
        let ((checkpoint, config), reference) = (decoder(name), reference(name, "logits"));
        let whole = logits::<Replicated, f64>(name, 1);
        let prompt = &reference.prompts[0];
        for world in [1, 4] {
            let parts = ranks(world).run(|group| {
                let model = Decoder::<Replicated, f64, Dev>::load(&group, &checkpoint, &config)?;
                let mut cache = model.cache(3, prompt.len())?;
                let mut all = Vec::new();
                let mut step = |cache: &mut _, slot: usize, ids: &[u32]| {
                    let logits = model.step(ids, &[slot], &[ids.len()], cache)?;
                    all.push((logits.local().shape().cols(), logits.local().to_vec()?));
                    Ok::<_, Error>(())
                };
                for token in prompt {
                    step(&mut cache, 1, &[*token])?;
                }
                // Slot 2 continues a prefix of slot 1, and slot 1 continues a prefix of itself.
                cache.copy_prefix(1, 2, 4)?;
                step(&mut cache, 2, &prompt[4..])?;
                cache.truncate(1, 2)?;
                step(&mut cache, 1, &prompt[2..5])?;
                step(&mut cache, 1, &prompt[5..])?;
                assert_eq!((cache.len(0), cache.len(1), cache.len(2)), (0, 7, 7));
                let full = model.step(&[5], &[1], &[1], &mut cache).unwrap_err();
                assert_eq!(full.to_string(), "kv cache: the end of slot 1 is 8, but the capacity is 7");
                assert_eq!(cache.len(1), 7);
                assert!(cache.truncate(0, 1).is_err() && cache.copy_prefix(0, 1, 1).is_err());
                assert!(cache.truncate(3, 0).is_err() && cache.step(&[0, 0], &[1, 1]).is_err());
                Ok(all)
            });
            let parts = parts.unwrap();
            let rows = [0, 1, 2, 3, 4, 5, 6, 6, 4, 6];
            for (step, row) in rows.into_iter().enumerate() {
                let got = together(parts.iter().map(|rank| rank[step].clone()).collect());
                let want = whole.row(row).to_owned().insert_axis(ndarray::Axis(0));
                close(&format!("{name} on {world}, step {step}"), &got.into_dyn(), &want, 1e-12);
            }
        }
    }
}

#[test]
fn bert_has_the_hidden_states_of_transformers() {
    let ((checkpoint, config), reference) = (bert(), reference("bert", "hidden"));
    let (ids, sequences, want) = reference.packed();
    for world in WORLDS {
        let hidden = ranks(world).run(|group| {
            let model = Bert::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
            let (hidden, _) = model.forward(&ids, None, sequences.clone())?;
            let inferred = model.infer(&ids, None, sequences.clone())?;
            assert_eq!(bits(inferred.local())?, bits(hidden.local())?, "inference on {world}");
            hidden.local().to_array()
        });
        for hidden in hidden.unwrap() {
            close("bert", &hidden.mapv(f64::from), &want, 1e-5);
        }
    }
    // The same prompts as a padded batch.
    let width = 9;
    let lengths: Vec<usize> = reference.prompts.iter().map(Vec::len).collect();
    let padded: Vec<u32> = reference
        .prompts
        .iter()
        .flat_map(|prompt| prompt.iter().copied().chain(std::iter::repeat(0)).take(width))
        .collect();
    let hidden = ranks(2).run(|group| {
        let model = Bert::<Shard<0>, f32, Dev>::load(&group, &checkpoint, &config)?;
        let (types, sequences) = (vec![0; padded.len()], Sequences::padded(&lengths, width)?);
        let (hidden, _) = model.forward(&padded, Some(&types), sequences.clone())?;
        let inferred = model.infer(&padded, Some(&types), sequences)?;
        assert_eq!(bits(inferred.local())?, bits(hidden.local())?, "inference of a padded batch");
        hidden.all_gather()?.local().to_array()
    });
    let hidden = hidden.unwrap()[0].mapv(f64::from).into_dimensionality::<ndarray::Ix2>().unwrap();
    for (at, want) in reference.outputs.iter().enumerate() {
        let rows = hidden.slice(ndarray::s![at * width..at * width + lengths[at], ..]).to_owned();
        close("padded bert", &rows.into_dyn(), want, 1e-5);
    }
}

/// The direction in which the tests change a tensor: a function of the element's index in the whole
/// tensor.
fn direction(region: &Region) -> impl Iterator<Item = f64> {
    region.runs().into_iter().flatten().map(|at| ((at * 31 % 17) as f64 - 8.0) / 8.0)
}

/// Returns the loss, and Σ gradient · direction of every tensor over the elements that this rank
/// owns.
fn slopes<S: ResidualStream>(
    group: &Group<Dev>,
    name: &str,
    targets: &[u32],
) -> Result<(f64, Vec<(String, f64)>)> {
    let ((checkpoint, config), reference) = (decoder(name), reference(name, "logits"));
    let (ids, sequences, _) = reference.packed();
    let model = Decoder::<S, f64, Dev>::load(group, &checkpoint, &config)?;
    let (logits, saved) = model.forward(&ids, sequences)?;
    let entropy = VocabParallelCrossEntropy::default();
    let (losses, kept) = entropy.forward(logits, targets)?;
    model.backward(saved, entropy.backward(kept, 1.0)?)?;
    Ok((losses.sum()?, own_slopes(&model.params())?))
}

/// Returns Σ gradient · direction of every tensor of which this rank owns elements.
fn own_slopes(params: &[Param<f64, Dev>]) -> Result<Vec<(String, f64)>> {
    let mut own = Vec::new();
    for param in params {
        let (width, grad) = (param.shape().split_at(0).1, param.grad().unwrap().to_vec()?);
        for rows in param.regions().iter().filter(|rows| rows.owned) {
            let grad = &grad[rows.row * width..][..rows.region.extent().len()];
            own.push((rows.tensor.clone(), direction(&rows.region).zip(grad).map(|(a, b)| a * b).sum()));
        }
    }
    Ok(own)
}

/// Adds up the ranks' slopes by tensor.
fn total(outcomes: impl IntoIterator<Item = Vec<(String, f64)>>) -> BTreeMap<String, f64> {
    let mut total = BTreeMap::<String, f64>::new();
    for (tensor, slope) in outcomes.into_iter().flatten() {
        *total.entry(tensor).or_default() += slope;
    }
    total
}

/// Measures the slope of a loss at 0.
fn measured(mut loss: impl FnMut(f64) -> f64) -> f64 {
    const STEP: f64 = 1e-4;
    (8.0 * (loss(STEP) - loss(-STEP)) - (loss(2.0 * STEP) - loss(-2.0 * STEP))) / (12.0 * STEP)
}

/// Adds `step` times the direction to one tensor of a model.
fn shift(params: &[Param<f64, Dev>], tensor: &str, step: f64) -> Result<()> {
    for param in params {
        let (shape, mut values) = (param.shape(), param.value()?.to_vec()?);
        let width = shape.split_at(0).1;
        for own in param.regions().iter().filter(|own| own.tensor == tensor) {
            let values = &mut values[own.row * width..][..own.region.extent().len()];
            for (value, along) in values.iter_mut().zip(direction(&own.region)) {
                *value += step * along;
            }
        }
        param.set(Tensor::from_slice(param.device(), shape, &values)?)?;
    }
    Ok(())
}

/// The loss of the model on one device is differentiated numerically along each tensor's direction.
/// The sharded gradients have the same slopes, with either residual stream.
#[test]
fn gradients_of_models_are_those_of_their_losses() {
    for (name, world) in [("llama", 5), ("qwen3", 4), ("gpt2", 3), ("qwen2", 2)] {
        let (ids, sequences, _) = reference(name, "logits").packed();
        let targets: Vec<u32> = ids.iter().map(|id| (id * 7 + 1) % 591).collect();
        let all = |outcomes: Vec<(f64, Vec<(String, f64)>)>| total(outcomes.into_iter().map(|(_, own)| own));
        let replicated = all(ranks(world).run(|group| slopes::<Replicated>(&group, name, &targets)).unwrap());
        let parallel = all(ranks(world).run(|group| slopes::<Shard<0>>(&group, name, &targets)).unwrap());
        let (checkpoint, config) = decoder(name);
        let solo = Group::solo(&dev::fresh());
        let model = Decoder::<Replicated, f64, Dev>::load(&solo, &checkpoint, &config).unwrap();
        assert_eq!(replicated.len(), checkpoint.names().len(), "every tensor has a gradient");
        for (tensor, slope) in &replicated {
            let numeric = measured(|step| {
                shift(&model.params(), tensor, step).unwrap();
                let (logits, _) = model.forward(&ids, sequences.clone()).unwrap();
                let (losses, _) = VocabParallelCrossEntropy::default().forward(logits, &targets).unwrap();
                shift(&model.params(), tensor, -step).unwrap();
                losses.sum().unwrap()
            });
            for slope in [slope, &parallel[tensor]] {
                let error = (numeric - slope).abs() / slope.abs().max(1.0);
                assert!(error < 1e-6, "{name} on {world}, {tensor}: {slope} where {numeric} is measured");
            }
        }
    }
}

/// Compares BERT's gradients of Σ hidden · dy with numerical slopes, like the test above, and
/// checks the files that BERT saves.
#[test]
fn bert_trains_and_is_saved() {
    let (checkpoint, config) = bert();
    let (ids, sequences, _) = reference("bert", "hidden").packed();
    let types: Vec<u32> = (0..ids.len() as u32).map(|at| at % 2).collect();
    let dy = crate::support::matrix(1, "dy", ids.len(), config.block.attention.hidden);
    fn slopes<S: ResidualStream>(
        group: &Group<Dev>,
        (checkpoint, config): (&Checkpoint, &BertConfig),
        (ids, types, sequences): (&[u32], &[u32], &Sequences),
        dy: &Array2<f64>,
    ) -> Result<Vec<(String, f64)>> {
        let model = Bert::<S, f64, Dev>::load(group, checkpoint, config)?;
        let (_, saved) = model.forward(ids, Some(types), sequences.clone())?;
        let own = dy.slice(ndarray::s![S::local_rows(group, ids.len())?, ..]).to_owned();
        let dy = S::of_local(group, ids.len(), Tensor::from_array(group.device(), &own)?)?;
        model.backward(saved, dy)?;
        own_slopes(&model.params())
    }
    let (model, batch) = ((&checkpoint, &config), (ids.as_slice(), types.as_slice(), &sequences));
    let replicated = total(ranks(3).run(|group| slopes::<Replicated>(&group, model, batch, &dy)).unwrap());
    let parallel = total(ranks(4).run(|group| slopes::<Shard<0>>(&group, model, batch, &dy)).unwrap());
    let alone =
        Bert::<Replicated, f64, Dev>::load(&Group::solo(&dev::fresh()), &checkpoint, &config).unwrap();
    assert_eq!(replicated.keys().collect::<Vec<_>>(), parallel.keys().collect::<Vec<_>>());
    for (tensor, slope) in &replicated {
        let numeric = measured(|step| {
            shift(&alone.params(), tensor, step).unwrap();
            let (hidden, _) = alone.forward(&ids, Some(&types), sequences.clone()).unwrap();
            shift(&alone.params(), tensor, -step).unwrap();
            (hidden.local().to_array().unwrap() * &dy).sum()
        });
        for slope in [slope, &parallel[tensor]] {
            let error = (numeric - slope).abs() / slope.abs().max(1.0);
            assert!(error < 1e-6, "{tensor}: {slope} where {numeric} is measured");
        }
    }
    // Two ranks compute the same hidden states, bit for bit, from the files that three ranks have
    // saved.
    let saved = tempfile::tempdir().unwrap();
    ranks(3)
        .run(|group| Bert::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?.save(saved.path()))
        .unwrap();
    let again = Checkpoint::open(saved.path()).unwrap();
    assert_eq!(ModelConfig::read(saved.path()).unwrap(), ModelConfig::Bert(config.clone()));
    let hidden = |from: &Checkpoint| {
        let all = ranks(2).run(|group| {
            let model = Bert::<Replicated, f32, Dev>::load(&group, from, &config)?;
            model.forward(&ids, None, sequences.clone())?.0.local().to_vec()
        });
        all.unwrap()
    };
    assert_eq!(hidden(&again), hidden(&checkpoint));
}

/// Some ranks load and save a model. Then a different number of ranks loads and saves the result.
/// The last files have the tensors of the checkpoint, bit for bit.
#[test]
fn saved_models_are_what_was_read() {
    for name in DECODERS {
        let (checkpoint, config) = decoder(name);
        for (first, second) in [(3, 5), (8, 1)] {
            let folder = tempfile::tempdir().unwrap();
            let resave = |from: &Checkpoint, world, to: &str| {
                let to = folder.path().join(to);
                let saved = ranks(world)
                    .run(|group| Decoder::<Replicated, f32, Dev>::load(&group, from, &config)?.save(&to));
                saved.unwrap();
                let ModelConfig::Decoder(again) = ModelConfig::read(&to).unwrap() else { panic!("{name}") };
                assert_eq!(again, config);
                Checkpoint::open(&to).unwrap()
            };
            let again = resave(&resave(&checkpoint, first, "first"), second, "second");
            assert!(again.names().eq(checkpoint.names()), "{name}: {:?}", again.names().collect::<Vec<_>>());
            for tensor in checkpoint.names() {
                let read = |from: &Checkpoint| {
                    let shape = from.shape(tensor).unwrap();
                    let mut all = vec![0.0_f32; shape.iter().product()];
                    let whole = Region::whole(shape);
                    from.read(tensor, Role::Weight, &whole, AnyMut::F32(all.as_mut_slice())).unwrap();
                    (shape.to_vec(), all.into_iter().map(f32::to_bits).collect::<Vec<_>>())
                };
                assert_eq!(read(&again), read(&checkpoint), "{tensor} of {name}");
            }
        }
    }
}

/// A model larger than one file is saved as several files and an index.
#[test]
fn large_models_are_saved_in_several_files() {
    let (checkpoint, config) = decoder("qwen2");
    let folder = tempfile::tempdir().unwrap();
    let saved = ranks(3).run(|group| {
        let model = Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
        let save = Save::new(folder.path()).config(&config.json).max_shard(40_000);
        save.write(&group, &model.params())
    });
    saved.unwrap();
    let mut files: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let count = files.len() - 2;
    assert!(count > 2, "{files:?}");
    // The save's id is part of the names.
    let id = files[1].split('-').nth(1).unwrap().to_string();
    let parts = (1..=count).map(|at| format!("model-{id}-{at:05}-of-{count:05}.safetensors"));
    let others = ["model.safetensors.index.json".to_string()];
    assert_eq!(files, ["config.json".to_string()].into_iter().chain(parts).chain(others).collect::<Vec<_>>());
    let again = Checkpoint::open(folder.path()).unwrap();
    assert!(again.names().eq(checkpoint.names()));
    for tensor in checkpoint.names() {
        let shape = checkpoint.shape(tensor).unwrap().to_vec();
        let read = |from: &Checkpoint| {
            let mut all = vec![0.0_f32; shape.iter().product()];
            let whole = Region::whole(shape.as_slice());
            from.read(tensor, Role::Weight, &whole, AnyMut::F32(all.as_mut_slice())).unwrap();
            all
        };
        assert_eq!(read(&again), read(&checkpoint), "{tensor}");
    }
}

/// One rank reads each byte of the checkpoint's tensors exactly once.
#[test]
fn ranks_read_their_own_bytes() {
    let (checkpoint, config) = decoder("llama");
    Decoder::<Replicated, f32, Dev>::load(&Group::solo(&dev::fresh()), &checkpoint, &config).unwrap();
    let whole = checkpoint.bytes_read();
    let stored: usize =
        checkpoint.names().map(|name| checkpoint.shape(name).unwrap().iter().product::<usize>() * 4).sum();
    assert_eq!(whole, stored as u64);
}

/// Every kind of RoPE scaling has the frequencies that transformers computes in f32.
#[test]
fn rope_has_the_frequencies_of_transformers() {
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(folder("rope.json")).unwrap()).unwrap();
    assert!(cases.len() >= 18);
    for case in cases {
        let mut json = case["config"].clone();
        for (key, value) in [("num_hidden_layers", 1), ("intermediate_size", 4), ("vocab_size", 7)] {
            json[key] = value.into();
        }
        // The RoPE functions of transformers accept a fraction of a head's features, but the models
        // of these families in transformers do not.
        let share = json["rope_parameters"].as_object_mut().unwrap().remove("partial_rotary_factor");
        let ModelConfig::Decoder(config) = ModelConfig::parse(&json.to_string()).unwrap() else { panic!() };
        let mut rope = config.layers[0].rope.clone().unwrap();
        if let Some(share) = share {
            rope.dim = (rope.dim as f64 * share.as_f64().unwrap()) as usize;
        }
        let got = rope.frequencies(case["length"].as_u64().unwrap() as usize);
        let want: Vec<f64> = serde_json::from_value(case["frequencies"].clone()).unwrap();
        assert_eq!(got.len(), want.len(), "{json}");
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 2e-6 * want, "{json}: {got} where {want} is expected");
        }
        let magnitude = match rope.scaling {
            RopeScaling::Yarn { magnitude, .. } => magnitude,
            _ => 1.0,
        };
        assert!((magnitude - case["factor"].as_f64().unwrap()).abs() < 1e-12, "{json}");
    }
    // This configuration has the keys that were used before `rope_parameters` existed.
    let old = r#"{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 4, "vocab_size": 7, "max_position_embeddings": 64, "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 4.0}}"#;
    let ModelConfig::Decoder(config) = ModelConfig::parse(old).unwrap() else { panic!() };
    let want = RopeConfig {
        dim: 4,
        base: 500.0,
        pairs: RopePairs::Halves,
        scaling: RopeScaling::Linear { factor: 4.0 },
    };
    assert_eq!(config.layers[0].rope, Some(want));
}

/// After the first tokens, every token uses the same memory, however long the text becomes.
#[test]
fn decoding_takes_no_more_memory_from_token_to_token() {
    for name in DECODERS {
        let (checkpoint, config) = decoder(name);
        let uses = ranks(2).run(|group| {
            let model = Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
            let mut cache = model.cache(2, 30)?;
            let mut uses = Vec::new();
            for token in 0..30 {
                model.step(&[token, 5], &[0, 1], &[1, 1], &mut cache)?;
                uses.push(group.device().memory());
            }
            Ok(uses)
        });
        for uses in uses.unwrap() {
            assert!(uses[1..].iter().all(|now| *now == uses[1]), "{name}: {uses:?}");
        }
    }
}

/// The tiny Llama of llama2.c writes the same text as llama2.c on any number of ranks. The model's
/// licence is unknown, so the model is not part of the project. The test is skipped if the model's
/// files are absent.
#[test]
fn stories_are_those_of_llama2c() {
    let root = shardwise_tests::root();
    let data = root.join("../shared/data");
    let (target, script) = (tempfile::tempdir().unwrap(), root.join("scripts/convert_llama2c.py"));
    let converted = std::process::Command::new("python3")
        .arg(script)
        .args([data.join("stories260K.bin"), data.join("tok512.bin"), target.path().into()])
        .output();
    if !data.join("stories260K.bin").exists() || converted.is_err() {
        say("llama2.c's stories are NOT RUN: python3 or ../shared/data/stories260K.bin is not there");
        return;
    }
    assert!(converted.as_ref().unwrap().status.success(), "{converted:?}");
    let text = fs::read_to_string(data.join("stories260k_reference.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let want: Vec<u32> = serde_json::from_value(json["ids"].clone()).unwrap();
    let first: Vec<f64> = serde_json::from_value(json["logits_pos0_bos"].clone()).unwrap();
    let ModelConfig::Decoder(config) = ModelConfig::read(target.path()).unwrap() else { panic!("llama") };
    let checkpoint = Checkpoint::open(target.path()).unwrap();
    for &world in dev::WORLDS {
        let texts = ranks(world).run(|group| {
            let model = Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
            let (mut cache, sampler) = (model.cache(1, want.len())?, Sampler::greedy());
            let mut tokens = vec![want[0]];
            let mut logits = Vec::new();
            while tokens.len() < want.len() {
                let scores = model.step(&tokens[cache.len(0)..], &[0], &[1], &mut cache)?;
                if logits.is_empty() {
                    logits = scores.local().to_vec()?;
                }
                tokens.extend(sampler.sample(&scores, &[0])?);
            }
            Ok((tokens, logits))
        });
        let texts = texts.unwrap();
        assert!(texts.iter().all(|(tokens, _)| *tokens == want), "on {world} ranks");
        let logits = texts.iter().flat_map(|(_, logits)| logits);
        let error = worst(logits, &first);
        assert!(error < 2e-5, "on {world} ranks: {error:e}");
    }
}

#[test]
fn absurd_configurations_are_refused() {
    let base = r#"{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 4, "vocab_size": 7, "max_position_embeddings": 64}"#;
    let with = |key: &str, value: &str| {
        let mut json: Value = serde_json::from_str(base).unwrap();
        json[key] = serde_json::from_str(value).unwrap();
        ModelConfig::parse(&json.to_string())
    };
    assert!(ModelConfig::parse(base).is_ok());
    for (key, value, reason) in [
        (
            "hidden_size",
            "4611686018427387904",
            "`hidden_size` is 4611686018427387904; it may be from 1 to 268435456",
        ),
        ("hidden_size", "0", "`hidden_size` is 0; it may be from 1 to 268435456"),
        ("hidden_size", "-8", "`hidden_size` is not a whole number"),
        ("hidden_size", "null", "`hidden_size` is missing"),
        ("hidden_size", "9", "9 features are not a multiple of 2 heads"),
        (
            "num_hidden_layers",
            "1099511627776",
            "`num_hidden_layers` is 1099511627776; it may be from 1 to 65536",
        ),
        ("num_key_value_heads", "4", "2 query heads are not a multiple of 4 key/value heads"),
        ("rope_theta", "0", "`rope_theta` is 0"),
        ("rope_scaling", r#"{"type": "spiral"}"#, "rope of type `spiral` is not known"),
        ("rope_scaling", r#"{"type": "linear"}"#, "rope of type `linear` without a `factor`"),
        ("hidden_act", r#""mish""#, "the activation `mish` is not known"),
        (
            "model_type",
            r#""mamba""#,
            "a model of type `mamba` is not known; known are llama, mistral, ministral, qwen2, qwen3, gpt2, bert",
        ),
        ("eos_token_id", "-1", "`eos_token_id` is not a token"),
    ] {
        assert_eq!(with(key, value).unwrap_err(), reason, "{key} {value}");
    }
    assert!(ModelConfig::parse(&format!("{}{}", "[".repeat(5000), "]".repeat(5000))).is_err());
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), " ".repeat((1 << 20) + 1)).unwrap();
    assert!(matches!(ModelConfig::read(folder.path()), Err(Error::Config { .. })));
    assert!(matches!(ModelConfig::read(folder.path().join("none")), Err(Error::Io { .. })));

    // The sizes are valid but differ from the checkpoint's. Loading must not allocate memory for
    // them.
    let (checkpoint, config) = decoder("llama");
    let mut json: Value = serde_json::from_str(&config.json).unwrap();
    for key in ["hidden_size", "vocab_size", "intermediate_size"] {
        json[key] = (1_u64 << 28).into();
    }
    let ModelConfig::Decoder(huge) = ModelConfig::parse(&json.to_string()).unwrap() else { panic!() };
    let cpu = dev::fresh();
    let refused = Decoder::<Replicated, f32, Dev>::load(&Group::solo(&cpu), &checkpoint, &huge).unwrap_err();
    assert!(matches!(refused, Error::TensorShape { .. }), "{refused}");
    assert!(cpu.memory().peak < 1 << 20);
}

/// Runs the checks of the fuzz targets for every file of their corpus.
#[test]
fn the_corpus_of_attacks_does_no_harm() {
    let corpus = |target: &str| {
        let folder = shardwise_tests::root().join("fuzz/corpus").join(target);
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let (headers, configs) = (corpus("header"), corpus("config"));
    assert!(headers.len() >= 15 && configs.len() >= 20);
    for path in headers {
        let good = path.file_name().unwrap().to_string_lossy().starts_with("good");
        let Ok(checkpoint) = Checkpoint::open(&path) else {
            assert!(!good, "{}", path.display());
            continue;
        };
        for name in checkpoint.names() {
            let shape = checkpoint.shape(name).unwrap();
            let mut all = vec![0.0_f32; shape.iter().product()];
            let whole = Region::whole(shape);
            checkpoint.read(name, Role::Weight, &whole, AnyMut::F32(all.as_mut_slice())).unwrap();
        }
    }
    for path in configs {
        let Ok(config) = ModelConfig::parse(&fs::read_to_string(&path).unwrap()) else { continue };
        let (solo, nothing) = (Group::solo(&dev::fresh()), Arrays::<f64>::default());
        match config {
            ModelConfig::Decoder(config) => {
                Decoder::<Replicated, f32, Dev>::load(&solo, &nothing, &config).map(|_| ()).unwrap_err();
            }
            ModelConfig::Bert(config) => {
                Bert::<Replicated, f32, Dev>::load(&solo, &nothing, &config).map(|_| ()).unwrap_err();
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Texts in a batch padded on the left have the same logits and gradients as without padding.
/// Positions count tokens, and the padding's ids do not change the result.
#[test]
fn texts_padded_on_the_left_are_the_texts_alone() {
    fn run<S: ResidualStream>(
        world: usize,
        (checkpoint, config): (&Checkpoint, &DecoderConfig),
        ids: &[u32],
        targets: &[u32],
        sequences: &Sequences,
    ) -> (Array2<f64>, BTreeMap<String, f64>) {
        let outcomes = ranks(world).run(|group| {
            let model = Decoder::<S, f64, Dev>::load(&group, checkpoint, config)?;
            let (logits, saved) = model.forward(ids, sequences.clone())?;
            let entropy =
                VocabParallelCrossEntropy { ignored: Some(9999), ..VocabParallelCrossEntropy::default() };
            let (_, kept) = entropy.forward(logits.clone(), targets)?;
            model.backward(saved, entropy.backward(kept, 1.0)?)?;
            let logits = (logits.local().shape().cols(), logits.local().to_vec()?);
            Ok((logits, own_slopes(&model.params())?))
        });
        let (parts, slopes): (Vec<_>, Vec<_>) = outcomes.unwrap().into_iter().unzip();
        (together(parts), total(slopes))
    }
    let dynamic = |config: &mut DecoderConfig| {
        for layer in &mut config.layers {
            let rope = layer.rope.as_mut().unwrap();
            rope.scaling = RopeScaling::DynamicNtk { factor: 2.0, trained: 5 };
        }
        config.block.attention.rope = config.layers[0].rope.clone();
    };
    for (name, change) in DECODERS.map(|name| (name, false)).into_iter().chain([("llama", true)]) {
        let (checkpoint, mut config) = decoder(name);
        if change {
            dynamic(&mut config);
        }
        let prompts = reference(name, "logits").prompts;
        let ids = prompts.concat();
        let targets: Vec<u32> = ids.iter().map(|id| (id * 7 + 1) % 591).collect();
        let alone = Sequences::packed(prompts.iter().map(Vec::len));
        // The batch may be wider than the number of GPT-2's positions.
        let width = config.positions.unwrap_or(12) + 2;
        let (mut padded, mut padded_targets, mut valid, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for prompt in &prompts {
            let padding = width - prompt.len();
            padded.extend((0..padding as u32).chain(prompt.iter().copied()));
            padded_targets.extend(vec![9999; padding].iter().chain(&targets[at..at + prompt.len()]));
            valid.extend((0..width).map(|row| row >= padding));
            at += prompt.len();
        }
        let sequences = Sequences::packed(vec![width; prompts.len()]).masked(&valid).unwrap();
        let model = (&checkpoint, &config);
        let (want, slopes) = run::<Replicated>(1, model, &ids, &targets, &alone);
        for world in [1, 2] {
            for (got, got_slopes) in [
                run::<Replicated>(world, model, &padded, &padded_targets, &sequences),
                run::<Shard<0>>(world, model, &padded, &padded_targets, &sequences),
            ] {
                let rows: Vec<usize> = (0..valid.len()).filter(|&row| valid[row]).collect();
                let got = got.select(ndarray::Axis(0), &rows);
                close(&format!("{name} on {world}"), &got.into_dyn(), &want, 1e-12);
                assert_eq!(got_slopes.len(), slopes.len());
                for (tensor, slope) in &slopes {
                    let error = (got_slopes[tensor] - slope).abs() / slope.abs().max(1.0);
                    assert!(error < 1e-10, "{name} on {world}, {tensor}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn bert_padded_on_the_left_is_the_text_alone() {
    let ((checkpoint, config), reference) = (bert(), reference("bert", "hidden"));
    // The batch has more rows per text than the model has positions.
    let width = config.positions + 2;
    let (mut padded, mut valid) = (Vec::new(), Vec::new());
    for prompt in &reference.prompts {
        let padding = width - prompt.len();
        padded.extend(vec![0; padding].iter().chain(prompt));
        valid.extend((0..width).map(|row| row >= padding));
    }
    let sequences = Sequences::packed(vec![width; reference.prompts.len()]).masked(&valid).unwrap();
    for world in [1, 2] {
        let hidden = ranks(world).run(|group| {
            let model = Bert::<Shard<0>, f32, Dev>::load(&group, &checkpoint, &config)?;
            model.forward(&padded, None, sequences.clone())?.0.all_gather()?.local().to_array()
        });
        let hidden = hidden.unwrap()[0].mapv(f64::from).into_dimensionality::<ndarray::Ix2>().unwrap();
        for (at, want) in reference.outputs.iter().enumerate() {
            let rows = hidden.slice(ndarray::s![(at + 1) * width - want.nrows()..(at + 1) * width, ..]);
            close("bert padded on the left", &rows.to_owned().into_dyn(), want, 1e-5);
        }
    }
}

/// Returns this rank's rows of the gradient of a word table, with their indices.
fn table_rows(params: &[Param<f64, Dev>], name: &str) -> Result<Vec<(usize, Vec<f64>)>> {
    let mut rows = Vec::new();
    for param in params {
        for own in param.regions().iter().filter(|own| own.tensor == name) {
            let (grad, width) = (param.grad().unwrap().to_vec()?, param.shape().cols());
            let first = own.region.ranges()[0].start;
            rows.extend(grad.chunks(width).enumerate().map(|(row, grad)| (first + row, grad.to_vec())));
        }
    }
    Ok(rows)
}

/// `pad_token_id` acts like `padding_idx` of torch's `nn.Embedding`. The row of this id is looked
/// up like any other row, but gets no gradient from the lookup. If the head is tied, the row gets a
/// gradient from the head.
#[test]
fn the_word_embedding_of_padding_has_no_gradient() {
    let (checkpoint, config) = bert();
    let ids = [5, 0, 7, 0, 590, 5];
    let bert = |config: &BertConfig, world: usize, reduction: Reduction| {
        let rows = ranks(world).run(|group| {
            let group = group.with_reduction(reduction);
            let model = Bert::<Replicated, f64, Dev>::load(&group, &checkpoint, config)?;
            let (hidden, saved) = model.forward(&ids, None, Sequences::one(ids.len()))?;
            let dy = crate::support::matrix(1, "dy", ids.len(), config.block.attention.hidden);
            let dy = DTensor::replicated(&group, Tensor::from_array(group.device(), &dy)?)?;
            model.backward(saved, dy)?;
            let rows = table_rows(&model.params(), "embeddings.word_embeddings.weight")?;
            Ok((hidden.local().to_vec()?, rows))
        });
        let (hidden, rows): (Vec<_>, Vec<_>) = rows.unwrap().into_iter().unzip();
        (hidden.into_iter().next().unwrap(), rows.concat())
    };
    let text = fs::read_to_string(folder("bert").join("config.json")).unwrap();
    let with = |padding: &str| {
        let text = text.replace("\"pad_token_id\": 0", padding);
        assert!(padding == "\"pad_token_id\": 0" || text.contains(padding));
        ModelConfig::parse(&text)
    };
    let of = |padding: &str| match with(padding) {
        Ok(ModelConfig::Bert(config)) => config,
        other => panic!("{other:?}"),
    };
    let none = bert(&of("\"pad_token_id\": null"), 1, Reduction::Fast);
    assert!(none.1[0].1.iter().any(|grad| *grad != 0.0), "without `padding_idx` the row has a gradient");
    let absent = of("\"unk_token_id\": 0");
    let last = of("\"pad_token_id\": -1");
    for (config, row) in [(&config, 0), (&absent, 0), (&last, 590), (&of("\"pad_token_id\": 5"), 5)] {
        for world in [1, 2, 3, 8] {
            for reduction in [Reduction::Fast, Reduction::Invariant { blocks: 8 }] {
                let (hidden, rows) = bert(config, world, reduction);
                if world == 1 && reduction == Reduction::Fast {
                    assert_eq!(hidden, none.0, "the padding does not change the forward");
                }
                assert_eq!((rows.len(), none.1.len()), (591, 591));
                for ((at, got), (_, want)) in rows.iter().zip(&none.1) {
                    let (got, mut want) = (Array1::from(got.clone()), Array1::from(want.clone()));
                    if *at == row {
                        want.fill(0.0);
                        assert!(got.iter().all(|grad| *grad == 0.0), "row {at} on {world}");
                    }
                    close(&format!("row {at} on {world}"), &got.into_dyn(), &want, 1e-11);
                }
            }
        }
    }
    let error = with("\"pad_token_id\": 591").unwrap_err();
    assert_eq!(error, "`pad_token_id` is 591, but the vocabulary has 591 words");
}

/// Decoders match transformers. The padding row of the embedding is `pad_token_id` for Llama,
/// Mistral and Qwen. GPT-2 has no padding row.
#[test]
fn decoders_have_the_padding_of_transformers() {
    let ids = [5, 3, 7, 3, 590, 5];
    for name in DECODERS {
        let (checkpoint, _) = decoder(name);
        let text = fs::read_to_string(folder(name).join("config.json")).unwrap();
        let padded = text.replace("\"pad_token_id\": null", "\"pad_token_id\": 3");
        assert_ne!(text, padded);
        let table = |text: &str, world: usize, with_head: bool| {
            let Ok(ModelConfig::Decoder(config)) = ModelConfig::parse(text) else { panic!("{name}") };
            let tensor = match name {
                "gpt2" => "transformer.wte.weight",
                _ => "model.embed_tokens.weight",
            };
            let rows = ranks(world).run(|group| {
                let model = Decoder::<Replicated, f64, Dev>::load(&group, &checkpoint, &config)?;
                let (logits, saved) = model.forward(&ids, Sequences::one(ids.len()))?;
                let entropy = VocabParallelCrossEntropy::default();
                let (_, kept) = entropy.forward(logits, &[1, 2, 4, 6, 8, 9])?;
                model.backward(saved, entropy.backward(kept, 1.0)?)?;
                table_rows(&model.params(), tensor)
            });
            assert_eq!(config.tied, with_head);
            rows.unwrap().concat()
        };
        let tied = ["qwen2", "qwen3", "gpt2"].contains(&name);
        let (none, two) = (table(&text, 1, tied), table(&padded, 2, tied));
        let one = table(&padded, 1, tied);
        assert_eq!((one.len(), two.len()), (none.len(), none.len()));
        for (((at, none), (_, one)), (_, two)) in none.iter().zip(&one).zip(&two) {
            let [none, one, two] = [none, one, two].map(|row| Array1::from(row.clone()).into_dyn());
            close(name, &two, &one, 1e-11);
            match (*at == 3 && name != "gpt2", tied) {
                (false, _) => close(&format!("{name}, row {at}"), &one, &none, 1e-11),
                (true, false) => assert!(one.iter().all(|grad| *grad == 0.0), "{name}"),
                // This row has only the head's gradient.
                (true, true) => assert!(one != none && one.iter().all(|grad| *grad != 0.0), "{name}"),
            }
        }
    }
}

#[test]
fn a_cache_that_memory_cannot_hold_is_an_error() {
    let (checkpoint, config) = decoder("llama");
    let results = ranks(2).run(|group| {
        let model = Decoder::<Replicated, f32, Dev>::load(&group, &checkpoint, &config)?;
        for (slots, capacity) in [
            (1, 1 << 50),
            (1, usize::MAX),
            (usize::MAX, 1),
            (usize::MAX, usize::MAX),
            (1 << 12, 1 << 52),
            (1 << 60, 0),
        ] {
            // The first step allocates the keys and values.
            let cache = model.cache(slots, capacity);
            let stepped = cache.and_then(|mut cache| model.step(&[1], &[0], &[1], &mut cache));
            let error = stepped.map(drop).unwrap_err().to_string().to_lowercase();
            assert!(error.contains("memory") || error.contains("elements"), "{error}");
        }
        // The rank and its model still work.
        let mut cache = model.cache(1, 4)?;
        model.step(&[1, 2], &[0], &[2], &mut cache).map(drop)
    });
    results.unwrap();
}
