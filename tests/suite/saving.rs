//! Saves models. A folder has the old or the new checkpoint, never a mix.

use crate::{
    dev::{Dev, Tensor, ranks},
    launch::processes,
};
use half::{bf16, f16};
use shardwise::{
    Error, Result,
    comm::{DeviceMesh, Group, Op, Transfer},
    device::{AnyMut, AnyRef, Cpu, DType, Element},
    models::{Decoder, DecoderConfig, ModelConfig},
    parallel::{Bias, ColumnLinear, Columns, Layer, RowLinear},
    security::Role::Checkpointer,
    shard::{Axis, Mesh, Partition, Replicated},
    tensor::{Param, Random, Region, Role, Store, WeightSource, Weights},
    weights::{self, Checkpoint},
};
use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

type Model<T> = Decoder<Replicated, T, Dev>;

fn data() -> (Checkpoint, DecoderConfig) {
    let carried = std::env::var_os("SHARDWISE_TEST_DATA").map(PathBuf::from);
    let data = carried.unwrap_or_else(|| shardwise_tests::root().join("tests/data"));
    let ModelConfig::Decoder(config) = ModelConfig::read(data.join("qwen2")).unwrap() else { panic!() };
    (Checkpoint::open(data.join("qwen2")).unwrap(), config)
}

/// Loads a model and sets all its weights to `version`.
fn model<T: Element>(group: &Group<Dev>, version: f64) -> Result<Model<T>> {
    let (checkpoint, config) = data();
    let model = Model::<T>::load(group, &checkpoint, &config)?;
    for param in model.params() {
        param.set(Tensor::full(group.device(), param.shape(), version)?)?;
    }
    Ok(model)
}

/// Returns a configuration that states its version.
fn config(version: f64) -> String {
    data().1.json.replacen('{', &format!("{{\"_commit_hash\": {version},"), 1)
}

/// Saves a version, in files of at most `max_shard` bytes.
fn put(group: &Group<Dev>, version: f64, folder: &Path, max_shard: usize) -> Result<()> {
    put_model(group, &model::<f32>(group, version)?, version, folder, max_shard)
}

fn save(world: usize, version: f64, folder: &Path, max_shard: usize) -> Result<()> {
    ranks(world).run(|group| put(&group, version, folder, max_shard)).map(|_| ())
}

/// Returns the version of all weights in a folder.
fn weights_of(folder: &Path) -> f64 {
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert!(checkpoint.names().eq(data().0.names()));
    let mut version = None;
    for name in checkpoint.names() {
        let shape = checkpoint.shape(name).unwrap();
        let mut all = vec![f64::NAN; shape.iter().product()];
        checkpoint.read(name, Role::Weight, &Region::whole(shape), AnyMut::F64(all.as_mut_slice())).unwrap();
        for value in all {
            assert_eq!(value, *version.get_or_insert(value), "`{name}` is of another version");
        }
    }
    version.unwrap()
}

fn config_of(folder: &Path) -> f64 {
    let ModelConfig::Decoder(config) = ModelConfig::read(folder).unwrap() else { panic!() };
    let json: serde_json::Value = serde_json::from_str(&config.json).unwrap();
    json["_commit_hash"].as_f64().unwrap()
}

fn files(folder: &Path) -> Vec<String> {
    let name = |file: std::io::Result<fs::DirEntry>| file.unwrap().file_name().into_string().unwrap();
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(name).collect();
    files.sort();
    files
}

