//! GGUF files: what ggml's own code makes of the same bytes, regions, split files, damaged files,
//! configurations, and quantization at load. `scripts/make_gguf_fixtures.py` makes the files.

use half::f16;
use proptest::prelude::*;
use serde_json::Value;
use shardwise::{
    Error, Result,
    comm::Group,
    device::{AnyMut, Cpu},
    kernels::{Activations, Format},
    models::{Decoder, DecoderConfig, ModelConfig},
    ops::RopeScaling,
    rng::Philox,
    shard::{Partition, Replicated, Sequences},
    tensor::{Arrays, Region, Role, WeightSource},
    weights::{Checkpoint, Gguf, GgufValue, Quantization, Transposed},
};
use std::{collections::BTreeMap, fs, ops::Range, path::PathBuf};
use tempfile::{TempDir, tempdir};

pub(crate) fn data(name: &str) -> PathBuf {
    shardwise_tests::root().join("tests/data").join(name)
}

fn open(bytes: &[u8]) -> (TempDir, Result<Gguf>) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let gguf = Gguf::open(path);
    (folder, gguf)
}

/// Returns the error of opening a file, which is one of a damaged file.
#[track_caller]
fn refused(bytes: &[u8]) -> String {
    match open(bytes).1 {
        Err(Error::Checkpoint { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(gguf) => panic!("{gguf:?} was opened"),
    }
}

pub(crate) fn read(source: &dyn WeightSource, name: &str, region: &Region) -> Result<Vec<f32>> {
    let mut out = vec![f32::NAN; region.extent().len()];
    source.read(name, Role::Weight, region, AnyMut::F32(out.as_mut_slice()))?;
    Ok(out)
}

fn blocks(source: &dyn WeightSource, name: &str, region: &Region, format: Format) -> Result<Vec<u8>> {
    let [rows, columns] = region.ranges() else { panic!("{name} is not a matrix") };
    let mut out = vec![0xA5; rows.len() * format.blocks(columns.clone()).len() * format.bytes()];
    source.read_blocks(name, region, &mut out)?;
    Ok(out)
}

pub(crate) fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

pub(crate) fn pick<T: Copy>(whole: &[T], region: &Region) -> Vec<T> {
    region.runs().into_iter().flatten().map(|index| whole[index]).collect()
}

fn decode(format: Format, blocks: &[u8]) -> Vec<f32> {
    let mut weights = vec![0.0; blocks.len() / format.bytes() * format.weights()];
    for (block, out) in blocks.chunks_exact(format.bytes()).zip(weights.chunks_exact_mut(format.weights())) {
        format.decode(block, out);
    }
    weights
}

/// Reproducible random choices.
pub(crate) struct Choices(Philox, u64);

impl Choices {
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        Self(Philox::named(seed, name), 0)
    }

    pub(crate) fn below(&mut self, count: usize) -> usize {
        self.1 += 1;
        ((self.0.uniform(self.1) * count as f64) as usize).min(count - 1)
    }

    pub(crate) fn range(&mut self, len: usize) -> Range<usize> {
        let (a, b) = (self.below(len + 1), self.below(len + 1));
        a.min(b)..a.max(b)
    }
}

/// A GGUF file in memory.
#[derive(Clone, Default)]
struct File {
    values: Vec<(String, Vec<u8>)>,
    /// Name, dimensions (fastest first), type, data.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    alignment: Option<usize>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl File {
    fn value(mut self, key: &str, kind: u32, bytes: impl AsRef<[u8]>) -> Self {
        self.values.push((key.into(), [&kind.to_le_bytes(), bytes.as_ref()].concat()));
        self
    }

    fn u32(self, key: &str, value: u32) -> Self {
        self.value(key, 4, value.to_le_bytes())
    }

    fn f32(self, key: &str, value: f32) -> Self {
        self.value(key, 6, value.to_le_bytes())
    }

    fn string(self, key: &str, value: &str) -> Self {
        self.value(key, 8, text(value))
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, bytes: impl Into<Vec<u8>>) -> Self {
        self.tensors.push((name.into(), dims.to_vec(), kind, bytes.into()));
        self
    }

    /// Replaces a value.
    fn set(mut self, key: &str, kind: u32, bytes: impl AsRef<[u8]>) -> Self {
        self.values.retain(|(name, _)| name != key);
        self.value(key, kind, bytes)
    }

    fn bytes(&self) -> Vec<u8> {
        let alignment = self.alignment.unwrap_or(32);
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            file.extend(text(key));
            file.extend(value);
        }
        let mut offset = 0;
        for (name, dims, kind, bytes) in &self.tensors {
            file.extend(text(name));
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(alignment);
        }
        for (.., bytes) in &self.tensors {
            file.resize(file.len().next_multiple_of(alignment), 0);
            file.extend(bytes);
        }
        file
    }
}

fn f32s(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A file of ggml's results.
/// The formats of ggml.
const GGML: [Format; 8] = [
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q4K,
    Format::Q5K,
    Format::Q6K,
];

fn oracle(name: &str) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(data("gguf").join(name)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.into(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn every_format_decodes_to_ggmls_bits() {
    let oracle = oracle("decode.safetensors");
    assert_eq!(oracle.len(), 2 * GGML.len());
    for format in GGML {
        let (shape, blocks) = &oracle[&format!("{format}.blocks")];
        assert_eq!(shape[1], format.bytes(), "{format}");
        let want = numbers(&oracle[&format!("{format}.weights")].1);
        assert!(want.len() == shape[0] * format.weights() && shape[0] >= 12);
        assert_eq!(bits(&decode(format, blocks)), bits(&want), "{format}");
    }
}

#[test]
fn weights_are_quantized_to_ggmls_bits() {
    let oracle = oracle("encode.safetensors");
    let rows = numbers(&oracle["rows"].1);
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
        let want = &oracle[&format!("{format}.blocks")].1;
        assert_eq!(want.len(), rows.len() / 32 * format.bytes());
        for (at, (row, want)) in rows.chunks(32).zip(want.chunks(format.bytes())).enumerate() {
            let mut block = vec![0; format.bytes()];
            format.encode(row, &mut block).unwrap();
            assert_eq!(block, want, "{format}, row {at}: {row:?}");
        }
    }
    // 1 / d overflows, where ggml's conversion to integers is undefined. The scale is 0 in f16.
    for (format, zero) in [(Format::Q8_0, 0), (Format::Q4_0, 0x88), (Format::Q4_1, 0)] {
        let mut block = vec![0xA5; format.bytes()];
        format.encode(&std::array::from_fn::<_, 32, _>(|at| at as f32 * 1e-41), &mut block).unwrap();
        assert!(block[format.bytes() - 16..].iter().all(|code| *code == zero), "{format}: {block:?}");
        assert_eq!(decode(format, &block), [0.0; 32], "{format}");
    }
    let encode =
        |format: Format, weights: &[f32], bytes| format.encode(weights, &mut vec![0; bytes]).unwrap_err();
    assert!(matches!(encode(Format::Q6K, &[0.0; 256], 210), Error::Unsupported { .. }));
    assert!(matches!(
        encode(Format::Q8_0, &[0.0; 31], 34),
        Error::Sizes { left_size: 31, right_size: 32, .. }
    ));
    assert!(matches!(
        encode(Format::Q4_1, &[0.0; 32], 18),
        Error::Sizes { left_size: 18, right_size: 20, .. }
    ));
    let mut weights = [0.0; 32];
    weights[3] = f32::NAN;
    assert_eq!(encode(Format::Q4_0, &weights, 18).to_string(), "quantize: weight 3 is NaN");
    let large = encode(Format::Q8_0, &[1e30; 32], 34).to_string();
    assert_eq!(large, "quantize: the weights are too large for a scale of f16");
}

/// The file of gguf-py: names, shapes, formats, and the bits of all weights in Hugging Face's
/// order.
#[test]
fn a_file_of_ggufs_own_writer_is_read() {
    let described: Value = serde_json::from_slice(&fs::read(data("gguf/tiny.json")).unwrap()).unwrap();
    let described = described.as_object().unwrap();
    for name in ["tiny.gguf", "tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"] {
        let gguf = Gguf::open(data("gguf").join(name)).unwrap();
        assert!(gguf.names().eq(described.keys()), "{name}");
        assert_eq!(gguf.architecture(), "llama");
        for (tensor, about) in described {
            let shape: Vec<usize> = serde_json::from_value(about["shape"].clone()).unwrap();
            assert_eq!(gguf.shape(tensor).unwrap(), shape);
            let kind = about["type"].as_str().unwrap();
            let format = gguf.format(tensor).map(|format| format.to_string());
            assert_eq!(format, kind.starts_with('Q').then(|| kind.to_string()), "{tensor}");
            let weights = read(&gguf, tensor, &Region::whole(&shape[..])).unwrap();
            let hash = f32s(&weights).iter().fold(0xcbf29ce484222325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x100000001b3)
            });
            assert_eq!(format!("{hash:016x}"), about["hash"].as_str().unwrap(), "{name}: {tensor}");
        }
    }
}

