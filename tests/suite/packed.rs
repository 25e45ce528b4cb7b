//! Checkpoints quantized by GPTQ, AWQ and compressed-tensors, and in FP8: what the producers' own
//! code makes of the same bytes, regions, models, damaged files, and configurations.
//! `scripts/make_packed_fixtures.py` makes the files.

use crate::{
    dev::{Dev, ranks},
    gguf::{Choices, bits, data, pick, read},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use shardwise::{
    Error, Result,
    comm::Group,
    device::{AnyMut, Cpu},
    kernels::{Activations, Format, GroupSize},
    models::{Decoder, DecoderConfig, ModelConfig},
    parallel::{Bias, ColumnLinear, Columns, Layer},
    shard::{Partition, Reduction, Replicated, Sequences},
    tensor::{Param, Region, Role, WeightSource, Weights},
    weights::{Checkpoint, Packed, Packing, Save},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tempfile::{TempDir, tempdir};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let own = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    tensors.iter().map(|(name, view)| (name.into(), own(view))).collect()
}

/// Writes a checkpoint.
fn written(tensors: &Tensors) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    (folder, path)
}

/// Reads the packing of a model with this `quantization_config`.
fn packing(quantization: &Value) -> std::result::Result<Packing, String> {
    let text = fs::read_to_string(data("packed/tiny_awq/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"] = quantization.clone();
    match ModelConfig::parse(&config.to_string())? {
        ModelConfig::Decoder(config) => Ok(config.packing.unwrap()),
        other => panic!("{other:?}"),
    }
}

/// A matrix of the fixtures in a file of its own.
struct Case {
    name: String,
    shape: [usize; 2],
    quantization: Value,
    tensors: Tensors,
    want: Vec<f32>,
}

impl Case {
    fn all() -> Vec<Self> {
        let described: BTreeMap<String, Value> =
            serde_json::from_slice(&fs::read(data("packed/matrices.json")).unwrap()).unwrap();
        let all = tensors(&data("packed/matrices.safetensors"));
        let mut expected = tensors(&data("packed/matrices_expected.safetensors"));
        let cases: Vec<_> = described
            .into_iter()
            .map(|(name, described)| {
                let [rows, columns] = [0, 1].map(|dim| described["shape"][dim].as_u64().unwrap() as usize);
                let prefix = format!("{name}.");
                let own = all.iter().filter(|(tensor, _)| tensor.starts_with(&prefix));
                let (dtype, shape, bytes) = expected.remove(&name).unwrap();
                assert_eq!((dtype, &shape[..]), (Dtype::F32, &[rows, columns][..]));
                Self {
                    shape: [rows, columns],
                    quantization: described["quantization_config"].clone(),
                    tensors: own.map(|(tensor, of)| (tensor.clone(), of.clone())).collect(),
                    want: bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
                    name,
                }
            })
            .collect();
        assert!(cases.len() >= 20 && expected.is_empty());
        cases
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|case| case.name == name).unwrap()
    }

    fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }

    fn open(&self) -> (TempDir, Result<Packed>) {
        let (folder, path) = written(&self.tensors);
        let packing = packing(&self.quantization).unwrap_or_else(|reason| panic!("{}: {reason}", self.name));
        let packed = Packed::new(Checkpoint::open(path).unwrap(), &packing);
        (folder, packed)
    }
}

#[test]
fn every_matrix_has_the_producers_bits() {
    let mut formats = Vec::new();
    for case in Case::all() {
        let (_folder, packed) = case.open();
        let (packed, name) = (packed.unwrap(), case.weight());
        assert_eq!(packed.names().unwrap(), std::slice::from_ref(&name), "{}", case.name);
        let whole = Region::whole(case.shape);
        assert_eq!(bits(&read(&packed, &name, &whole).unwrap()), bits(&case.want), "{}", case.name);
        formats.push(packed.format(&name).unwrap());
        // Panels, for cuts that begin and end inside groups and words.
        let (cpu, weights) = (Cpu::new(), Weights::new(&packed));
        let mut choices = Choices::new(11, &case.name);
        for at in 0..12 {
            let region = match at {
                0 => whole.clone(),
                _ => (0..2)
                    .fold(whole.clone(), |region, dim| region.narrow(dim, choices.range(case.shape[dim]))),
            };
            let want = bits(&pick(&case.want, &region));
            assert_eq!(bits(&read(&packed, &name, &region).unwrap()), want, "{}: {region:?}", case.name);
            let param =
                Param::<f32, _>::load_region(&cpu, &weights, &name, Role::Weight, region.clone(), true);
            let param = param.unwrap_or_else(|error| panic!("{}: {region:?}: {error}", case.name));
            assert!(param.is_quantized());
            let got = param.value().unwrap().to_vec().unwrap();
            assert_eq!(bits(&got), want, "{}: {region:?}", case.name);
        }
    }
    for format in [
        Format::Int4(GroupSize::G32),
        Format::Int4(GroupSize::G64),
        Format::Int4(GroupSize::G128),
        Format::Int8(GroupSize::G128),
        Format::Fp8(GroupSize::G32),
        Format::Fp8(GroupSize::G128),
    ] {
        assert!(formats.contains(&format), "no matrix is in {format}");
    }
}