/// Returns the data files that the index names.
fn named(folder: &Path) -> Vec<String> {
    let text = fs::read_to_string(folder.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    let files = index["weight_map"].as_object().unwrap().values();
    let mut files: Vec<_> = files.map(|file| file.as_str().unwrap().to_string()).collect();
    files.sort();
    files.dedup();
    files
}

/// A checkpoint of one file may replace a checkpoint of several files, and the reverse. Nothing of
/// the older checkpoint remains, and the user's files stay.
#[test]
fn a_save_replaces_an_older_one_of_another_number_of_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    fs::write(folder.join("model-notes.safetensors"), "mine").unwrap();
    fs::write(folder.join("model-00001-of-00009.safetensors"), "of an older checkpoint").unwrap();
    let one = usize::MAX;
    for (version, max) in [one, 40_000, 20_000, 60_000, one, 40_000].into_iter().enumerate() {
        save(2, version as f64, folder, max).unwrap();
        assert_eq!((weights_of(folder), config_of(folder)), (version as f64, version as f64));
        let mut live = if folder.join("model.safetensors").exists() {
            vec!["model.safetensors".to_string()]
        } else {
            [named(folder), vec!["model.safetensors.index.json".into()]].concat()
        };
        live.extend(["config.json", "model-notes.safetensors", "notes.txt"].map(String::from));
        live.sort();
        assert_eq!(files(folder), live, "after save {version}");
    }
}

#[test]
fn a_folder_with_both_forms_of_a_checkpoint_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let tensors = |value: &'static [f32]| [("w", [1], AnyRef::<Cpu>::F32(value))];
    weights::write(folder.join("model.safetensors"), tensors(&[1.0])).unwrap();
    weights::write(folder.join("model-00001-of-00001.safetensors"), tensors(&[2.0])).unwrap();
    let index = r#"{"metadata":{},"weight_map":{"w":"model-00001-of-00001.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    let Err(error) = Checkpoint::open(folder) else { panic!("it cannot know which is newer") };
    let error = error.to_string();
    assert!(error.contains("both model.safetensors and model.safetensors.index.json"), "{error}");
}

#[cfg(unix)]
#[test]
fn files_have_the_modes_that_the_umask_leaves() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("usual"), "").unwrap();
    weights::write(folder.join("written.safetensors"), [("w", [1], AnyRef::<Cpu>::F32(&[1.0]))]).unwrap();
    save(1, 1.0, &folder.join("one"), usize::MAX).unwrap();
    save(1, 1.0, &folder.join("several"), 40_000).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let usual = mode(&folder.join("usual"));
    let mut seen = 0;
    for folder in [folder, &folder.join("one"), &folder.join("several")] {
        for file in files(folder).iter().map(|file| folder.join(file)).filter(|file| file.is_file()) {
            assert_eq!(mode(&file), usual, "{}", file.display());
            seen += 1;
        }
    }
    assert!(seen > 8);
}

#[test]
fn a_saved_configuration_has_the_element_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let dtype = |keys: &[&str]| {
        let text = fs::read_to_string(folder.join("config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        keys.iter().map(|key| json[*key].clone()).collect::<Vec<_>>()
    };
    ranks(2).run(|group| model::<bf16>(&group, 1.0)?.save(folder)).unwrap();
    assert_eq!(Checkpoint::open(folder).unwrap().dtype("model.norm.weight").unwrap(), DType::BF16);
    assert_eq!(dtype(&["dtype"]), ["bfloat16"]);
    ranks(1).run(|group| model::<f64>(&group, 1.0)?.save(folder)).unwrap();
    assert_eq!(dtype(&["dtype"]), ["float64"]);
    // The configuration has only the older key `torch_dtype`.
    ranks(1)
        .run(|group| {
            let (checkpoint, mut config) = data();
            config.json = config.json.replace("\"dtype\"", "\"torch_dtype\"");
            Model::<bf16>::load(&group, &checkpoint, &config)?.save(folder)
        })
        .unwrap();
    assert_eq!(dtype(&["torch_dtype", "dtype"]), [serde_json::json!("bfloat16"), serde_json::Value::Null]);
}

#[cfg(unix)]
#[test]
fn a_linked_file_is_replaced_and_its_target_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, folder) = (folder.path().join("cache"), folder.path().join("snapshot"));
    fs::create_dir_all(&cache).unwrap();
    fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::write(cache.join(file), "of the cache").unwrap();
        std::os::unix::fs::symlink(cache.join(file), folder.join(file)).unwrap();
    }
    save(1, 2.0, &folder, usize::MAX).unwrap();
    assert_eq!((weights_of(&folder), config_of(&folder)), (2.0, 2.0));
    for file in ["config.json", "model.safetensors"] {
        assert_eq!(fs::read_to_string(cache.join(file)).unwrap(), "of the cache", "{file}");
    }
}