/// A region of elements and of blocks is that part of the whole, also where rows are permuted.
#[test]
fn every_region_is_the_part_of_the_whole() {
    let gguf = Gguf::open(data("gguf/tiny.gguf")).unwrap();
    let mut choices = Choices::new(1, "regions");
    for name in gguf.names().map(str::to_string).collect::<Vec<_>>() {
        let shape = gguf.shape(&name).unwrap().to_vec();
        let whole = Region::whole(&shape[..]);
        let weights = read(&gguf, &name, &whole).unwrap();
        let all = gguf.format(&name).map(|format| (format, blocks(&gguf, &name, &whole, format).unwrap()));
        if let Some((format, all)) = &all {
            assert_eq!(bits(&decode(*format, all)), bits(&weights), "{name}");
        }
        for _ in 0..40 {
            let narrow =
                |region: Region, (dim, &size): (usize, &usize)| region.narrow(dim, choices.range(size));
            let region = shape.iter().enumerate().fold(whole.clone(), narrow);
            assert_eq!(
                bits(&read(&gguf, &name, &region).unwrap()),
                bits(&pick(&weights, &region)),
                "{name} {region:?}"
            );
            if let Some((format, all)) = &all {
                let columns = format.blocks(region.ranges()[1].clone());
                let grid = [shape[0], shape[1] / format.weights()];
                let grid = Region::whole(grid).narrow(0, region.ranges()[0].clone()).narrow(1, columns);
                let each: Vec<&[u8]> = all.chunks(format.bytes()).collect();
                let part = blocks(&gguf, &name, &region, *format).unwrap();
                assert_eq!(part, pick(&each, &grid).concat(), "{name} {region:?}");
            }
        }
    }
    let wrong = read(&gguf, "model.norm.weight", &Region::whole([65])).unwrap_err();
    assert!(matches!(wrong, Error::TensorShape { .. }), "{wrong}");
    assert!(matches!(gguf.shape("model.norms.weight"), Err(Error::MissingTensor { .. })));
    let float = gguf.read_blocks("model.norm.weight", &Region::whole([64]), &mut []).unwrap_err();
    assert!(float.to_string().contains("is not quantized"));
    let name = "model.layers.0.mlp.gate_proj.weight";
    let short = gguf.read_blocks(name, &Region::whole([256, 64]), &mut [0; 35]).unwrap_err();
    assert!(matches!(short, Error::Sizes { left_size: 9216, right_size: 35, .. }), "{short}");
}

/// Reads by ranks that share the rows of q by heads read each byte once, and no other bytes.
#[test]
fn a_shard_reads_its_bytes() {
    for ranks in 1..=4 {
        for (name, unit) in [("self_attn.q_proj", 16), ("self_attn.v_proj", 16), ("mlp.gate_proj", 1)] {
            let gguf = Gguf::open(data("gguf/tiny.gguf")).unwrap();
            let name = format!("model.layers.0.{name}.weight");
            let rows = gguf.shape(&name).unwrap()[0];
            let mut before = 0;
            for rank in 0..ranks {
                let range = Partition::even(rows / unit, ranks).range(rank);
                let part = range.start * unit..range.end * unit;
                let region = Region::whole([rows, 64]).narrow(0, part.clone());
                let row = match gguf.format(&name) {
                    Some(format) => {
                        blocks(&gguf, &name, &region, format).unwrap();
                        format.bytes() * 64 / format.weights()
                    }
                    None => {
                        read(&gguf, &name, &region).unwrap();
                        128
                    }
                };
                assert_eq!(gguf.bytes_read() - before, (part.len() * row) as u64, "{name}");
                before = gguf.bytes_read();
            }
        }
    }
    let gguf = Gguf::open(data("gguf/tiny.gguf")).unwrap();
    let name = "model.layers.0.mlp.gate_proj.weight";
    read(&gguf, name, &Region::whole([256, 64]).narrow(0, 7..8).narrow(1, 40..44)).unwrap();
    assert_eq!(gguf.bytes_read(), 18, "one block");
}

#[test]
fn options_of_a_source_are_kept() {
    let open = || Gguf::open(data("gguf/tiny.gguf")).unwrap();
    let name = "model.layers.0.mlp.gate_proj.weight";
    assert_eq!((open().format(name), open().activations()), (Some(Format::Q4_0), Activations::Int8));
    assert_eq!(open().with_activations(Activations::Exact).activations(), Activations::Exact);
    assert_eq!(open().dequantized().format(name), None);
    assert_eq!(open().format("missing"), None);
    assert_eq!(open().path(), data("gguf/tiny.gguf"));
    let of = Group::solo(&Cpu::new());
    let gguf = open().dequantized();
    let ModelConfig::Decoder(config) = ModelConfig::of_gguf(&gguf).unwrap() else { panic!("a decoder") };
    assert_eq!((config.vocabulary, config.tied, &config.ends[..]), (80, false, &[2, 5][..]));
    assert_eq!(config.block.attention.rope.as_ref().unwrap().base, 500000.0);
    let model = Decoder::<Replicated, f32, _>::load(&of, &gguf, &config).unwrap();
    let logits = model.infer(&[1, 2, 3], Sequences::one(3)).unwrap();
    assert_eq!(logits.shape().dims(), [3, 80]);
    assert!(logits.local().to_vec().unwrap().iter().all(|logit| logit.is_finite()));
}