/// The rows and columns of a shard are read, and the gaps of less than 4096 bytes.
#[test]
fn a_shard_reads_its_bytes() {
    // 1024 x 1024 weights of 4 bits, as GPTQ and as compressed-tensors store them.
    let (rows, columns, groups) = (1024, 1024, 8);
    let words = vec![0x35; rows * columns / 2];
    let scales = vec![0x3c; 2 * rows * groups];
    let of = |shape: [usize; 2], dtype: Dtype, bytes: &[u8]| (dtype, shape.to_vec(), bytes.to_vec());
    let gptq = [
        ("w.qweight", of([columns / 8, rows], Dtype::I32, &words)),
        ("w.scales", of([groups, rows], Dtype::F16, &scales)),
        ("w.qzeros", of([groups, rows / 8], Dtype::I32, &vec![0x77; rows * groups / 2])),
    ];
    let compressed = [
        ("w.weight_packed", of([rows, columns / 8], Dtype::I32, &words)),
        ("w.weight_scale", of([rows, groups], Dtype::F16, &scales)),
        (
            "w.weight_shape",
            (Dtype::I64, vec![2], [rows, columns].map(|size| (size as u64).to_le_bytes()).concat()),
        ),
    ];
    let group = json!({ "weights": { "num_bits": 4, "group_size": 128 }, "targets": ["Linear"] });
    let config = json!({ "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "a": group } });
    for (is_gptq, tensors, config) in [
        (true, gptq, json!({ "quant_method": "gptq", "bits": 4, "group_size": 128 })),
        (false, compressed, config),
    ] {
        let (_folder, path) = written(&tensors.map(|(name, of)| (name.to_string(), of)).into());
        let packed = Packed::new(Checkpoint::open(path).unwrap(), &packing(&config).unwrap()).unwrap();
        assert_eq!(packed.bytes_read(), if is_gptq { 0 } else { 16 });
        for dim in [0, 1] {
            let before = packed.bytes_read();
            let region = Region::whole([rows, columns]).narrow(dim, 256..512);
            let format = packed.format("w.weight").unwrap();
            let columns = region.ranges()[1].clone();
            let mut out = vec![0; region.ranges()[0].len() * format.blocks(columns).len() * format.bytes()];
            packed.read_blocks("w.weight", &region, &mut out).unwrap();
            let read = usize::try_from(packed.bytes_read() - before).unwrap();
            // A quarter is contiguous. In the other dimension, the gaps within a page are read too:
            // at most three times as much.
            let contiguous = (dim == 0) != is_gptq;
            let (share, most) = (words.len() / 4, if contiguous { 1 } else { 4 });
            let others = scales.len() + rows * groups / 2;
            assert!(read >= share && read <= most * share + others, "{is_gptq}, dimension {dim}: {read}");
        }
    }
}

fn tiny(name: &str) -> (PathBuf, DecoderConfig, Packed) {
    let folder = data("packed").join(name);
    let ModelConfig::Decoder(config) = ModelConfig::read(&folder).unwrap() else { panic!("{name}") };
    let packing = config.packing.clone().unwrap();
    let packed = Packed::new(Checkpoint::open(&folder).unwrap(), &packing).unwrap();
    (folder, config, packed)
}

const TINY: [&str; 4] = ["tiny_gptq", "tiny_awq", "tiny_ct", "tiny_fp8"];

/// FNV-1a.
fn hash(bytes: impl Iterator<Item = u8>) -> String {
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[test]
fn models_have_the_producers_weights() {
    for name in TINY {
        let (folder, _, packed) = tiny(name);
        let expected: BTreeMap<String, Value> =
            serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let names = packed.names().unwrap();
        assert_eq!(names.len(), expected.len(), "{name}: {names:?}");
        let mut quantized = 0;
        for (tensor, expected) in expected {
            let shape: Vec<usize> = serde_json::from_value(expected["shape"].clone()).unwrap();
            let got = read(&packed, &tensor, &Region::whole(&shape[..])).unwrap();
            let got = hash(got.into_iter().flat_map(f32::to_le_bytes));
            let want = expected.as_object().unwrap().values().find_map(Value::as_str).unwrap();
            assert_eq!(got, want, "{name}: {tensor}");
            quantized += usize::from(packed.format(&tensor).is_some());
        }
        assert!(quantized >= 6, "{name}: {quantized}");
    }
}

fn logits<T: shardwise::device::Element>(
    world: usize,
    reduction: Reduction,
    source: &(dyn WeightSource + Sync),
    config: &DecoderConfig,
) -> Vec<u64> {
    let parts = ranks(world)
        .run(|group: Group<Dev>| {
            let group = &group.with_reduction(reduction);
            let model = Decoder::<Replicated, T, Dev>::load(group, source, config)?;
            let logits = model.infer(&[1, 70, 3, 41, 5], Sequences::one(5))?;
            let bits = |value: &T| (value.to_f64() + 0.0).to_bits();
            let all: Vec<u64> = logits.local().to_vec()?.iter().map(bits).collect();
            Ok((logits.local().shape().cols(), all))
        })
        .unwrap();
    let row = |row: usize| parts.iter().flat_map(move |(cols, y)| y[row * cols..][..*cols].to_vec());
    let all: Vec<u64> = (0..5).flat_map(row).collect();
    assert!(all.len() == 5 * config.vocabulary && all.iter().all(|bits| f64::from_bits(*bits).is_finite()));
    all
}

/// Activations of 8 bits: the same bits at every number of ranks. Exact activations in f64: the
/// bits of the dequantized model.
#[test]
fn models_have_the_same_bits_on_all_ranks() {
    for name in TINY {
        let (_, config, packed) = tiny(name);
        let heads = config.block.attention.heads;
        let invariant = Reduction::Invariant { blocks: heads };
        let one = logits::<f32>(1, invariant, &packed, &config);
        for world in 2..=heads {
            assert!(logits::<f32>(world, invariant, &packed, &config) == one, "{name} on {world} ranks");
        }
        let exact = tiny(name).2.with_activations(Activations::Exact);
        let dense = tiny(name).2.dequantized();
        assert!(dense.names().unwrap().iter().all(|name| dense.format(name).is_none()));
        let want = logits::<f64>(1, Reduction::Fast, &dense, &config);
        let got = logits::<f64>(1, Reduction::Fast, &exact, &config);
        assert_eq!(got.len(), want.len());
        for (got, want) in
            got.iter().zip(&want).map(|(got, want)| (f64::from_bits(*got), f64::from_bits(*want)))
        {
            assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{name}: {got} and {want}");
        }
    }
}

/// f64 with activations of 8 bits is refused, unless all products are exact.
#[test]
fn exact_formats_need_no_choice_of_activations() {
    let load = |name: &str| {
        let (_, config, packed) = tiny(name);
        Decoder::<Replicated, f64, Cpu>::load(&Group::solo(&Cpu::new()), &packed, &config).map(drop)
    };
    assert!(load("tiny_fp8").is_ok() && load("tiny_gptq").is_ok());
    let error = load("tiny_awq").unwrap_err();
    assert!(
        matches!(error, Error::Unsupported { .. }) && error.to_string().contains("Activations::Exact"),
        "{error}"
    );
}

#[track_caller]
fn refused(case: &Case) -> String {
    match case.open().1 {
        Err(Error::Checkpoint { reason, .. }) => reason,
        Err(other) => other.to_string(),
        Ok(packed) => panic!("{packed:?} was opened"),
    }
}

#[test]
fn damaged_checkpoints_are_refused() {
    let edit = |name: &str, tensor: &str, edit: &dyn Fn(&mut (Dtype, Vec<usize>, Vec<u8>))| {
        let mut case = Case::named(name);
        edit(case.tensors.get_mut(&format!("{name}.{tensor}")).unwrap());
        case
    };
    let without = |name: &str, tensor: &str| {
        let mut case = Case::named(name);
        case.tensors.remove(&format!("{name}.{tensor}")).unwrap();
        case
    };
    let reason = refused(&without("gptq4_v1", "scales"));
    assert!(reason.contains("gptq4_v1.scales"), "{reason}");
    let reason = refused(&without("ct4_asym", "weight_shape"));
    assert!(reason.contains("ct4_asym.weight_shape"), "{reason}");
    let reason = refused(&without("fp8_block", "weight_scale_inv"));
    assert!(reason.contains("fp8_block.weight_scale"), "{reason}");
    // A row less of scales.
    let reason = refused(&edit("gptq4_v1", "scales", &|(_, shape, bytes)| {
        shape[0] -= 1;
        bytes.truncate(shape.iter().product::<usize>() * 2);
    }));
    assert_eq!(
        reason,
        "tensor `gptq4_v1.scales`: has the shape [2, 24], and not [3, 24] (integers of 4 bits, a scale for 1 rows x \
         32 columns)"
    );
    let reason = refused(&edit("gptq4_v1_act", "g_idx", &|(_, _, bytes)| bytes[4] = 3));
    assert_eq!(reason, "tensor `gptq4_v1_act.g_idx`: column 1 is of group 3, but there are 3 groups");
    let reason = refused(&edit("gptq4_v1_act", "g_idx", &|(_, _, bytes)| bytes[..4].fill(0xff)));
    assert_eq!(reason, "tensor `gptq4_v1_act.g_idx`: column 0 is of group -1, but there are 3 groups");
    let reason = refused(&edit("awq4", "qweight", &|(dtype, _, _)| *dtype = Dtype::F32));
    assert_eq!(reason, "tensor `awq4.qweight`: packed codes are F32, and not I32");
    let reason = refused(&edit("ct4_asym", "weight_shape", &|(_, _, bytes)| bytes[7] = 0x80));
    assert!(reason.contains("out of range"), "{reason}");
    let reason = refused(&edit("ct4_asym", "weight_shape", &|(_, _, bytes)| bytes[0] += 1));
    assert!(
        reason.starts_with("tensor `ct4_asym.weight_packed`: has the shape [9, 32], and not"),
        "{reason}"
    );
    // What the configuration says is there.
    for (name, tensor) in [
        ("gptq4_v1_act", "g_idx"),
        ("ct4_act", "weight_g_idx"),
        ("ct4_asym", "weight_zero_point"),
        ("ct8_asym_channel", "weight_zero_point"),
    ] {
        let reason = refused(&without(name, tensor));
        assert!(reason.starts_with(&format!("tensor `{name}.{tensor}`: is missing")), "{reason}");
    }
    let reason = refused(&edit("gptq4_v1_act", "qzeros", &|(_, shape, bytes)| {
        shape[0] -= 1;
        bytes.truncate(shape.iter().product::<usize>() * 4);
    }));
    assert!(reason.starts_with("tensor `gptq4_v1_act.qzeros`: has the shape"), "{reason}");
    let mut twice = Case::named("awq4");
    twice.tensors.insert("awq4.weight".into(), (Dtype::F32, vec![24, 64], vec![0; 4 * 24 * 64]));
    assert!(refused(&twice).contains("stored twice"));
    let mut floats = Case::named("ctfp8_channel");
    floats.quantization["config_groups"]["group_0"]["weights"]["type"] = json!("int");
    assert!(refused(&floats).starts_with("tensor `ctfp8_channel.weight`: has floating-point numbers"));
    let mut none = Case::named("ct8_channel");
    none.quantization["config_groups"] = json!({});
    assert!(refused(&none).contains("has no precision for it"));

    // What the numbers show is found when they are read.
    let error = |case: &Case| {
        let (_folder, packed) = case.open();
        let (packed, whole) = (packed.unwrap(), Region::whole(case.shape));
        let error = read(&packed, &case.weight(), &whole).unwrap_err();
        let format = packed.format(&case.weight()).unwrap();
        let mut out = vec![0; case.shape[0] * format.blocks(0..case.shape[1]).len() * format.bytes()];
        let blocks = packed.read_blocks(&case.weight(), &whole, &mut out).unwrap_err();
        assert_eq!(blocks, error);
        match error {
            Error::Checkpoint { reason, .. } => reason,
            other => panic!("{other}"),
        }
    };
    let reason = error(&edit("fp8_block", "weight", &|(_, shape, bytes)| bytes[shape[1] + 5] = 0xff));
    assert_eq!(reason, "tensor `fp8_block.weight`: row 1, column 5 is NaN");
    let reason = error(&edit("awq4", "scales", &|(_, shape, bytes)| {
        let at = 2 * (shape[1] + 7);
        bytes[at..at + 2].copy_from_slice(&[0, 0x7c]);
    }));
    assert_eq!(reason, "tensor `awq4.scales`: row 7, group 1: the scale is not finite");
}

/// A group of 16 columns has no product, but its weights can be read.
#[test]
fn groups_that_are_no_multiple_of_32_have_to_be_dequantized() {
    let mut case = Case::named("ct8_channel");
    let [rows, columns] = case.shape;
    let scales = case.tensors.get_mut("ct8_channel.weight_scale").unwrap();
    assert_eq!(scales.0, Dtype::F32);
    let groups = columns.div_ceil(16);
    let numbers: Vec<f32> = (0..rows * groups).map(|at| at as f32 + 0.5).collect();
    *scales =
        (Dtype::F32, vec![rows, groups], numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    let weights = &mut case.quantization["config_groups"]["group_0"]["weights"];
    (weights["strategy"], weights["group_size"]) = (json!("group"), json!(16));
    let (_folder, packed) = case.open();
    let (packed, name, region) = (packed.unwrap(), case.weight(), Region::whole(case.shape));
    let error = packed.check(&name, &region).unwrap_err();
    assert!(
        error.to_string().contains("a scale for 16 columns") && error.to_string().contains("dequantized"),
        "{error}"
    );
    let packed = packed.dequantized();
    assert!(packed.check(&name, &region).is_ok());
    let codes = &case.tensors["ct8_channel.weight"].2;
    let weight = |at: usize| f32::from(codes[at] as i8) * numbers[at / columns * groups + at % columns / 16];
    let want: Vec<f32> = (0..rows * columns).map(weight).collect();
    assert_eq!(bits(&read(&packed, &name, &region).unwrap()), bits(&want));
}

#[test]
fn scales_may_be_powers_of_two() {
    let mut case = Case::named("fp8_block32");
    let scales = case.tensors.get_mut("fp8_block32.weight_scale_inv").unwrap();
    let count: usize = scales.1.iter().product();
    // 2⁻¹²⁷, which is subnormal, to 2¹²⁰.
    let exponents: Vec<u8> = (0..count).map(|at| (at * 247 / (count - 1)) as u8).collect();
    *scales = (Dtype::F8_E8M0, scales.1.clone(), exponents.clone());
    let tiles = scales.1[1];
    case.quantization["scale_fmt"] = json!("ue8m0");
    let (_folder, packed) = case.open();
    let got = read(&packed.unwrap(), &case.weight(), &Region::whole(case.shape)).unwrap();
    let codes = &case.tensors["fp8_block32.weight"].2;
    let of_one = {
        let mut ones = Case::named("fp8_block32");
        let scales = ones.tensors.get_mut("fp8_block32.weight_scale_inv").unwrap();
        *scales = (Dtype::F8_E8M0, scales.1.clone(), vec![127; count]);
        let (_folder, packed) = ones.open();
        read(&packed.unwrap(), &ones.weight(), &Region::whole(ones.shape)).unwrap()
    };
    assert!(got.len() == codes.len() && got.len() == of_one.len());
    for (at, (got, one)) in got.iter().zip(&of_one).enumerate() {
        let (row, column) = (at / case.shape[1], at % case.shape[1]);
        let scale = 2_f64.powi(i32::from(exponents[row / 32 * tiles + column / 32]) - 127);
        assert_eq!(*got, (f64::from(*one) * scale) as f32, "row {row}, column {column}");
    }
}

#[test]
fn configurations_are_honoured_or_refused() {
    let gptq = json!({ "quant_method": "gptq", "bits": 4, "group_size": 128 });
    let awq = json!({ "quant_method": "awq", "bits": 4, "group_size": 128 });
    let group = json!({ "targets": ["Linear"], "weights": { "num_bits": 8, "strategy": "channel" } });
    let compressed = json!({
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": { "group_0": group },
    });
    let fp8 = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    let with = |base: &Value, path: &str, value: Value| {
        let mut config = base.clone();
        let mut at = &mut config;
        for key in path.split('/') {
            at = &mut at[key];
        }
        *at = value;
        config
    };
    let weights = "config_groups/group_0/weights/";
    for (config, named) in [
        (with(&gptq, "bits", json!(3)), "weights of 3 bits"),
        (with(&gptq, "bits", json!(null)), "`bits` is missing"),
        (with(&gptq, "checkpoint_format", json!("marlin")), "`marlin`"),
        (with(&gptq, "is_marlin_format", json!(true)), "is_marlin_format"),
        (with(&gptq, "pack_dtype", json!("int8")), "pack_dtype"),
        (with(&gptq, "rotation", json!("hadamard")), "quantization_config.rotation"),
        (with(&gptq, "group_size", json!(0)), "group_size"),
        (with(&gptq, "group_size", json!(null)), "`group_size` is missing"),
        (with(&gptq, "dynamic", json!({ "+:.*down.*": { "bits": 2 } })), "weights of 2 bits"),
        (with(&awq, "version", json!("gemv")), "gemv"),
        (with(&awq, "zero_point", json!(false)), "zero_point"),
        (with(&awq, "bits", json!(8)), "weights of 8 bits"),
        (with(&compressed, "format", json!("nvfp4-pack-quantized")), "nvfp4"),
        (with(&compressed, "quantization_status", json!("frozen")), "quantization_status"),
        (with(&compressed, "kv_cache_scheme", json!({ "num_bits": 8 })), "kv_cache_scheme"),
        (with(&compressed, "transform_config", json!({ "u": {} })), "transform_config"),
        (with(&compressed, "sparsity_config", json!({ "format": "sparse-24-bitmask" })), "sparsity_config"),
        (
            with(&compressed, "config_groups/group_0/output_activations", json!({ "num_bits": 8 })),
            "output_activations",
        ),
        (with(&compressed, &format!("{weights}num_bits"), json!(2)), "weights of 2 bits"),
        (with(&compressed, &format!("{weights}type"), json!("float4")), "float4"),
        (with(&compressed, &format!("{weights}dynamic"), json!(true)), "dynamic"),
        (with(&compressed, &format!("{weights}strategy"), json!("tensor_group")), "tensor_group"),
        (with(&compressed, &format!("{weights}strategy"), json!("group")), "group_size"),
        (with(&compressed, &format!("{weights}new"), json!(1)), "new"),
        (with(&fp8, "fmt", json!("e5m2")), "e5m2"),
        (with(&fp8, "weight_block_size", json!([128])), "weight_block_size"),
        (with(&fp8, "weight_block_size", json!([128, 0])), "weight_block_size"),
        (json!({ "quant_method": "mxfp4" }), "`mxfp4` are not known; known are awq"),
        (json!({ "bits": 4 }), "a method without a name"),
    ] {
        let reason = packing(&config).map(|packing| panic!("{config}: {packing:?}")).unwrap_err();
        assert!(reason.contains(named), "{config}: {reason}");
    }
    // Other precisions of some modules.
    let dynamic = json!({ "+:.*down.*": { "bits": 8, "group_size": 64 }, "-:.*head.*": {} });
    assert_eq!(packing(&with(&gptq, "dynamic", dynamic)).unwrap().tiles.len(), 2);
    // BERT has no such checkpoints.
    let text = json!({ "model_type": "bert", "vocab_size": 9, "quantization_config": gptq });
    assert!(ModelConfig::parse(&text.to_string()).is_err());
}

/// A saved model that was loaded dequantized is not quantized.
#[test]
fn a_saved_model_has_no_quantization() {
    let (_, config, packed) = tiny("tiny_ct");
    let folder = tempdir().unwrap();
    let group = Group::solo(&Cpu::new());
    let error = Decoder::<Replicated, f32, Cpu>::load(&group, &packed, &config).unwrap().save(folder.path());
    assert!(error.unwrap_err().to_string().contains("quantized"));
    let packed = packed.dequantized();
    let model = Decoder::<Replicated, f32, Cpu>::load(&group, &packed, &config).unwrap();
    model.save(folder.path()).unwrap();
    let ModelConfig::Decoder(saved) = ModelConfig::read(folder.path()).unwrap() else { panic!() };
    assert_eq!(saved.packing, None);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let want = logits::<f32>(1, Reduction::Fast, &packed, &config);
    assert_eq!(logits::<f32>(1, Reduction::Fast, &checkpoint, &saved), want);
}

/// Ranks save the bytes that they read.
#[test]
fn a_saved_model_has_the_bytes_that_were_read() {
    for name in TINY {
        let (path, config, packed) = tiny(name);
        let folder = tempdir().unwrap();
        ranks(3)
            .run(|group: Group<Dev>| {
                let model = Decoder::<Replicated, f32, Dev>::load(&group, &packed, &config)?;
                model.save_packed(folder.path(), &packed)
            })
            .unwrap();
        let (old, new) =
            (tensors(&path.join("model.safetensors")), tensors(&folder.path().join("model.safetensors")));
        assert!(old.keys().eq(new.keys()), "{name}");
        let mut copied = 0;
        for (tensor, (dtype, shape, bytes)) in &new {
            if *dtype != Dtype::F32 || old[tensor].0 == Dtype::F32 {
                assert!(
                    (dtype, shape, bytes) == (&old[tensor].0, &old[tensor].1, &old[tensor].2),
                    "{name}: {tensor}"
                );
                copied += 1;
            }
        }
        assert!(copied >= 12, "{name}: {copied}");
        // The dense tensors are those of the model, and the configuration describes the folder.
        let ModelConfig::Decoder(saved) = ModelConfig::read(folder.path()).unwrap() else { panic!() };
        assert_eq!(saved.packing, config.packing);
        let again =
            Packed::new(Checkpoint::open(folder.path()).unwrap(), &saved.packing.clone().unwrap()).unwrap();
        let want = logits::<f32>(1, Reduction::Fast, &packed, &config);
        assert_eq!(logits::<f32>(1, Reduction::Fast, &again, &saved), want);
    }
    // Another checkpoint has other formats or shapes.
    let (_, config, packed) = tiny("tiny_gptq");
    let model = Decoder::<Replicated, f32, Cpu>::load(&Group::solo(&Cpu::new()), &packed, &config).unwrap();
    let folder = tempdir().unwrap();
    for (other, named) in [(tiny("tiny_ct").2, "but not in the checkpoint"), (tiny("tiny_fp8").2, "FP8")] {
        let error = model.save_packed(folder.path(), &other).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(named), "{error}");
    }
    let error = model.save_packed(folder.path(), &tiny("tiny_gptq").2.dequantized()).unwrap_err();
    assert!(error.to_string().contains("dequantized"), "{error}");
    let error = model.save(folder.path()).unwrap_err();
    assert!(error.to_string().contains("Save::packed"), "{error}");
    assert!(!folder.path().join("model.safetensors").exists());
}

/// The third of three ranks holds no row of the matrix.
#[test]
fn ranks_without_rows_save() {
    let case = Case::named("ct4_sym");
    let (_folder, packed) = case.open();
    let (packed, folder) = (packed.unwrap(), tempdir().unwrap());
    let [rows, inputs] = case.shape;
    ranks(3)
        .run(|group: Group<Dev>| {
            let columns = Columns::from_partition(&group, Partition::from_sizes([4, rows - 4, 0]))?;
            let weights = Weights::new(&packed).at(&case.name);
            let layer = ColumnLinear::<f32, Dev>::load(&group, &weights, inputs, &columns, Bias::None)?;
            Save::new(folder.path()).packed(&packed).write(&group, &layer.params())
        })
        .unwrap();
    assert!(tensors(&folder.path().join("model.safetensors")) == case.tensors);
    // A matrix of other rows in the same format.
    let mut other = Case::named("ct4_sym");
    for (_, shape, bytes) in other.tensors.values_mut().filter(|(_, shape, _)| shape.len() == 2) {
        bytes.truncate(bytes.len() / shape[0] * (rows - 1));
        shape[0] = rows - 1;
    }
    other.tensors.get_mut("ct4_sym.weight_shape").unwrap().2[0] -= 1;
    let (_other_folder, other) = other.open();
    let (cpu, weights) = (Cpu::new(), Weights::new(&packed));
    let whole = Region::whole([rows, inputs]);
    let param =
        Param::<f32, _>::load_region(&cpu, &weights, "ct4_sym.weight", Role::Weight, whole, true).unwrap();
    let save = Save::new(folder.path());
    let error = save.packed(&other.unwrap()).write(&Group::solo(&cpu), &[param]).unwrap_err();
    assert!(matches!(error, Error::TensorShape { .. }), "{error}");
}

/// Tensors of random types and shapes give an error, or matrices that can be read. The number of
/// files is that of `SHARDWISE_FUZZ_CASES`, for longer runs.
#[test]
fn mutated_checkpoints_do_not_panic() {
    let count = std::env::var("SHARDWISE_FUZZ_CASES").map_or(2000, |cases| cases.parse().unwrap());
    let cases = Case::all();
    let packings: Vec<_> = cases.iter().map(|case| packing(&case.quantization).unwrap()).collect();
    let types =
        [Dtype::I32, Dtype::I8, Dtype::F8_E4M3, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::I64, Dtype::U8];
    let (mut opened, mut checked) = (0, 0);
    for number in 0..count {
        let mut choices = Choices::new(number, "packed");
        let own = choices.below(cases.len());
        let case = &cases[own];
        let mut tensors = case.tensors.clone();
        for _ in 0..1 + choices.below(2) {
            let at = choices.below(tensors.len());
            let (dtype, shape, bytes) = tensors.values_mut().nth(at).unwrap();
            match choices.below(6) {
                0 => *dtype = types[choices.below(types.len())],
                1 => shape.iter_mut().for_each(|size| *size = (*size + choices.below(5)).saturating_sub(2)),
                2 => shape.reverse(),
                3 => shape.push(1),
                4 => _ = shape.pop(),
                _ => bytes.iter_mut().for_each(|byte| *byte = choices.below(256) as u8),
            }
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            bytes.resize(len, choices.below(256) as u8);
        }
        let (_folder, path) = written(&tensors);
        // A packing that does not know the tensors would find no matrix to read.
        let other = choices.below(packings.len());
        let packing = &packings[if choices.below(4) == 0 { other } else { own }];
        let checkpoint = Checkpoint::open(path).unwrap();
        let packed = match Packed::new(checkpoint, packing) {
            Ok(packed) => packed,
            Err(Error::Checkpoint { .. } | Error::MissingTensor { .. } | Error::TensorElement { .. }) => {
                continue;
            }
            Err(other) => panic!("case {number}: {other}"),
        };
        opened += 1;
        for name in packed.names().unwrap() {
            let Some(format) = packed.format(&name) else { continue };
            // The shape is that of the matrix before, or has to be found by an error.
            let region = (0..2).fold(Region::whole(case.shape), |region, dim| {
                region.narrow(dim, choices.range(case.shape[dim]))
            });
            let read = read(&packed, &name, &region);
            checked += u64::from(read.is_ok());
            let fine = matches!(read, Ok(_) | Err(Error::Checkpoint { .. } | Error::TensorShape { .. }));
            assert!(fine, "case {number}: {name}: {read:?}");
            let groups = match packed.column_groups(&name, region.ranges()[1].clone()) {
                Ok(groups) => groups.map(|groups| groups.groups),
                Err(Error::Sizes { .. }) => continue,
                Err(other) => panic!("case {number}: {other}"),
            };
            if groups.is_none() && read.is_ok() {
                let blocks = format.blocks(region.ranges()[1].clone()).len();
                let mut out = vec![0; region.ranges()[0].len() * blocks * format.bytes()];
                // Another column of a block may be NaN.
                let read = packed.read_blocks(&name, &region, &mut out);
                assert!(matches!(read, Ok(()) | Err(Error::Checkpoint { .. })), "case {number}: {read:?}");
            }
        }
    }
    assert!(opened > count / 20 && opened < count, "{opened} of {count} checkpoints were opened");
    assert!(checked > count / 10, "regions of {checked} matrices were read");
}

#[test]
fn what_does_not_fit_is_an_error() {
    let case = Case::named("ct4_asym");
    let (_folder, packed) = case.open();
    let packed = packed.unwrap();
    let other = Region::whole([9, 255]);
    let error = packed
        .read(&case.weight(), Role::Weight, &other, AnyMut::F32([0.0; 9 * 255].as_mut_slice()))
        .unwrap_err();
    assert!(matches!(error, Error::TensorShape { .. }), "{error}");
    let whole = Region::whole(case.shape);
    let error =
        packed.read(&case.weight(), Role::Weight, &whole, AnyMut::F32([0.0; 5].as_mut_slice())).unwrap_err();
    assert!(matches!(error, Error::Sizes { .. }), "{error}");
    assert!(matches!(
        packed.read_blocks(&case.weight(), &whole, &mut [0; 5]).unwrap_err(),
        Error::Sizes { .. }
    ));
    // The tensors that stand for a matrix are no tensors of the model.
    assert!(!packed.contains("ct4_asym.weight_packed") && packed.contains("ct4_asym.weight"));
    let error = packed.check("ct4_asym.bias", &Region::whole([9])).unwrap_err();
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
}
