//! Saves models. A folder has the old or the new checkpoint, never a mix.

use crate::dev::{Dev, Tensor, ranks};
use half::bf16;
use shardwise::{
    Result,
    comm::{DeviceMesh, Group},
    device::{AnyMut, AnyRef, Cpu, DType, Element},
    models::{Decoder, DecoderConfig, ModelConfig},
    parallel::{Bias, ColumnLinear, Columns, Layer},
    shard::{Axis, Mesh, Replicated},
    tensor::{Param, Random, Region, Role, WeightSource, Weights},
    weights::{self, Checkpoint},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
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
    let outcomes = ranks(4).run_each(|world| {
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