#[test]
fn metadata_are_read_on_request() {
    let gguf = Gguf::open(data("gguf/tiny.gguf")).unwrap();
    let get = |key: &str| gguf.get(key).unwrap();
    assert_eq!(get("general.name"), Some(GgufValue::String("tiny".into())));
    assert_eq!(get("llama.block_count").unwrap().integer(), Some(1));
    assert_eq!(get("llama.attention.layer_norm_rms_epsilon"), Some(GgufValue::F32(1e-5)));
    assert_eq!(get("tokenizer.ggml.add_bos_token"), Some(GgufValue::Bool(true)));
    assert_eq!(get("general.nothing"), None);
    let tokens = get("tokenizer.ggml.tokens").unwrap();
    let tokens: Vec<_> = tokens.array().unwrap().iter().map(|token| token.text().unwrap()).collect();
    assert_eq!((tokens.len(), tokens[79]), (80, "<79>"));
    assert_eq!(get("tokenizer.ggml.scores").unwrap().array().unwrap()[3], GgufValue::F32(-1.5));
    assert!(gguf.keys().any(|key| key == "tokenizer.ggml.scores") && gguf.keys().is_sorted());
    let all = File::default()
        .value("a", 0, [200])
        .value("b", 1, [200])
        .value("c", 2, 60000_u16.to_le_bytes())
        .value("d", 3, (-3_i16).to_le_bytes())
        .value("e", 5, (-70000_i32).to_le_bytes())
        .value("f", 10, u64::MAX.to_le_bytes())
        .value("g", 11, i64::MIN.to_le_bytes())
        .value("h", 12, 0.1_f64.to_le_bytes())
        .value("i", 9, [&1_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &[1, 255]].concat())
        .value("j", 7, [2])
        .value("k", 8, [&1_u64.to_le_bytes()[..], &[0xff]].concat());
    let (_folder, gguf) = open(&all.bytes());
    let gguf = gguf.unwrap();
    let integers =
        ["a", "b", "c", "d", "e", "f", "g"].map(|key| gguf.get(key).unwrap().unwrap().integer().unwrap());
    assert_eq!(integers, [200, -56, 60000, -3, -70000, u64::MAX.into(), i64::MIN.into()]);
    assert_eq!(gguf.get("h").unwrap(), Some(GgufValue::F64(0.1)));
    let list = GgufValue::Array(vec![GgufValue::Integer(1), GgufValue::Integer(-1)]);
    assert_eq!(gguf.get("i").unwrap(), Some(list));
    let failure = |key: &str| gguf.get(key).unwrap_err().to_string();
    assert!(failure("j").contains("2 is neither true (1) nor false (0)"));
    assert!(failure("k").contains("is not UTF-8 text"));
}

/// Returns a file with a matrix of Q4_0 and a vector.
fn small() -> File {
    File::default()
        .string("general.architecture", "none")
        .u32("general.alignment", 32)
        .value("list", 9, [&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &text("ab"), &text("c")].concat())
        .tensor("w", &[64, 2], 2, vec![0; 72])
        .tensor("v", &[3], 0, f32s(&[1.0, 2.0, 3.0]))
}

#[test]
fn damaged_files_are_refused() {
    let (_folder, gguf) = open(&small().bytes());
    assert_eq!(gguf.unwrap().names().collect::<Vec<_>>(), ["v", "w"]);
    let patched = |at: usize, new: &[u8]| {
        let mut bytes = small().bytes();
        bytes[at..at + new.len()].copy_from_slice(new);
        refused(&bytes)
    };
    let find = |what: &[u8]| small().bytes().windows(what.len()).position(|window| window == what).unwrap();
    assert!(patched(0, b"GGML").contains("does not begin with `GGUF`"));
    assert!(patched(4, &[1, 0, 0, 0]).contains("GGUF of version 1 is not known; known are 2 and 3"));
    assert!(patched(4, &[0, 0, 0, 3]).contains("big-endian"));
    assert!(patched(8, &u64::MAX.to_le_bytes()).contains("the number of tensors is 18446744073709551615"));
    assert!(
        patched(8, &100_u64.to_le_bytes())
            .contains("the number of tensors is 100, which takes 24 bytes each")
    );
    assert!(patched(16, &(1_u64 << 62).to_le_bytes()).contains("the number of metadata values is"));
    assert!(patched(24, &70000_u64.to_le_bytes()).contains("at most 65535 are allowed"));
    assert!(patched(32, &[0xff]).contains("a key at byte 24 is not UTF-8"));
    assert!(
        patched(52, &[13])
            .contains("key `general.architecture`: the value at byte 56 has the unknown type 13")
    );
    let list = find(b"list") + 4;
    assert!(patched(list + 4, &[9]).contains("key `list`: the list at byte"));
    assert!(patched(list + 8, &(1_u64 << 61).to_le_bytes()).contains("the number of elements of a list is"));
    assert!(patched(list + 16, &u64::MAX.to_le_bytes()).contains("a text at byte"));
    let w = find(b"\x01\0\0\0\0\0\0\0w") + 9;
    assert!(patched(w, &5_u32.to_le_bytes()).contains("tensor `w`: it has 5 dimensions; at most 4"));
    assert!(patched(w + 4, &(1_u64 << 63).to_le_bytes()).contains("overflows"));
    assert!(
        patched(w + 4, &33_u64.to_le_bytes())
            .contains("rows have 33 elements, which are not whole blocks of 32 (Q4_0)")
    );
    assert!(patched(w + 12, &200_u64.to_le_bytes()).contains("tensor `w`: its data end at byte"));
    assert!(
        patched(w + 24, &1_u64.to_le_bytes()).contains("its offset 1 is not a multiple of the alignment 32")
    );
    assert!(patched(w + 24, &(u64::MAX - 31).to_le_bytes()).contains("overflows"));
    let v = find(b"\x01\0\0\0\0\0\0\0v") + 9;
    assert!(patched(v + 16, &64_u64.to_le_bytes()).contains("tensor `v`: its data begin at byte"), "overlap");
    assert!(patched(w - 1, b"v").contains("tensor `v`: the name occurs twice"));
    for alignment in [0, 24, u32::MAX] {
        let reason = refused(&small().set("general.alignment", 4, alignment.to_le_bytes()).bytes());
        assert!(
            reason.contains(&format!("`general.alignment` is {alignment}; it has to be a power of two")),
            "{reason}"
        );
    }
    assert!(refused(&small().u32("list", 1).bytes()).contains("the key `list` occurs twice"));
    assert!(
        refused(&small().tensor(&"n".repeat(65), &[1], 0, f32s(&[0.0])).bytes())
            .contains("at most 64 are allowed")
    );
    assert!(
        refused(&small().tensor("q", &[], 2, vec![0; 18]).bytes())
            .contains("1 elements, which are not whole")
    );
    let huge = [1_u64 << 31, 1 << 31, 1 << 31];
    assert!(refused(&small().tensor("q", &huge, 0, vec![]).bytes()).contains("overflows"));
    let empty = [0, 1_u64 << 40, 1 << 40];
    assert!(refused(&small().tensor("q", &empty, 0, vec![]).bytes()).contains("overflows"), "strides");
    let other = File { alignment: Some(64), ..small() };
    let (_folder, gguf) = open(&other.set("general.alignment", 4, 64_u32.to_le_bytes()).bytes());
    assert_eq!(read(&gguf.unwrap(), "v", &Region::whole([3])).unwrap(), [1.0, 2.0, 3.0]);
}