/// One of two concurrent saves remains, whole. A save that begins while another is writing returns
/// an error.
#[test]
fn concurrent_saves_leave_one_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut refused = 0;
    for round in 0..20 {
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let savers = [1.0, 2.0]
                .map(|number| scope.spawn(move || save(1, f64::from(round) * 2.0 + number, folder, 20_000)));
            savers.into_iter().map(|saver| saver.join().unwrap()).collect()
        });
        let version = weights_of(folder);
        assert_eq!(version, config_of(folder));
        let saved = |at: usize| f64::from(round) * 2.0 + at as f64 + 1.0;
        assert!((0..2).any(|at| outcomes[at].is_ok() && version == saved(at)), "{version}: {outcomes:?}");
        for error in outcomes.into_iter().filter_map(Result::err) {
            assert!(error.to_string().contains("another save is writing to this folder"), "{error}");
            refused += 1;
        }
    }
    println!("{refused} of 40 saves came while another was at work");
}

#[test]
fn a_reader_during_saves_finds_one_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    save(1, 0.0, folder, usize::MAX).unwrap();
    let done = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut versions = vec![0.0];
            while !done.load(Ordering::Relaxed) {
                versions.push(weights_of(folder));
            }
            versions
        });
        for version in 1..16 {
            save(1, f64::from(version), folder, [40_000, usize::MAX][version as usize % 2]).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(reads.is_sorted(), "{reads:?}");
    assert!(reads.last() > Some(&3.0), "{reads:?}");
}

/// If two replicas own every element, or no rank owns any, each rank gets an error.
#[test]
fn a_group_that_does_not_own_each_element_once_is_refused_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let twice = "[0..591, 0..32] of `model.embed_tokens.weight` is owned by rank 1 and by another rank";
    for (owners, says) in [(2, twice), (0, "the ranks of the group own is 0, ")] {
        let outcomes = ranks(2)
            .run_each(|group| {
                let params = model::<f32>(&Group::solo(group.device()), 1.0)?.params();
                if owners == 0 {
                    params.iter().for_each(Param::disown);
                }
                weights::save(&group, &params, folder.path())
            })
            .unwrap();
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("save: ") && text.contains(says), "{text}");
        }
    }
    assert_eq!(files(folder.path()), [""; 0]);
}

/// Two replicas of one half have as many elements as the whole, but do not own each element once.
#[test]
fn replicas_of_a_part_are_not_taken_for_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    // Also the ranks of the second group may see weights.
    let outcomes = ranks(4).roles([Checkpointer; 4]).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
        let (tensor, source) = (mesh.group(Axis::Tensor), Random::normal(1, 0.1));
        let columns = Columns::even(tensor, 4)?;
        let layer = ColumnLinear::<f32, Dev>::load(tensor, &Weights::new(&source), 3, &columns, Bias::Add)?;
        weights::save(mesh.group(Axis::Data), &layer.params(), folder.path())
    });
    for outcome in outcomes.unwrap() {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("of `weight` is owned by rank 1 and by another rank"), "{error}");
    }
}

