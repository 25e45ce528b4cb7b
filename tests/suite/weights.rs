//! Checkpoints: reading regions, and rejecting bad files.

use half::{bf16, f16};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    device::{AnyMut, AnyRef, Cpu, DType, Element},
    tensor::{Arrays, Region, Role, WeightSource},
    weights::{self, Checkpoint, Transposed},
};
use std::{fs, io::ErrorKind, ops::Range, path::Path};
use tempfile::{TempDir, tempdir};

/// One read fetches two ranges that are less than this many bytes apart, with the gap between them.
const GAP: usize = 4096;

fn read<T: Element>(source: &dyn WeightSource, name: &str, region: &Region) -> Result<Vec<T>> {
    let mut out = vec![T::NAN; region.extent().len()];
    source.read(name, Role::Weight, region, T::any_mut::<Cpu>(out.as_mut_slice()))?;
    Ok(out)
}

fn view<T: Element>(elements: &[T]) -> AnyRef<'_, Cpu> {
    T::any_ref::<Cpu>(elements)
}

/// Returns the elements of the region, selected one by one.
fn pick<T: Copy>(whole: &[T], region: &Region) -> Vec<T> {
    region.runs().into_iter().flatten().map(|index| whole[index]).collect()
}

fn narrowed(dims: &[usize], ranges: &[Range<usize>]) -> Region {
    ranges
        .iter()
        .enumerate()
        .fold(Region::whole(dims), |region, (dim, range)| region.narrow(dim, range.clone()))
}

/// Returns values that every element type holds exactly.
fn exact<T: Element>(len: usize) -> Vec<T> {
    (0..len).map(|index| T::from_f64((index * 37 % 255) as f64 / 8.0 - 16.0)).collect()
}