/// Every file that ends too early is refused, by a typed error.
#[test]
fn truncated_files_are_refused() {
    let bytes = small().bytes();
    (0..bytes.len()).for_each(|len| _ = refused(&bytes[..len]));
    let bytes = fs::read(data("gguf/tiny.gguf")).unwrap();
    for len in (0..4000).step_by(7).chain((4000..bytes.len()).step_by(997)) {
        _ = refused(&bytes[..len]);
    }
}

/// A matrix without columns may have any number of rows, which are not visited.
#[test]
fn empty_matrices_are_read() {
    let file = File::default()
        .string("general.architecture", "llama")
        .u32("llama.attention.head_count", 2)
        .tensor("blk.0.attn_q.weight", &[0, 1 << 60], 0, vec![])
        .tensor("blk.0.attn_v.weight", &[0, 1 << 60], 0, vec![]);
    let (_folder, gguf) = open(&file.bytes());
    let gguf = gguf.unwrap();
    for name in ["q_proj", "v_proj"].map(|name| format!("model.layers.0.self_attn.{name}.weight")) {
        assert!(read(&gguf, &name, &Region::whole([1 << 60, 0])).unwrap().is_empty());
    }
}

#[test]
fn unknown_types_and_scales_are_refused_when_read() {
    let inf = [f16::INFINITY.to_le_bytes().to_vec(), vec![0; 16]].concat();
    let file = small()
        .tensor("iq", &[256, 1], 23, vec![0; 136])
        .tensor("new", &[7], 99, vec![0; 3])
        .tensor("inf", &[32, 3], 2, [vec![0; 36], inf.clone()].concat())
        .tensor("minimum", &[32], 3, [&[0, 0][..], &inf].concat())
        .tensor("vector", &[32], 8, vec![0; 34])
        .tensor("double", &[1], 28, 0.1_f64.to_le_bytes());
    let (_folder, gguf) = open(&file.bytes());
    let gguf = gguf.unwrap();
    let failure = |name: &str, shape: &[usize]| {
        let region = Region::whole(shape);
        let error = read(&gguf, name, &region).unwrap_err();
        let checked = gguf.check(name, &region);
        assert!(checked == Err(error.clone()) || matches!(error, Error::Checkpoint { .. }));
        error.to_string()
    };
    let iq = failure("iq", &[1, 256]);
    assert!(
        iq.contains("tensor `iq` has elements IQ4_XS in ") && iq.ends_with("Q4_K, Q5_K and Q6_K"),
        "{iq}"
    );
    assert!(failure("new", &[7]).contains("has elements of the unknown type 99"));
    assert!(failure("inf", &[3, 32]).contains("tensor `inf`: row 2, block 0: the scale is not finite"));
    assert!(failure("minimum", &[32]).contains("tensor `minimum`: row 0, block 0: the scale is not finite"));
    let block = gguf.read_blocks("inf", &Region::whole([3, 32]).narrow(0, 2..3), &mut [0; 18]).unwrap_err();
    assert!(matches!(block, Error::Checkpoint { .. }), "{block}");
    assert_eq!(read(&gguf, "inf", &Region::whole([3, 32]).narrow(0, 0..2)).unwrap().len(), 64);
    assert_eq!(gguf.format("vector"), None, "only matrices stay quantized");
    assert_eq!(read(&gguf, "vector", &Region::whole([32]).narrow(0, 3..5)).unwrap(), [0.0; 2]);
    let mut double = [0.0];
    gguf.read("double", Role::Weight, &Region::whole([1]), AnyMut::F64(&mut double[..])).unwrap();
    assert_eq!(double, [0.1]);
    let llama = |heads: u32| {
        File::default()
            .string("general.architecture", "llama")
            .u32("llama.attention.head_count", heads)
            .tensor("blk.0.attn_q.weight", &[1, 6], 0, f32s(&[0.0; 6]))
            .bytes()
    };
    assert!(open(&llama(3)).1.is_ok());
    for heads in [0, 2, 4] {
        assert!(refused(&llama(heads)).contains("tensor `blk.0.attn_q.weight`: its"), "{heads}");
    }
}

#[test]
fn files_of_a_split_model_belong_together() {
    let folder = tempdir().unwrap();
    let part = |no: u16, count: u16, total: i32| {
        File::default()
            .value("split.no", 2, no.to_le_bytes())
            .value("split.count", 2, count.to_le_bytes())
            .value("split.tensors.count", 5, total.to_le_bytes())
            .tensor(&format!("t{no}"), &[1], 0, f32s(&[f32::from(no)]))
    };
    let write = |name: &str, file: &File| fs::write(folder.path().join(name), file.bytes()).unwrap();
    let open = |name: &str| Gguf::open(folder.path().join(name));
    let (one, two) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    write(one, &part(0, 2, 2));
    assert!(matches!(open(one), Err(Error::Io { .. })), "the second file is missing");
    write(two, &part(1, 2, 2));
    let gguf = open(two).unwrap();
    assert_eq!(read(&gguf, "t1", &Region::whole([1])).unwrap(), [1.0]);
    assert_eq!(gguf.get("split.no").unwrap(), Some(GgufValue::Integer(0)), "the first file's metadata");
    let failure = |file: &File| {
        write(two, file);
        open(one).unwrap_err().to_string()
    };
    assert!(failure(&part(0, 2, 2)).contains("`split.no` is 0, but by its name the file has 1"));
    assert!(failure(&part(1, 3, 2)).contains("`split.count` is 3, but by its name the file has 2"));
    assert!(failure(&File::default()).contains("`split.no` is missing"));
    let mut same = part(1, 2, 2);
    same.tensors[0].0 = "t0".into();
    assert!(failure(&same).contains("tensor `t0` is there twice"));
    same.tensors.clear();
    assert!(failure(&same).contains("`split.tensors.count` is 2, but the 2 files have 1 tensors"));
    write("whole-00001-of-00001.gguf", &File::default().tensor("t", &[1], 0, f32s(&[5.0])));
    assert_eq!(read(&open("whole-00001-of-00001.gguf").unwrap(), "t", &Region::whole([1])).unwrap(), [5.0]);
    write("renamed.gguf", &part(0, 2, 2));
    assert!(open("renamed.gguf").unwrap_err().to_string().contains("-00001-of-00002.gguf"));
    write("alone.gguf", &part(0, 1, 1));
    assert!(open("alone.gguf").is_ok());
}