/// Repeatedly kills a process that saves in a loop. Run by hand:
/// `cargo test --test suite -- --ignored killed`.
#[test]
#[ignore = "300 processes: a minute"]
fn a_killed_process_leaves_the_old_or_the_new() {
    const VARIABLE: &str = "SHARDWISE_TEST_SAVES";
    if let Some(folder) = std::env::var_os(VARIABLE) {
        let folder = PathBuf::from(folder);
        let several = folder.ends_with("several");
        let outcome = ranks(1).run(|group| {
            let models = [model::<f32>(&group, 1.0)?, model::<f32>(&group, 2.0)?];
            for at in 0.. {
                let max = [40_000, usize::MAX, 20_000][if several { at % 3 } else { 1 }];
                let version = (at % 2 + 1) as f64;
                put_model(&group, &models[at % 2], version, &folder, max)?;
            }
            Ok(())
        });
        panic!("{outcome:?}");
    }
    let name = std::thread::current().name().unwrap().to_string();
    for form in ["one", "several"] {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(form);
        save(1, 1.0, &folder, usize::MAX).unwrap();
        let (mut mixes, mut bad, mut versions) = (0, 0, [0, 0]);
        for round in 0..150_u64 {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &name, "--ignored", "--quiet"])
                .env(VARIABLE, &folder)
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_micros(150_000 + round * 7919 % 50_000));
            child.kill().unwrap();
            child.wait().unwrap();
            match std::panic::catch_unwind(|| (weights_of(&folder), config_of(&folder))) {
                Ok((weights, config)) if weights == config => versions[weights as usize - 1] += 1,
                Ok(_) => mixes += 1,
                Err(_) => bad += 1,
            }
            if bad > 0 {
                let left = files(&folder);
                println!("{form}: round {round}: {left:?}");
            }
        }
        println!(
            "{form}: {mixes} mixes of weights and configuration, {bad} refused or mixed, versions {versions:?}"
        );
        assert_eq!((mixes, bad), (0, 0), "{form}");
        save(1, 3.0, &folder, usize::MAX).unwrap();
        let live = files(&folder).len();
        assert!(live <= 3, "{:?}", files(&folder));
    }
}

fn put_model(group: &Group<Dev>, model: &Model<f32>, version: f64, folder: &Path, max: usize) -> Result<()> {
    let save = weights::Save::new(folder).config(config(version)).max_shard(max);
    save.write(group, &model.params())
}

/// Returns the messages by which a rank sends the elements that it owns: one for each tensor, in
/// the order of the parameters.
fn messages_of(params: &[Param<f32, Dev>]) -> Vec<Transfer> {
    let mut tensors: Vec<(String, usize)> = Vec::new();
    for of in params.iter().flat_map(|param| param.regions().to_vec()).filter(|of| of.owned) {
        let place = tensors.iter().position(|(name, _)| *name == of.tensor).unwrap_or_else(|| {
            tensors.push((of.tensor.clone(), 0));
            tensors.len() - 1
        });
        tensors[place].1 += of.region.extent().len();
    }
    let sent = tensors.into_iter().filter(|(_, elements)| *elements > 0);
    sent.map(|(_, elements)| Transfer { op: Op::Exchange, dtype: DType::F32, elements }).collect()
}

/// Rank 0 receives each element that another rank owns, once, and no other rank receives any. The
/// file has every element, so the messages went to rank 0.
#[test]
fn only_the_rank_that_writes_receives_elements() {
    let mut files = Vec::new();
    for world in 1..=5 {
        let folder = tempfile::tempdir().unwrap();
        let sent = ranks(world).run(|group| {
            let (checkpoint, config) = data();
            let model = Model::<f32>::load(&group, &checkpoint, &config)?;
            let (group, log) = group.recorded();
            model.params().iter().for_each(|param| assert!(!param.regions().is_empty()));
            weights::save(&group, &model.params(), folder.path())?;
            let (messages, others): (Vec<_>, Vec<_>) =
                log.take().into_iter().partition(|of| of.op == Op::Exchange);
            let expected = if group.rank() == 0 { Vec::new() } else { messages_of(&model.params()) };
            assert_eq!(messages, expected, "rank {} of {world}", group.rank());
            // The other collectives are two broadcasts of each rank's list of regions, and one
            // number each time that rank 0 has worked or waits for the disk.
            let (lists, states): (Vec<_>, Vec<_>) = others.iter().partition(|of| of.op == Op::Broadcast);
            assert_eq!(lists.len(), 2 * world);
            let is_state = |of: &Transfer| (of.op, of.dtype, of.elements) == (Op::AllReduce, DType::F64, 1);
            assert!(states.len() >= 4 && states.iter().all(is_state), "{states:?}");
            Ok(messages.iter().map(|of| of.elements).sum::<usize>())
        });
        let sent = sent.unwrap();
        assert!(sent[0] == 0 && sent[1..].iter().all(|elements| *elements > 0), "{sent:?}");
        files.push(fs::read(folder.path().join("model.safetensors")).unwrap());
    }
    assert!(files.iter().all(|file| *file == files[0]), "the files of 1 to 5 ranks differ");
}