/// Returns a random shape and a region of it.
fn regions() -> impl Strategy<Value = Region> {
    prop::collection::vec((0..9_usize, any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..=4)
        .prop_map(|dims| {
            let ranges = dims.iter().map(|(size, a, b)| {
                let (a, b) = (a.index(size + 1), b.index(size + 1));
                a.min(b)..a.max(b)
            });
            let sizes: Vec<_> = dims.iter().map(|(size, ..)| *size).collect();
            narrowed(&sizes, &ranges.collect::<Vec<_>>())
        })
}

fn reads_all<T: Element>(checkpoint: &Checkpoint, region: &Region) {
    let want = pick(&exact::<T>(region.shape().len()), region);
    for name in ["f64", "f32", "bf16", "f16"] {
        assert_eq!(read::<T>(checkpoint, name, region).unwrap(), want, "{name} as {}", T::DTYPE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_region_is_read_in_every_element(region in regions()) {
        let folder = tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let len = region.shape().len();
        let (f64, f32, bf16, f16) = (exact::<f64>(len), exact::<f32>(len), exact::<bf16>(len), exact::<f16>(len));
        let tensors = [
            ("f64", region.shape(), view(&f64)),
            ("f32", region.shape(), view(&f32)),
            ("bf16", region.shape(), view(&bf16)),
            ("f16", region.shape(), view(&f16)),
        ];
        weights::write(&path, tensors).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        reads_all::<f64>(&checkpoint, &region);
        reads_all::<f32>(&checkpoint, &region);
        reads_all::<bf16>(&checkpoint, &region);
        reads_all::<f16>(&checkpoint, &region);
    }

    #[test]
    fn bytes_read_are_the_region_and_small_gaps(
        (rows, cols) in (1..40_usize, 1..6000_usize),
        picks in any::<[prop::sample::Index; 4]>(),
    ) {
        let ends = |a: &prop::sample::Index, b: &prop::sample::Index, size: usize| {
            let (a, b) = (a.index(size + 1), b.index(size + 1));
            a.min(b)..a.max(b)
        };
        let region =
            narrowed(&[rows, cols], &[ends(&picks[0], &picks[1], rows), ends(&picks[2], &picks[3], cols)]);
        let elements: Vec<f32> = (0..rows * cols).map(|index| index as f32).collect();
        let (_folder, checkpoint) = single("w", &[rows, cols], view(&elements));
        assert_eq!(read::<f32>(&checkpoint, "w", &region).unwrap(), pick(&elements, &region));
        let (exact, runs) = (4 * region.extent().len(), region.runs().len());
        let gap = 4 * (cols - region.extent().dims()[1]);
        let gaps = if gap < GAP { runs.saturating_sub(1) * gap } else { 0 };
        prop_assert_eq!(checkpoint.bytes_read() as usize, exact + gaps);
        prop_assert!(gaps <= runs * (GAP - 1));
    }

    #[test]
    fn transposed_matrices_are_read_by_part(region in regions().prop_filter("a matrix", |region| region.shape().rank() == 2)) {
        let &[rows, cols] = region.shape().dims() else { unreachable!() };
        let whole = ndarray::ArrayD::from_shape_vec(vec![rows, cols], exact::<f64>(rows * cols)).unwrap();
        let mut stored = Arrays::default();
        stored.0.insert("conv.weight".into(), whole.clone().reversed_axes());
        stored.0.insert("linear.weight".into(), whole);
        let source = Transposed::new(&stored, |name: &str| name.starts_with("conv."));
        for name in ["conv.weight", "linear.weight"] {
            assert!(source.contains(name));
            assert_eq!(read::<f32>(&source, name, &region).unwrap(), pick(&exact::<f32>(rows * cols), &region), "{name}");
        }
    }
}

/// Returns a checkpoint of one tensor, and its folder.
fn single(name: &str, dims: &[usize], elements: AnyRef<'_, Cpu>) -> (TempDir, Checkpoint) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    weights::write(&path, [(name, dims, elements)]).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

#[test]
fn a_row_range_costs_its_own_bytes_and_a_column_range_its_runs() {
    // The tensor is larger than the buffer between file and tensor, so ranges are read in several
    // steps.
    let elements: Vec<f32> = (0..2048 * 3000).map(|index| index as f32).collect();
    let (_folder, checkpoint) = single("w", &[2048, 3000], view(&elements));
    assert_eq!(checkpoint.bytes_read(), 0, "opening reads no tensor");
    let whole = Region::whole([2048, 3000]);

    let rows = whole.clone().narrow(0, 1..1500);
    assert_eq!(read::<f32>(&checkpoint, "w", &rows).unwrap(), pick(&elements, &rows));
    let row_bytes = 1499 * 3000 * 4;
    assert_eq!(checkpoint.bytes_read(), row_bytes);

    // The ranges are 6000 bytes apart, so the gaps are too long to be read as well.
    let cols = whole.clone().narrow(1, 1500..3000);
    assert_eq!(read::<f32>(&checkpoint, "w", &cols).unwrap(), pick(&elements, &cols));
    let col_bytes = 2048 * 1500 * 4;
    assert_eq!(checkpoint.bytes_read(), row_bytes + col_bytes);

    // The ranges are 4000 bytes apart, so the gaps are read as well, except after the last row.
    let cols = whole.clone().narrow(1, 500..2500);
    assert_eq!(read::<f32>(&checkpoint, "w", &cols).unwrap(), pick(&elements, &cols));
    let gaps = checkpoint.bytes_read() - row_bytes - col_bytes - 2048 * 2000 * 4;
    assert!(gaps > 0 && gaps <= 2047 * 4000);
}

#[test]
fn narrowing_rounds_once_and_the_same_element_keeps_its_bits() {
    // The first value lies just above the midpoint of 1 and the next f32, so it rounds up.
    let (_folder, checkpoint) = single("w", &[2], view(&[1.0 + 2_f64.powi(-24) + 2_f64.powi(-50), 0.1]));
    assert_eq!(read::<f32>(&checkpoint, "w", &Region::whole([2])).unwrap(), [1.0 + f32::EPSILON, 0.1]);
    assert_eq!(read::<bf16>(&checkpoint, "w", &Region::whole([2])).unwrap(), [1.0, 0.1].map(bf16::from_f64));
    let bits = [0x7fc1, 0x7f81, 0x8000, 0x0001].map(bf16::from_bits);
    let (_folder, checkpoint) = single("w", &[4], view(&bits));
    let back = read::<bf16>(&checkpoint, "w", &Region::whole([4])).unwrap();
    assert_eq!(
        back.iter().map(|value| value.to_bits()).collect::<Vec<_>>(),
        [0x7fc1, 0x7f81, 0x8000, 0x0001]
    );
}

#[test]
fn threads_share_a_checkpoint() {
    let elements = exact::<f32>(64 * 32);
    let (_folder, checkpoint) = single("w", &[64, 32], view(&elements));
    std::thread::scope(|scope| {
        for rank in 0..4 {
            let (checkpoint, elements) = (&checkpoint, &elements);
            scope.spawn(move || {
                let region = Region::whole([64, 32]).narrow(0, rank * 16..(rank + 1) * 16);
                assert_eq!(read::<f32>(checkpoint, "w", &region).unwrap(), pick(elements, &region));
            });
        }
    });
    assert_eq!(checkpoint.bytes_read(), 64 * 32 * 4, "each byte once");
}

/// Returns a folder with two files and an index over them.
fn sharded(weight_map: &str) -> TempDir {
    let folder = tempdir().unwrap();
    let write = |file: &str, name: &str, elements: &[f32]| {
        weights::write(folder.path().join(file), [(name, [elements.len()], view(elements))]).unwrap();
    };
    write("model-00001-of-00002.safetensors", "a.weight", &[1.0, 2.0]);
    write("model-00002-of-00002.safetensors", "b.weight", &[3.0]);
    let index = format!(r#"{{"metadata":{{"total_size":12}},"weight_map":{weight_map}}}"#);
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn an_index_joins_files() {
    let folder = sharded(
        r#"{"b.weight":"model-00002-of-00002.safetensors","a.weight":"model-00001-of-00002.safetensors"}"#,
    );
    for path in [folder.path().into(), folder.path().join("model.safetensors.index.json")] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.weight", "b.weight"]);
        assert_eq!(read::<f64>(&checkpoint, "a.weight", &Region::whole([2])).unwrap(), [1.0, 2.0]);
        assert_eq!(read::<f64>(&checkpoint, "b.weight", &Region::whole([1])).unwrap(), [3.0]);
        assert!(checkpoint.contains("a.weight") && !checkpoint.contains("c.weight"));
        assert!(
            checkpoint.shape("a.weight").unwrap() == [2]
                && checkpoint.dtype("b.weight").unwrap() == DType::F32
        );
    }
}

/// Returns the error's text, without the name of the folder.
fn text(error: Error, folder: &Path) -> String {
    error.to_string().replace(&format!("{}/", folder.display()), "")
}

#[test]
fn an_index_that_lies_is_refused() {
    let long = format!(r#"{{"a":"{}"}}"#, "x".repeat(5000));
    for (weight_map, expected) in [
        (
            r#"{"a.weight":"gone.safetensors"}"#,
            "gone.safetensors: No such file or directory (os error 2), but model.safetensors.index.json names this file",
        ),
        (
            r#"{"a.bias":"model-00001-of-00002.safetensors"}"#,
            "tensor `a.bias` is not in model-00001-of-00002.safetensors, where model.safetensors.index.json says it is",
        ),
        (
            r#"{"b.weight":"model-00001-of-00002.safetensors"}"#,
            "tensor `b.weight` is not in model-00001-of-00002.safetensors, where model.safetensors.index.json says it is; did you mean `a.weight`?",
        ),
        (
            r#"{"a":"../x.safetensors"}"#,
            "index: tensor `a` is mapped to `../x.safetensors`, which is not a path below the index's folder",
        ),
        (
            r#"{"a":"/etc/passwd"}"#,
            "index: tensor `a` is mapped to `/etc/passwd`, which is not a path below the index's folder",
        ),
        (r#"{"a":""}"#, "index: tensor `a` is mapped to ``, which is not a path below the index's folder"),
        (r#"{"a\u001b":".."}"#, r"index: tensor `a\u{1b}` is mapped to `..`, which"),
        (
            r#"{"a":"model.safetensors.index.json"}"#,
            "model.safetensors.index.json: bad checkpoint: the header length is",
        ),
        (r#"{"a":"."}"#, "not a path below the index's folder"),
        (
            r#"{"a.weight":"model-00001-of-00002.safetensors","b.weight":"./model-00002-of-00002.safetensors"}"#,
            "index: tensor `b.weight` is mapped to `./model-00002-of-00002.safetensors`, which has to be written \
             `model-00002-of-00002.safetensors`",
        ),
        (r#"{"a":"s//x"}"#, "index: tensor `a` is mapped to `s//x`, which has to be written `s/x`"),
        (r#"{"a":"s/./x"}"#, "index: tensor `a` is mapped to `s/./x`, which has to be written `s/x`"),
        (r#"{"a":"s/x/"}"#, "index: tensor `a` is mapped to `s/x/`, which has to be written `s/x`"),
        (r#"{"a":"x\u0000y"}"#, "file name contained an unexpected NUL byte"),
        (
            r#"{"a.weight":"model-00001-of-00002.safetensors","a.weight":"model-00001-of-00002.safetensors"}"#,
            "index: the key `a.weight` occurs twice",
        ),
        (r#"{},"weight_map":{}"#, "index: the key `weight_map` occurs twice"),
        (r#"{"a":1}"#, "index: the file of tensor `a`: invalid type: integer `1`, expected a string"),
        (r#"{"a":"b""#, "expected"),
        (r#"[]"#, "index: expected `{`, found `[`"),
        (&long, "index: the file of tensor `a`: longer than 4096 bytes"),
    ] {
        let folder = sharded(weight_map);
        let error = text(Checkpoint::open(folder.path()).unwrap_err(), folder.path());
        assert!(error.contains(expected), "{weight_map}: {error}");
    }
    let folder = sharded("{}");
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, "{}").unwrap();
    assert!(Checkpoint::open(&index).unwrap_err().to_string().contains("index: it has no `weight_map`"));
    fs::write(&index, r#"{"a":[[[[1]]]], "weight_map":{}}"#).unwrap();
    assert_eq!(Checkpoint::open(&index).unwrap().names().len(), 0);
    fs::File::create(&index).unwrap().set_len(33_000_000).unwrap();
    assert!(Checkpoint::open(&index).unwrap_err().to_string().contains("at most 32000000 are read"));
}

/// Returns a folder with `links` hard links to one file. The index places a different tensor in
/// each link.
fn linked(header: &str, links: usize) -> TempDir {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("0"), file(header, 0)).unwrap();
    let link =
        |at: usize| fs::hard_link(folder.path().join("0"), folder.path().join(at.to_string())).unwrap();
    (1..links).for_each(link);
    let places: Vec<_> = (0..links).map(|at| format!(r#""t{at}":"{at}""#)).collect();
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, places.join(","));
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

/// Returns the header entries of `count` empty tensors.
fn empty_tensors(count: usize) -> String {
    let entry = |at| format!(r#""t{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    (0..count).map(entry).collect::<Vec<_>>().join(",")
}

#[test]
fn the_headers_of_a_folder_have_one_limit() {
    let text = "x".repeat(9_000_000);
    let header = format!(r#"{{"__metadata__":{{"text":"{text}"}},{}}}"#, empty_tensors(12));
    let names = |links| Checkpoint::open(linked(&header, links).path()).map(|opened| opened.names().len());
    assert_eq!(names(11).unwrap(), 11);
    let before = 11 * header.len();
    let error = names(12).unwrap_err().to_string();
    let expected = format!(
        "/11: bad checkpoint: the header has {} bytes and the headers before it {before}, but at most 100000000 are read together",
        header.len()
    );
    assert!(error.ends_with(&expected), "{error}");
}

/// The test runs in its own process, so that no other test allocates memory in it.
#[cfg(target_os = "linux")]
#[test]
fn what_an_index_does_not_name_takes_no_memory() {
    const CHILD: &str = "SHARDWISE_TEST_OPENS";
    if let Ok(folder) = std::env::var(CHILD) {
        let peak = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
        };
        let before = peak();
        assert_eq!(Checkpoint::open(folder).unwrap().names().len(), 60);
        println!("grown by {} kB", peak() - before);
        return;
    }
    let folder = linked(&format!("{{{}}}", empty_tensors(20_000)), 60);
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "weights::what_an_index_does_not_name_takes_no_memory", "--nocapture"])
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let grown = text.lines().find_map(|line| line.split_once("grown by ")).map(|(_, rest)| rest);
    let grown = grown.and_then(|rest| rest.strip_suffix(" kB")).unwrap_or_else(|| panic!("{text}"));
    // Each of the 60 headers has 1.2 MB. Keeping all their entries in memory would take 170 MB.
    assert!(grown.parse::<usize>().unwrap() < 30_000, "grown by {grown} kB");
}

/// Returns a file with this header and `data` bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.resize(file.len() + data, 0);
    file
}

/// Returns a header of one F32 tensor.
fn one(shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn a_file_that_lies_is_refused() {
    let two = |a: &str, b: &str| {
        let info = |offsets: &str| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}"#);
        format!(r#"{{"a":{},"b":{}}}"#, info(a), info(b))
    };
    let good = one("[2]", "[0,8]");
    let said = |len: u64, file: &[u8]| [&len.to_le_bytes()[..], file].concat();
    let table: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "0 bytes are too few for a safetensors file"),
        (vec![1; 7], "7 bytes are too few"),
        (said(1, b""), "the header length is 1 bytes, but 0 bytes follow, and the format allows 100000000"),
        (said(u64::MAX, b"{}"), "the header length is 18446744073709551615 bytes, but 2 bytes follow"),
        (said(0, b""), "header: expected `{`, found the end"),
        (file("{", 0), "header: a key: expected a value, found the end"),
        (file("[]", 0), "header: expected `{`, found `[`"),
        (file("{}x", 0), "header: there is more text after the closing brace, at byte 2"),
        (file("{\"\u{1b}\":", 0), "header: a key: control character"),
        (said(3, b"\"\xff\""), "header: expected `{`, found `\\\"`"),
        (said(5, b"{\"\xff\""), "the header length is 5 bytes, but 4 bytes follow"),
        (said(4, b"{\"\xff\""), "header: a key: invalid unicode code point"),
        // The first file is truncated, and the others have more data than their tensors.
        (file(&good, 7), "the tensors have 8 bytes of data, but the file has 7"),
        (file(&good, 9), "the tensors have 8 bytes of data, but the file has 9"),
        (file("{}", 1), "the tensors have 0 bytes of data, but the file has 1"),
        // Offsets.
        (file(&one("[2]", "[8,0]"), 8), "tensor `w`: offsets 8..0, but shape [2] of F32 takes 8 bytes"),
        (file(&one("[2]", "[0,4]"), 4), "tensor `w`: offsets 0..4, but shape [2] of F32 takes 8 bytes"),
        (
            file(&one("[2]", "[4,12]"), 12),
            "tensor `w`: its data begin at byte 4, but the previous data end at byte 0",
        ),
        (file(&one("[2]", "[0,8,9]"), 8), "tensor `w`: trailing characters"),
        (file(&one("[2]", "[-8,0]"), 8), "tensor `w`: invalid value: integer `-8`, expected usize"),
        (file(&one("[2]", "[0,8.0]"), 8), "tensor `w`: invalid type: floating point `8.0`, expected usize"),
        (
            file(&one("[2]", "[18446744073709551608,18446744073709551616]"), 8),
            "tensor `w`: invalid type: floating point",
        ),
        (
            file(&one("[2]", "[18446744073709551607,18446744073709551615]"), 8),
            "tensor `w`: its data begin at byte 18446744073709551607",
        ),
        (
            file(&two("[0,8]", "[0,8]"), 8),
            "tensor `b`: its data begin at byte 0, but the previous data end at byte 8",
        ),
        (
            file(&two("[0,8]", "[4,12]"), 12),
            "tensor `b`: its data begin at byte 4, but the previous data end at byte 8",
        ),
        (
            file(&two("[12,20]", "[0,8]"), 20),
            "tensor `a`: its data begin at byte 12, but the previous data end at byte 8",
        ),
        // Shapes.
        (
            file(&one("[4294967296,4294967296]", "[0,8]"), 8),
            "tensor `w`: shape [4294967296, 4294967296] of F32 is not a whole number of bytes, or overflows",
        ),
        (file(&one("[0,4294967296,4294967296]", "[0,0]"), 0), "is not a whole number of bytes, or overflows"),
        (file(&one("[2305843009213693952]", "[0,0]"), 0), "is not a whole number of bytes, or overflows"),
        (file(&one("[18446744073709551616]", "[0,8]"), 8), "tensor `w`: invalid type: floating point"),
        (file(&one("[-2]", "[0,8]"), 8), "tensor `w`: invalid value: integer `-2`, expected usize"),
        (file(&one(&format!("[{}2]", "1,".repeat(64)), "[0,8]"), 8), "tensor `w`: 65 dimensions exceed 64"),
        (file(&one(&format!("[{}2]", "1,".repeat(3000)), "[0,8]"), 8), "tensor `w`: longer than 4096 bytes"),
        (file(&one("[3]", "[0,2]").replace("F32", "F4"), 2), "is not a whole number of bytes, or overflows"),
        // Keys.
        (file(&two("[0,8]", "[8,16]").replace("\"b\"", "\"a\""), 16), "header: the key `a` occurs twice"),
        (
            file(&two("[0,8]", "[8,16]").replace("\"b\"", "\"\\u0061\""), 16),
            "header: the key `a` occurs twice",
        ),
        (
            file(&good.replace("\"shape\"", "\"dtype\":\"F32\",\"shape\""), 8),
            "tensor `w`: duplicate field `dtype`",
        ),
        (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "header: the key `__metadata__` occurs twice"),
        (file(r#"{"__metadata__":{"a":1}}"#, 0), "header: invalid type: integer `1`, expected a string"),
        (file(&good.replace("\"dtype\":\"F32\",", ""), 8), "tensor `w`: missing field `dtype`"),
        (file(&good.replace("F32", "F31"), 8), "tensor `w`: unknown variant `F31`"),
        (
            file(&good.replace("\"w\"", &format!("\"{}\"", "w".repeat(5000))), 8),
            "header: a key: longer than 4096 bytes",
        ),
        (file(r#"{"w":null}"#, 0), "tensor `w`: invalid type: null"),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for (bytes, expected) in table {
        fs::write(&path, &bytes).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(&error, Error::Checkpoint { path: named, .. } if *named == path), "{error:?}");
        assert!(error.to_string().contains(expected), "expected {expected}, found {error}");
    }
    // The header is longer than the format allows, and the file is long enough to contain it. The
    // header is rejected without being read.
    let large = fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut &large, &100_000_001_u64.to_le_bytes()).unwrap();
    large.set_len(200_000_000).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("the format allows 100000000"));
}

#[test]
fn unusual_files_are_accepted() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("any name");
    let header = r#"{ "z":{"shape":[0,3],"data_offsets":[8,8],"dtype":"F64","other":[1]},
        "__metadata__":{"format":"pt"}, "s":{"dtype":"F32","shape":[],"data_offsets":[8,12]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},
        "deep":{"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[12,16]} }    "#;
    fs::write(&path, file(header, 16)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["deep", "ids", "s", "z"]);
    assert_eq!(read::<f32>(&checkpoint, "z", &Region::whole([0, 3])).unwrap(), [0.0; 0]);
    assert_eq!(read::<f32>(&checkpoint, "s", &Region::whole([])).unwrap(), [0.0]);
    assert_eq!(checkpoint.shape("deep").unwrap(), [1; 5]);
}

#[test]
fn a_read_that_cannot_be_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let header = r#"{"ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},
        "deep":{"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[8,12]},
        "layer.0.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[12,20]}}"#;
    fs::write(&path, file(header, 20)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let fails = |name: &str, shape: &[usize]| {
        text(read::<f32>(&checkpoint, name, &Region::whole(shape)).unwrap_err(), folder.path())
    };
    assert_eq!(
        fails("ids", &[1]),
        "tensor `ids` has elements I64 in m.safetensors; f64, f32, bf16 or f16 can be read, and from GGUF also \
         Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K"
    );
    assert_eq!(
        fails("deep", &[1]),
        "tensor `deep` has shape [1, 1, 1, 1, 1] in m.safetensors, but the layer needs [1]"
    );
    assert_eq!(
        fails("layer.0.weight", &[2, 1]),
        "tensor `layer.0.weight` has shape [1, 2] in m.safetensors, but the layer needs [2, 1]"
    );
    assert_eq!(fails("layer.1.weight", &[1, 2]), "tensor `layer.1.weight` is not in m.safetensors");
    assert_eq!(text(checkpoint.dtype("ids").unwrap_err(), folder.path()), fails("ids", &[1]));
    assert!(matches!(checkpoint.shape("none"), Err(Error::MissingTensor { .. })));
    let short = checkpoint.read(
        "layer.0.weight",
        Role::Weight,
        &Region::whole([1, 2]),
        AnyMut::F32([0.0; 3].as_mut_slice()),
    );
    assert_eq!(
        short.unwrap_err().to_string(),
        "weights: the elements of the region is 2, but the elements to fill is 3"
    );
    assert_eq!(checkpoint.bytes_read(), 0);
    // The file shrinks after its header was checked.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert!(matches!(
        read::<f32>(&checkpoint, "layer.0.weight", &Region::whole([1, 2])),
        Err(Error::Io { .. })
    ));
}

#[test]
fn a_path_that_is_no_checkpoint_is_refused() {
    let folder = tempdir().unwrap();
    let fails = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(fails(folder.path()).contains("the folder has neither model.safetensors nor"));
    assert!(fails(&folder.path().join("x.safetensors")).contains("No such file"));
    assert!(fails(&folder.path().join("x.json")).contains("No such file"));
    #[cfg(unix)]
    assert_eq!(fails(Path::new("/dev/zero")), "/dev/zero: not a regular file");
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert!(fails(folder.path()).contains("not a regular file"));
}

#[test]
fn a_missing_file_is_distinguished_from_one_that_may_not_be_read() {
    let folder = tempdir().unwrap();
    let kind = |path: &str| match Checkpoint::open(folder.path().join(path)).map(drop) {
        Err(Error::Io { kind, .. }) => kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind("x.safetensors"), ErrorKind::NotFound);
    assert_eq!(kind("x.json"), ErrorKind::NotFound);
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(kind(""), ErrorKind::InvalidInput);
}

#[test]
fn writing_refuses_what_could_not_be_read() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let fails = |tensors: &[(&str, [usize; 1])]| {
        let tensors = tensors.iter().map(|&(name, shape)| (name, shape, view::<f32>(&[1.0, 2.0])));
        weights::write(&path, tensors).unwrap_err().to_string()
    };
    assert_eq!(
        fails(&[("a", [3])]),
        "write weights: the elements of `a` is 2, but the elements of its shape is 3"
    );
    assert_eq!(fails(&[("a", [2]), ("a", [2])]), "write weights: the name `a` occurs twice or is reserved");
    assert_eq!(
        fails(&[("__metadata__", [2])]),
        "write weights: the name `__metadata__` occurs twice or is reserved"
    );
    assert!(!path.exists());
    let nowhere = folder.path().join("none/m.safetensors");
    let error = weights::write(&nowhere, [("a", [1], view::<f32>(&[1.0]))]).unwrap_err();
    assert!(matches!(error, Error::Io { path, .. } if path == nowhere));
}

#[test]
fn free_text_of_headers_and_indices_may_be_absent_or_long() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let header = r#"{"__metadata__": null, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes().chain([0; 4]));
    fs::write(&file, bytes).unwrap();
    assert!(Checkpoint::open(&file).unwrap().names().eq(["w"]));
    let recipe = "x".repeat(5000);
    let index =
        format!(r#"{{"metadata": {{"recipe": "{recipe}"}}, "weight_map": {{"w": "model.safetensors"}}}}"#);
    let at = folder.path().join("model.safetensors.index.json");
    fs::write(&at, index).unwrap();
    assert!(Checkpoint::open(&at).unwrap().names().eq(["w"]));
}

#[test]
fn what_is_no_checkpoint_is_called_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &Path| {
        let error = Checkpoint::open(path).map(|_| ()).unwrap_err().to_string();
        error.replace(folder.path().to_str().unwrap(), "DIR")
    };
    let of = |name: &str, bytes: &[u8]| {
        fs::write(folder.path().join(name), bytes).unwrap();
        open(&folder.path().join(name))
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 268435456\n";
    for (name, bytes, what) in [
        (
            "a.safetensors",
            &pointer[..],
            "this is a Git LFS pointer, not the file itself: `git lfs pull` fetches the file",
        ),
        ("b.safetensors", b"<!DOCTYPE html><html><head>", "this is a web page, not the file"),
        ("c.gguf", b"GGUF\x03\0\0\0\x22\x01\0\0", "this is a GGUF file, which `weights::Gguf` reads"),
        (
            "d.bin",
            b"PK\x03\x04\x14\0\x08\x08\0\0",
            "this is a PyTorch or zip file; only safetensors can be read",
        ),
        (
            "e.bin",
            b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9",
            "this is a Python pickle; only safetensors can be read",
        ),
    ] {
        assert_eq!(of(name, bytes), format!("DIR/{name}: bad checkpoint: {what}"));
        fs::remove_file(folder.path().join(name)).unwrap();
    }
    let config = of("config.json", br#"{"model_type": "llama", "vocab_size": 7}"#);
    assert_eq!(
        config,
        "DIR/config.json: bad checkpoint: index: it has no `weight_map`: this is a model's configuration; open the \
         checkpoint by its folder"
    );
    let neither =
        "DIR: bad checkpoint: the folder has neither model.safetensors nor model.safetensors.index.json";
    assert_eq!(open(folder.path()), neither);
    fs::write(folder.path().join("adapter_model.safetensors"), b"").unwrap();
    assert_eq!(
        open(folder.path()),
        format!("{neither}; it has adapter_model.safetensors, which can be opened by its own path")
    );
    fs::write(folder.path().join("pytorch_model.bin"), b"").unwrap();
    assert_eq!(
        open(folder.path()),
        format!("{neither}; it has pytorch_model.bin, which has to be converted to safetensors first")
    );
}

/// The hint for a missing tensor suggests only names in the same layer.
#[test]
fn a_hint_stays_in_the_layer() {
    let mut arrays = Arrays::<f64>::default();
    for name in ["layers.0.q_proj.weight", "layers.1.o_proj.weight", "layers.10.q_proj.weight"] {
        arrays.0.insert(name.into(), ndarray::ArrayD::zeros(vec![1]));
    }
    let hint = |name: &str| match arrays.check(name, &Region::whole([1])) {
        Err(Error::MissingTensor { hint, .. }) => hint,
        other => panic!("{other:?}"),
    };
    assert_eq!(hint("layers.1.q_proj.weight"), "; did you mean `layers.1.o_proj.weight`?");
    assert_eq!(hint("layers.2.q_proj.weight"), "");
    assert_eq!(hint("model.layers.10.q_proj.weight"), "; did you mean `layers.10.q_proj.weight`?");
}