/// Returns a file with one of the models of Hugging Face, written as llama.cpp's converter does.
fn converted(model: &str) -> (Checkpoint, DecoderConfig, File) {
    let mut json: Value =
        serde_json::from_slice(&fs::read(data(model).join("config.json")).unwrap()).unwrap();
    if model == "qwen2" {
        // GGUF has no key for Qwen2's window.
        json["use_sliding_window"] = false.into();
        json.as_object_mut().unwrap().remove("layer_types");
    }
    let ModelConfig::Decoder(config) = ModelConfig::parse(&json.to_string()).unwrap() else {
        panic!("{model}")
    };
    let checkpoint = Checkpoint::open(data(model)).unwrap();
    let attention = &config.block.attention;
    let key = |key: &str| format!("{model}.{key}");
    let size = |size: usize| u32::try_from(size).unwrap();
    let eps = |names: [&str; 2]| names.iter().find_map(|name| json[*name].as_f64()).unwrap() as f32;
    let mut file = File::default()
        .string("general.architecture", model)
        .string("general.type", "model")
        .u32(&key("block_count"), size(config.layers.len()))
        .u32(&key("context_length"), size(config.context.unwrap()))
        .u32(&key("embedding_length"), size(config.hidden()))
        .u32(&key("feed_forward_length"), size(config.block.ffn))
        .u32(&key("attention.head_count"), size(attention.heads))
        .u32("tokenizer.ggml.eos_token_id", 2);
    file = if model == "gpt2" {
        file.f32(&key("attention.layer_norm_epsilon"), eps(["layer_norm_epsilon", ""]))
    } else {
        let rope = attention.rope.as_ref().unwrap();
        file.u32(&key("attention.head_count_kv"), size(attention.kv_heads))
            .u32(&key("attention.key_length"), size(attention.head_dim))
            .u32(&key("attention.value_length"), size(attention.head_dim))
            .u32(&key("rope.dimension_count"), size(attention.head_dim))
            .f32(&key("rope.freq_base"), rope.base as f32)
            .f32(&key("attention.layer_norm_rms_epsilon"), eps(["rms_norm_eps", ""]))
    };
    match attention.rope.as_ref().map(|rope| (rope, &rope.scaling)) {
        Some((rope, RopeScaling::Llama3 { factor, low, high, trained })) => {
            let divisor = |pair: usize| {
                let frequency = 1.0 / (rope.base as f32).powf(2.0 * pair as f32 / rope.dim as f32);
                let wavelength = std::f32::consts::TAU / frequency;
                let (factor, trained) = (*factor as f32, *trained as f32);
                let (low, high) = (*low as f32, *high as f32);
                if wavelength < trained / high {
                    1.0
                } else if wavelength > trained / low {
                    factor
                } else {
                    let smooth = (trained / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            };
            let divisors: Vec<f32> = (0..rope.dim / 2).map(divisor).collect();
            file = file.tensor("rope_freqs.weight", &[divisors.len() as u64], 0, f32s(&divisors));
        }
        Some((_, RopeScaling::Yarn { factor, trained, .. })) => {
            file = file
                .string(&key("rope.scaling.type"), "yarn")
                .f32(&key("rope.scaling.factor"), *factor as f32)
                .u32(&key("rope.scaling.original_context_length"), size(*trained));
        }
        _ => {}
    }
    let parts = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("ln_1", "attn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
    ];
    for name in checkpoint.names() {
        let shape = checkpoint.shape(name).unwrap();
        let mut values = read(&checkpoint, name, &Region::whole(shape)).unwrap();
        let (mut rows, width) = (shape[0], values.len() / shape[0]);
        let (stem, suffix) = name.rsplit_once('.').unwrap();
        let layer = stem.strip_prefix("model.layers.").or(stem.strip_prefix("transformer.h."));
        let (layer, stem) =
            layer.and_then(|rest| rest.split_once('.')).map_or((None, stem), |(at, rest)| (Some(at), rest));
        let part = parts.iter().find(|(from, _)| *from == stem).unwrap_or_else(|| panic!("{name}")).1;
        let heads = match part {
            "attn_q" if model == "llama" => Some(attention.heads),
            "attn_k" if model == "llama" => Some(attention.kv_heads),
            _ => None,
        };
        if let Some(heads) = heads {
            // reshape(heads, 2, half, width).swapaxes(1, 2)
            let half = rows / heads / 2;
            let mut permuted = Vec::new();
            for head in 0..heads {
                for at in 0..half {
                    for which in 0..2 {
                        let row = (head * 2 + which) * half + at;
                        permuted.extend(&values[row * width..(row + 1) * width]);
                    }
                }
            }
            values = permuted;
        }
        let mut dims = vec![rows as u64];
        if shape.len() == 2 {
            dims = vec![width as u64, rows as u64];
        }
        if model == "gpt2" && layer.is_some() && shape.len() == 2 {
            values = (0..width)
                .flat_map(|col| (0..rows).map(move |row| row * width + col))
                .map(|at| values[at])
                .collect();
            dims.reverse();
            rows = width;
        }
        assert_eq!(*dims.last().unwrap(), rows as u64);
        let new = layer.map_or(format!("{part}.{suffix}"), |layer| format!("blk.{layer}.{part}.{suffix}"));
        file = file.tensor(&new, &dims, 0, f32s(&values));
    }
    (checkpoint, config, file)
}

fn logits(source: &dyn WeightSource, config: &DecoderConfig) -> Vec<u32> {
    let model = Decoder::<Replicated, f32, _>::load(&Group::solo(&Cpu::new()), source, config).unwrap();
    let tokens: Vec<u32> = (0..9).map(|at| 3 + at * 61).collect();
    bits(&model.infer(&tokens, Sequences::one(9)).unwrap().local().to_vec().unwrap())
}

/// A converted model has the configuration, the weights and the logits of the original, bit by bit.
#[test]
fn a_converted_model_is_the_original() {
    for model in ["llama", "qwen2", "qwen3", "gpt2"] {
        let (checkpoint, config, file) = converted(model);
        let (_folder, gguf) = open(&file.bytes());
        let gguf = gguf.unwrap();
        for name in checkpoint.names().filter(|_| model != "gpt2") {
            let region = Region::whole(checkpoint.shape(name).unwrap());
            assert_eq!(
                bits(&read(&gguf, name, &region).unwrap()),
                bits(&read(&checkpoint, name, &region).unwrap())
            );
        }
        let ModelConfig::Decoder(found) = ModelConfig::of_gguf(&gguf).unwrap() else { panic!("{model}") };
        let json = if model == "gpt2" { String::new() } else { found.json.clone() };
        let transposed = found.transposed;
        assert!(model != "gpt2" || !transposed);
        let mut want = config.clone();
        (want.json, want.transposed) = (json, transposed);
        assert_eq!(found, want);
        assert_eq!(logits(&gguf, &found), logits(&checkpoint, &config), "{model}");
        if model == "gpt2" {
            let solo = Group::solo(&Cpu::new());
            let decoder = Decoder::<Replicated, f32, _>::load(&solo, &gguf, &found).unwrap();
            let error = decoder.save(tempdir().unwrap().path().join("saved")).unwrap_err().to_string();
            assert!(error.contains("the configuration was not read from a `config.json`"), "{error}");
        }
    }
}

#[test]
fn configurations_are_read_or_refused() {
    let of = |file: &File| {
        let (_folder, gguf) = open(&file.bytes());
        match ModelConfig::of_gguf(&gguf?)? {
            ModelConfig::Decoder(config) => Ok(config),
            _ => panic!("a decoder"),
        }
    };
    let failure = |file: &File| match of(file) {
        Err(Error::Config { reason, .. } | Error::Checkpoint { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    };
    let (_, _, llama) = converted("llama");
    let with = |key: &str, kind: u32, bytes: &[u8]| llama.clone().set(key, kind, bytes);
    for architecture in ["gemma2", "", "mixtral"] {
        let reason = failure(&with("general.architecture", 8, &text(architecture)));
        let known = "is not known; known are llama, qwen2, qwen3, gpt2";
        assert_eq!(reason, format!("the architecture `{architecture}` {known}"));
    }
    for (key, kind, bytes, what) in [
        ("llama.attention.sliding_window", 4, &4096_u32.to_le_bytes()[..], "4096 is not known"),
        ("llama.expert_count", 4, &8_u32.to_le_bytes(), "8 is not known"),
        ("llama.logit_scale", 6, &0.5_f32.to_le_bytes(), "0.5 is not known"),
        ("llama.attention.causal", 7, &[0], "a value other than true"),
        (
            "llama.embedding_scale",
            6,
            &12_f32.to_le_bytes(),
            "12 is not known for a model of type llama: it may change",
        ),
        ("llama.rope.dimension_count", 4, &4_u32.to_le_bytes(), "4 is not known"),
        ("llama.rope.scaling.type", 8, &text("longrope"), "`longrope` is not known"),
        ("llama.attention.value_length", 4, &4_u32.to_le_bytes(), "4 is not known"),
        ("llama.attention.layer_norm_rms_epsilon", 6, &f32::NAN.to_le_bytes(), "is not a finite number"),
        ("llama.block_count", 4, &0_u32.to_le_bytes(), "is 0; it may be from 1 to"),
        ("llama.block_count", 8, &text("two"), "is not an integer"),
        ("general.type", 8, &text("adapter"), "is not `model`"),
    ] {
        let reason = failure(&with(key, kind, bytes));
        assert!(reason.contains(&format!("`{key}`")) && reason.contains(what), "{reason}");
    }
    let list = |numbers: [u32; 2]| {
        let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        with(
            "llama.attention.head_count_kv",
            9,
            &[&4_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &numbers].concat(),
        )
    };
    assert_eq!(of(&list([3, 3])).unwrap().block.attention.kv_heads, 3);
    assert!(failure(&list([3, 9])).contains("differs between layers"));
    let mut missing = llama.clone();
    missing.values.retain(|(key, _)| key != "llama.context_length");
    assert_eq!(failure(&missing), "`llama.context_length` is missing");
    let fine = with("llama.expert_count", 4, &0_u32.to_le_bytes())
        .f32("llama.logit_scale", 1.0)
        .u32("llama.vocab_size", 591);
    assert_eq!(of(&fine).unwrap(), of(&llama).unwrap());

    let scaling = |file: &File| of(file).unwrap().block.attention.rope.unwrap().scaling;
    let llama3 = scaling(&llama);
    assert_eq!(llama3, RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, trained: 16 });
    let linear = |file: File| file.f32("llama.rope.scaling.factor", 2.0);
    assert!(failure(&linear(llama.clone())).contains("scale the rotary frequencies"));
    let divisors = llama.tensors.iter().position(|(name, ..)| name == "rope_freqs.weight").unwrap();
    let divided = |divisors_are: &[f32]| {
        let mut file = llama.clone();
        file.tensors[divisors].3 = f32s(divisors_are);
        file
    };
    assert_eq!(scaling(&divided(&[1.0; 4])), RopeScaling::None);
    assert_eq!(scaling(&linear(divided(&[1.0; 4]))), RopeScaling::Linear { factor: 2.0 });
    for wrong in [[1.0, 1.5, 8.0, 8.0], [f32::NAN; 4], [8.0, 8.0, 8.0, 1.0], [0.0; 4]] {
        assert!(failure(&divided(&wrong)).contains("are not Llama 3's scaling"), "{wrong:?}");
    }

    // A tensor that the architecture does not have prevents loading the model.
    let sinks = llama.clone().tensor("blk.1.attn_sinks.weight", &[9], 0, f32s(&[0.0; 9]));
    let (_folder, gguf) = open(&sinks.bytes());
    let (gguf, config) = (gguf.unwrap(), of(&llama).unwrap());
    let error = Decoder::<Replicated, f32, _>::load(&Group::solo(&Cpu::new()), &gguf, &config).unwrap_err();
    assert!(error.to_string().contains("model.layers.1.attn_sinks.weight"), "{error}");
}

/// The published Llama 3.1 and 3.2 have 64 or 32 pairs, and the factors 8 and 32.
#[test]
fn published_scalings_are_recognized() {
    for (factor, head_dim) in [(8.0, 128_usize), (32.0, 64)] {
        let divisor = |pair: usize| {
            let wavelength = std::f64::consts::TAU * 500000_f64.powf(2.0 * pair as f64 / head_dim as f64);
            let smooth = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        };
        let divisors: Vec<f32> = (0..head_dim / 2).map(divisor).collect();
        assert!(divisors[0] == 1.0 && divisors[head_dim / 2 - 1] == factor as f32);
        let file = File::default()
            .string("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.context_length", 131072)
            .u32("llama.embedding_length", head_dim as u32)
            .u32("llama.feed_forward_length", 64)
            .u32("llama.attention.head_count", 1)
            .f32("llama.rope.freq_base", 500000.0)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .tensor("token_embd.weight", &[head_dim as u64, 1], 0, f32s(&vec![0.0; head_dim]))
            .tensor("rope_freqs.weight", &[head_dim as u64 / 2], 0, f32s(&divisors));
        let (_folder, gguf) = open(&file.bytes());
        let ModelConfig::Decoder(config) = ModelConfig::of_gguf(&gguf.unwrap()).unwrap() else { panic!() };
        let scaling = config.block.attention.rope.unwrap().scaling;
        assert_eq!(scaling, RopeScaling::Llama3 { factor, low: 1.0, high: 4.0, trained: 8192 });
        assert!(config.tied && config.ends.is_empty());
    }
}

/// Returns a source with one matrix, and its transpose under another name.
fn matrix(rows: usize, columns: usize) -> Arrays<f32> {
    let stream = Philox::named(9, "matrix");
    let mut at = 0;
    let whole = ndarray::ArrayD::from_shape_simple_fn(vec![rows, columns], || {
        at += 1;
        (stream.normal(at) * 0.1) as f32
    });
    let mut arrays = Arrays::default();
    arrays.0.insert("transposed".into(), whole.clone().reversed_axes());
    arrays.0.insert("w".into(), whole);
    arrays.0.insert("bias".into(), ndarray::ArrayD::zeros(vec![rows]));
    arrays
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn groups_do_not_depend_on_the_region(
        (rows, columns) in (1..9_usize, 1..200_usize),
        picks in any::<[prop::sample::Index; 4]>(),
        kind in 0..4_usize,
    ) {
        let ends = |a: &prop::sample::Index, b: &prop::sample::Index, size: usize| {
            let (a, b) = (a.index(size + 1), b.index(size + 1));
            a.min(b)..a.max(b)
        };
        let arrays = matrix(rows, columns);
        let format = [Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q8_0][kind];
        let source = Quantization::new(&arrays, format).unwrap();
        let source = if kind == 3 { source.by_row().unwrap() } else { source };
        let whole = Region::whole([rows, columns]);
        let all = blocks(&source, "w", &whole, format).unwrap();
        let region = whole.narrow(0, ends(&picks[0], &picks[1], rows)).narrow(1, ends(&picks[2], &picks[3], columns));
        let grid = Region::whole([rows, columns.div_ceil(32)])
            .narrow(0, region.ranges()[0].clone())
            .narrow(1, format.blocks(region.ranges()[1].clone()));
        let each: Vec<&[u8]> = all.chunks(format.bytes()).collect();
        let want = pick(&each, &grid).concat();
        prop_assert_eq!(&blocks(&source, "w", &region, format).unwrap(), &want);
        // Quantizing a transposed source gives the same blocks.
        let transposed = Transposed::new(&arrays, |name| name == "transposed");
        let source = Quantization::new(&transposed, format).unwrap();
        let source = if kind == 3 { source.by_row().unwrap() } else { source };
        prop_assert_eq!(&blocks(&source, "transposed", &region, format).unwrap(), &want);
    }
}

#[test]
fn quantization_is_that_of_the_rows() {
    let arrays = matrix(5, 70);
    let values: Vec<f32> = arrays.0["w"].iter().copied().collect();
    let whole = Region::whole([5, 70]);
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
        let source = Quantization::new(&arrays, format).unwrap().with_activations(Activations::Exact);
        assert_eq!((source.format("w"), source.format("x")), (Some(format), None));
        assert_eq!((source.activations(), source.names()), (Activations::Exact, arrays.names()));
        let mut want = Vec::new();
        for row in values.chunks(70) {
            for group in row.chunks(32) {
                let mut block = vec![0; format.bytes()];
                let last = group[group.len() - 1];
                let padded: Vec<f32> = group.iter().copied().chain([last; 32]).take(32).collect();
                format.encode(&padded, &mut block).unwrap();
                want.extend(block);
            }
        }
        assert_eq!(blocks(&source, "w", &whole, format).unwrap(), want, "{format}");
        assert_eq!(bits(&read(&source, "w", &whole).unwrap()), bits(&values), "not quantized by `read`");
        let only = source.only(|name| name != "w");
        assert_eq!((only.format("w"), only.format("bias")), (None, Some(format)));
    }
    // One scale for each row, whose largest weight has the code ±127.
    let source = Quantization::new(&arrays, Format::Q8_0).unwrap().by_row().unwrap();
    for (row, blocks) in
        values.chunks(70).zip(blocks(&source, "w", &whole, Format::Q8_0).unwrap().chunks(3 * 34))
    {
        let largest = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let scale = f16::from_f32(largest / 127.0).to_le_bytes();
        assert!(blocks.chunks(34).all(|block| block[..2] == scale));
        let codes: Vec<i8> =
            blocks.chunks(34).flat_map(|block| &block[2..]).map(|code| *code as i8).collect();
        let want = row.iter().chain([&row[69]; 26]).map(|x| (x * (1.0 / (largest / 127.0))).round() as i8);
        assert_eq!(codes, want.collect::<Vec<_>>());
        assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(127));
    }
    // The last group has the range of its own two weights.
    let mut arrays = Arrays::default();
    arrays.0.insert(
        "w".into(),
        ndarray::Array::from_shape_fn([1, 34], |(_, at)| 0.5 + (at % 2) as f64).into_dyn(),
    );
    let source = Quantization::new(&arrays, Format::Q4_1).unwrap();
    let groups = blocks(&source, "w", &Region::whole([1, 34]), Format::Q4_1).unwrap();
    let scales = [f16::from_f32(1.0 / 15.0), f16::from_f32(0.5)].map(f16::to_le_bytes).concat();
    assert!(groups.chunks(20).all(|group| group[..4] == scales[..]), "{groups:?}");
    assert_eq!(groups[24..26], [0xf0, 0xff]);
    assert!(matches!(Quantization::new(&arrays, Format::Q5_1).err(), Some(Error::Unsupported { .. })));
    let by_row = Quantization::new(&arrays, Format::Q4_0).unwrap().by_row().err();
    assert!(matches!(by_row, Some(Error::Unsupported { .. })));
    let mut wrong = matrix(5, 70);
    wrong.0.get_mut("w").unwrap()[[3, 40]] = f32::INFINITY;
    let source = Quantization::new(&wrong, Format::Q4_0).unwrap();
    let error = blocks(&source, "w", &whole, Format::Q4_0).unwrap_err();
    assert_eq!(error.to_string(), "quantize: tensor `w`: row 3: column 40 is inf");
    wrong.0.get_mut("w").unwrap()[[3, 40]] = 1e9;
    let source = Quantization::new(&wrong, Format::Q4_0).unwrap();
    let error = blocks(&source, "w", &whole, Format::Q4_0).unwrap_err().to_string();
    assert_eq!(error, "quantize: tensor `w`: row 3: columns 32 and up are too large for a scale of f16");
    assert!(blocks(&source, "w", &whole.clone().narrow(1, 0..32), Format::Q4_0).is_ok());
    assert!(matches!(source.read_blocks("bias", &Region::whole([5]), &mut []), Err(Error::Invalid { .. })));
    let short = source.read_blocks("w", &whole, &mut [0; 7]).unwrap_err();
    assert!(matches!(short, Error::Sizes { left_size: 270, right_size: 7, .. }), "{short}");
}

#[test]
fn a_transposed_source_has_no_format() {
    let gguf = Gguf::open(data("gguf/tiny.gguf")).unwrap().with_activations(Activations::Exact);
    let (up, gate) = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight");
    let source = Transposed::new(&gguf, |name| name == up);
    assert_eq!((source.format(up), source.format(gate)), (None, Some(Format::Q4_0)));
    assert_eq!(source.activations(), Activations::Exact);
    let whole = Region::whole([256, 64]);
    let want = blocks(&gguf, gate, &whole, Format::Q4_0).unwrap();
    assert_eq!(blocks(&source, gate, &whole, Format::Q4_0).unwrap(), want);
    assert!(blocks(&source, up, &Region::whole([64, 256]), Format::Q5_1).is_err());
    // Reading the matrix as floating-point numbers would ignore that it should stay quantized.
    let error = source.check(up, &Region::whole([64, 256])).unwrap_err().to_string();
    assert!(error.contains(up) && error.contains("quantize a `Transposed` source"), "{error}");
}

/// The source of a tied model that also stores the head.
struct WithHead(Checkpoint);

impl WithHead {
    fn name<'a>(&self, name: &'a str) -> &'a str {
        if name == "lm_head.weight" { "model.embed_tokens.weight" } else { name }
    }
}