#[test]
fn every_communicator_saves_the_same_file() {
    let read = |save: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path());
        fs::read(folder.path().join("model.safetensors")).unwrap()
    };
    let write = |group: Group<Dev>, folder: &Path| {
        let (checkpoint, config) = data();
        weights::save(&group, &Model::<f32>::load(&group, &checkpoint, &config)?.params(), folder)
    };
    let one = read(&|folder| write(Group::solo(&Dev::poisoned()), folder).unwrap());
    for world in 2..=4 {
        let staged = |group: Group<Dev>| group.staged(&Dev::poisoned());
        let of_staged = read(&|folder| {
            ranks(world).run(|group| write(staged(group), folder)).unwrap();
        });
        let of_processes = read(&|folder| {
            processes(world, |group| write(group, folder)).into_iter().for_each(Result::unwrap);
        });
        assert!(of_staged == one && of_processes == one, "{world} ranks");
    }
}

/// Sets each element of a model to the bits that its index in its tensor has, and compares the
/// bytes of the files.
fn all_bits_are_saved<T: Element>(bits: &[u64], from_bits: fn(u64) -> T) {
    let of = |index: usize| bits[index % bits.len()];
    for world in 1..=4 {
        let folder = tempfile::tempdir().unwrap();
        let saved = ranks(world).run(|group| {
            let source = Random::normal(1, 1.0);
            let (columns, inputs) = (Columns::even(&group, 13)?, Partition::even(11, group.size()));
            let (first, second) = (Weights::new(&source).at("first"), Weights::new(&source).at("second"));
            let first = ColumnLinear::<T, Dev>::load(&group, &first, 7, &columns, Bias::Add)?;
            let second = RowLinear::<T, Dev>::load(&group, &second, &inputs, 9)?;
            let params = [first.params(), second.params()].concat();
            for param in &params {
                let regions = param.regions();
                let indices = regions.iter().flat_map(|of| of.region.runs()).flatten();
                let values: Vec<T> = indices.map(|index| from_bits(of(index))).collect();
                param.set(Tensor::from_slice(group.device(), param.shape(), &values)?)?;
            }
            weights::save(&group, &params, folder.path())
        });
        saved.unwrap();
        let file = fs::read(folder.path().join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(tensors.len(), 3);
        for (name, tensor) in tensors.tensors() {
            let elements: usize = tensor.shape().iter().product();
            assert!(elements >= bits.len(), "`{name}` has not all of the bits");
            let expected: Vec<u8> =
                (0..elements).flat_map(|index| of(index).to_le_bytes()[..size_of::<T>()].to_vec()).collect();
            assert_eq!(tensor.data(), expected, "{} `{name}` of {world} ranks", T::DTYPE);
        }
    }
}

/// −0, both infinities, the smallest subnormal numbers, quiet and signaling NaNs with payloads.
#[test]
fn elements_keep_all_bits() {
    let f32s = [0x8000_0000, 0x7f80_0000, 0xff80_0000, 1, 0x8000_0001, 0x7fc1_2345, 0x7f81_2345, 0xffff_ffff];
    all_bits_are_saved::<f32>(&f32s, |bits| f32::from_bits(bits as u32));
    let bf16s = [0x8000, 0x7f80, 0xff80, 1, 0x8001, 0x7fc5, 0x7f85, 0xffff];
    all_bits_are_saved::<bf16>(&bf16s, |bits| bf16::from_bits(bits as u16));
    let f16s = [0x8000, 0x7c00, 0xfc00, 1, 0x8001, 0x7e45, 0x7c45, 0xffff];
    all_bits_are_saved::<f16>(&f16s, |bits| f16::from_bits(bits as u16));
    let f64s =
        [1 << 63, 0x7ff << 52, 0xfff << 52, 1, (1 << 63) + 1, 0x7ff8_0000_1234_5678, 0x7ff0_0000_1234_5678];
    all_bits_are_saved::<f64>(&f64s, f64::from_bits);
}

/// What happens to a rank when a save reads a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Nothing,
    Fails,
    Panics,
    IsLate,
}