impl WeightSource for WithHead {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        self.0.read(self.name(name), role, region, out)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(self.name(name))
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        self.0.check(self.name(name), region)
    }
}

/// The numbers before the quantization are compared: rounded ones differ from the stored head.
#[test]
fn a_tied_model_with_an_equal_head_is_quantized_at_load() {
    let ModelConfig::Decoder(mut config) = ModelConfig::read(data("llama")).unwrap() else { panic!() };
    config.tied = true;
    let source = WithHead(Checkpoint::open(data("llama")).unwrap());
    let quantized = Quantization::new(&source, Format::Q4_1).unwrap();
    let alone = Group::solo(&Cpu::new());
    let model = Decoder::<Replicated, f32, _>::load(&alone, &quantized, &config).unwrap();
    assert!(model.params()[0].is_quantized());
}

/// GPT-2's matrices are transposed before they are quantized. The other way round is refused.
#[test]
fn gpt2_is_quantized_at_load() {
    let ModelConfig::Decoder(mut config) = ModelConfig::read(data("gpt2")).unwrap() else { panic!() };
    let checkpoint = Checkpoint::open(data("gpt2")).unwrap();
    let alone = Group::solo(&Cpu::new());
    let load = |source: &dyn WeightSource, config: &DecoderConfig| {
        let model = Decoder::<Replicated, f32, _>::load(&alone, source, config)?;
        Ok::<_, shardwise::Error>(model.params())
    };
    let source = Quantization::new(&checkpoint, Format::Q8_0).unwrap();
    let error = load(&source, &config).unwrap_err().to_string();
    assert!(error.contains("stored transposed"), "{error}");
    let transposed = Transposed::new(&checkpoint, |name| name.contains(".h."));
    let source = Quantization::new(&transposed, Format::Q8_0).unwrap();
    config.transposed = false;
    let params = load(&source, &config).unwrap();
    for param in params {
        let is_matrix = param.regions()[0].region.shape().dims().len() == 2;
        assert_eq!(param.is_quantized(), is_matrix, "{}", param.name());
    }
}

/// Lengths that a file claims, also of a sparse file, take neither memory nor time.
#[test]
fn lengths_are_limited() {
    let (folder, long) = (tempdir().unwrap(), 1_u64 << 30);
    let refused = |file: File| {
        let path = folder.path().join("sparse.gguf");
        fs::write(&path, file.bytes()).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2 * long).unwrap();
        Gguf::open(&path).unwrap_err().to_string()
    };
    let claims = |kind: u32| [&kind.to_le_bytes()[..], &(long / 8).to_le_bytes()].concat();
    let text = refused(File::default().value("general.architecture", 8, long.to_le_bytes()));
    assert!(text.contains("at most 16777216 are allowed"), "{text}");
    let texts = refused(File::default().value("texts", 9, claims(8)));
    assert!(texts.contains("at most 4194304 are read"), "{texts}");
    let heads = File::default().string("general.architecture", "llama");
    let heads = refused(heads.value("llama.attention.head_count", 9, claims(0)));
    assert!(heads.contains("at most 65536 are read"), "{heads}");
    // A bias in blocks cannot be brought into another order of rows.
    let bias = File::default()
        .string("general.architecture", "llama")
        .u32("llama.attention.head_count", 1)
        .tensor("blk.0.attn_q.bias", &[64], 8, vec![0; 68]);
    assert!(self::refused(&bias.bytes()).contains("its blocks have several rows"));
}