/// A parameter whose rank can be lost.
struct Lossy {
    value: Tensor,
    loss: Rc<Cell<Loss>>,
}

impl Store<f32, Dev> for Lossy {
    fn value(&self) -> Result<Tensor> {
        match self.loss.get() {
            Loss::Nothing => {}
            Loss::Fails => return Err(Error::invalid("store", "injected")),
            Loss::Panics => std::panic::resume_unwind(Box::new("injected")),
            Loss::IsLate => std::thread::sleep(Duration::from_millis(1500)),
        }
        Ok(self.value.clone())
    }

    fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        self.value.rows(ids)
    }
}

/// A rank is lost during the gathering, when it reads the last parameter of which it owns elements.
/// Every rank gets an error that names the cause, and the folder keeps its old checkpoint.
#[test]
fn a_rank_lost_while_the_others_send_is_an_error_on_every_rank() {
    for loss in [Loss::Fails, Loss::Panics, Loss::IsLate] {
        let (worlds, deadline) = if loss == Loss::IsLate { (3..=3, 500) } else { (2..=4, 60_000) };
        for (world, lost) in worlds.flat_map(|world| (0..world).map(move |lost| (world, lost))) {
            let at = format!("rank {lost} of {world}, {loss:?}");
            let folder = tempfile::tempdir().unwrap();
            save(1, 1.0, folder.path(), usize::MAX).unwrap();
            let before = files(folder.path());
            let outcomes = ranks(world).deadline(Duration::from_millis(deadline)).run_each(|group| {
                let model = model::<f32>(&group, 2.0)?;
                let happens = Rc::new(Cell::new(Loss::Nothing));
                let params = model.params();
                let owned = |param: &&Param<f32, Dev>| param.regions().iter().any(|of| of.owned);
                let last = params.iter().rev().find(owned).expect("every rank owns something");
                last.set_store(Lossy { value: last.value()?, loss: Rc::clone(&happens) })?;
                if group.rank() == lost {
                    happens.set(loss);
                }
                weights::save(&group, &params, folder.path())
            });
            for (rank, outcome) in outcomes.unwrap().into_iter().enumerate() {
                let error = outcome.expect_err(&at);
                let names_lost = match &error {
                    _ if rank == lost && loss == Loss::Fails => error.to_string().contains("injected"),
                    Error::RankPanicked { .. } => rank == lost && loss == Loss::Panics,
                    Error::PeerLost { rank, .. } => *rank == lost && loss != Loss::IsLate,
                    Error::Deadline { missing, .. } => missing.contains(&lost) && loss == Loss::IsLate,
                    _ => false,
                };
                assert!(names_lost, "{at}: rank {rank} got {error}");
            }
            assert_eq!(files(folder.path()), before, "{at}");
            assert_eq!(weights_of(folder.path()), 1.0, "{at}");
        }
    }
}