/// A type that cannot be read is found before any tensor is.
#[test]
fn unknown_types_are_refused_by_the_configuration() {
    let (_, _, mut file) = converted("llama");
    file.tensors.last_mut().unwrap().2 = 99;
    let (_folder, gguf) = open(&file.bytes());
    let gguf = gguf.unwrap();
    let error = ModelConfig::of_gguf(&gguf).unwrap_err();
    assert!(matches!(error, Error::TensorElement { .. }), "{error}");
    assert_eq!(gguf.bytes_read(), 0);
}

/// Damaged headers give an error or a file whose tensors and metadata can be looked at. The number
/// of files is that of `SHARDWISE_FUZZ_CASES`, for longer runs.
#[test]
fn mutated_files_do_not_panic() {
    let cases = std::env::var("SHARDWISE_FUZZ_CASES").map_or(3000, |cases| cases.parse().unwrap());
    let (folder, _) = open(&[]);
    let path = folder.path().join("model.gguf");
    let originals = [small().bytes(), fs::read(data("gguf/tiny.gguf")).unwrap()];
    let mut opened = 0;
    for case in 0..cases {
        let mut choices = Choices::new(case, "mutations");
        let mut bytes = originals[choices.below(2)].clone();
        for _ in 0..1 + choices.below(3) {
            let header = bytes.len().min(3600);
            let at = choices.below(header);
            match choices.below(4) {
                0 => bytes[at] ^= 1 << choices.below(8),
                1 => bytes[at] = choices.below(256) as u8,
                2 => {
                    let extreme = [0, 1, u64::MAX, 1 << 63, 1 << 32, bytes.len() as u64][choices.below(6)];
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&extreme.to_le_bytes()[..end - at]);
                }
                _ => _ = bytes.splice(at..(at + choices.below(9)).min(header), vec![7; choices.below(9)]),
            }
        }
        fs::write(&path, &bytes).unwrap();
        let gguf = match Gguf::open(&path) {
            Ok(gguf) => gguf,
            Err(Error::Checkpoint { .. }) => continue,
            Err(other) => panic!("case {case}: {other}"),
        };
        opened += 1;
        for key in gguf.keys() {
            assert!(
                matches!(gguf.get(key), Ok(Some(_)) | Err(Error::Checkpoint { .. })),
                "case {case}: {key}"
            );
        }
        for name in gguf.names() {
            let region = Region::whole(gguf.shape(name).unwrap());
            // A block has at most two weights for each byte.
            if gguf.check(name, &region).is_ok() {
                assert!(region.extent().len() <= 2 * bytes.len(), "case {case}: {name}");
                let all = read(&gguf, name, &region);
                assert!(matches!(all, Ok(_) | Err(Error::Checkpoint { .. })), "case {case}: {name}");
            }
        }
        if let Ok(ModelConfig::Decoder(config)) = ModelConfig::of_gguf(&gguf) {
            assert!(config.vocabulary > 0);
        }
    }
    assert!(opened > cases / 20 && opened < cases, "{opened} of {cases} files were opened");
}
