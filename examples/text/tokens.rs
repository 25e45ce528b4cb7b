//! Tokenizers of converted checkpoints and of GGUF files give the tokens that llama2.c and
//! llama.cpp give.

use checkpoint::{GgufTokenizer, Splitting, TokenType};
use serde_json::Value;
use shardwise::weights::Gguf;
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};
use tokenizers::Tokenizer;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Prints past libtest, which hides what a passing test prints.
fn not_run(reason: &str) {
    std::io::stderr().write_all(format!("\nNOT RUN: {reason}\n").as_bytes()).unwrap();
}

/// The licence of llama2.c's model is unknown, so the model is not part of the project. Tests do
/// nothing if `../shared/data` does not have it.
fn stories() -> Option<(PathBuf, Vec<u32>, String)> {
    let data = root().join("../shared/data");
    if !data.join("stories260K.bin").exists() {
        not_run("../shared/data/stories260K.bin is not there");
        return None;
    }
    let reference = json(&data.join("stories260k_reference.json"));
    Some((
        data,
        serde_json::from_value(reference["ids"].clone()).unwrap(),
        reference["text"].as_str().unwrap().into(),
    ))
}

fn check_story(tokenizer: &Tokenizer, want: &[u32], text: &str) {
    assert_eq!(tokenizer.decode(want, true).unwrap(), text);
    let prompt = tokenizer.encode("Once upon a time, there was a little girl", true).unwrap();
    assert!(prompt.get_ids().len() > 8);
    assert_eq!(prompt.get_ids(), &want[..prompt.get_ids().len()]);
}

#[test]
fn stories_have_the_tokens_of_llama2c() {
    let Some((data, want, text)) = stories() else { return };
    let (target, script) = (tempfile::tempdir().unwrap(), root().join("scripts/convert_llama2c.py"));
    let converted = Command::new("python3")
        .arg(script)
        .args([data.join("stories260K.bin"), data.join("tok512.bin"), target.path().into()])
        .output();
    let Ok(converted) = converted else { return not_run("python3 is not there") };
    assert!(converted.status.success(), "{converted:?}");
    let tokenizer = Tokenizer::from_file(target.path().join("tokenizer.json")).unwrap();
    check_story(&tokenizer, &want, &text);
}

/// The same vocabulary as a GGUF file has it: with scores instead of merges.
#[test]
fn pieces_of_stories_have_the_tokens_of_llama2c() {
    let Some((data, want, text)) = stories() else { return };
    // The longest length, then of each token the score, the length and the bytes.
    let file = std::fs::read(data.join("tok512.bin")).unwrap();
    let word = |at: usize| <[u8; 4]>::try_from(&file[at..at + 4]).unwrap();
    let (mut tokens, mut scores, mut at) = (Vec::new(), Vec::new(), 4);
    while at < file.len() {
        let length = u32::from_le_bytes(word(at + 4)) as usize;
        scores.push(f32::from_le_bytes(word(at)));
        let text = std::str::from_utf8(&file[at + 8..at + 8 + length]).unwrap();
        tokens.push(text.replace(' ', "▁"));
        at += 8 + length;
    }
    for (id, name) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        tokens[id] = name.into();
    }
    let kind = |id: usize| match id {
        0 => TokenType::Unknown,
        1 | 2 => TokenType::Control,
        3..259 => TokenType::Byte,
        _ => TokenType::Normal,
    };
    let types = (0..tokens.len()).map(kind).collect();
    let splitting = Splitting::Pieces { scores, space: true };
    let tokenizer = GgufTokenizer { tokens, types, splitting, begin: Some(1), end: None };
    check_story(&tokenizer.build().unwrap(), &want, &text);
}

/// What `scripts/peers/llama_cpp.py tokens` has printed.
fn llama_cpp() -> Value {
    json(&root().join("examples/text/data/gguf_tokens.json"))
}

/// Checks the tokens of a case, and its text if tokens of all its bytes exist and none is special.
fn check(tokenizer: &Tokenizer, case: &Value) {
    let (text, want): (_, Vec<u32>) =
        (case["text"].as_str().unwrap(), serde_json::from_value(case["tokens"].clone()).unwrap());
    let got = tokenizer.encode(text, true).unwrap();
    assert_eq!(got.get_ids(), want, "{case}");
    if !text.contains("<") && !text.contains('\u{4}') {
        assert_eq!(tokenizer.decode(got.get_ids(), true).unwrap(), text);
    }
}

#[test]
fn smollm2_has_the_tokens_of_llama_cpp() {
    let path = root().join("target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        return not_run("target/smollm2 is not there: scripts/fetch_model.sh smollm2 fetches it");
    }
    let gguf = Gguf::open(path).unwrap();
    let mut tokenizer = GgufTokenizer::read(&gguf).unwrap();
    let Splitting::ByteLevel { pre, merges } = tokenizer.splitting.clone() else { panic!("not byte-level") };
    assert_eq!(pre, "smollm");
    let reference = llama_cpp();
    let cases = reference["byte_level"].as_array().unwrap();
    // The file's own pre-tokenizer, and the same vocabulary with the others.
    for pre in ["smollm", "default", "gpt-2", "llama-bpe", "qwen2"] {
        tokenizer.splitting = Splitting::ByteLevel { pre: pre.into(), merges: merges.clone() };
        let built = tokenizer.build().unwrap();
        let cases: Vec<_> = cases.iter().filter(|case| case["pre"] == pre).collect();
        assert!(cases.len() > 10);
        cases.into_iter().for_each(|case| check(&built, case));
    }
}

/// Writes a GGUF file without tensors, whose metadata are these keys, types and bytes.
fn gguf(entries: &[(&str, u32, Vec<u8>)]) -> Gguf {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    let mut bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
    bytes.extend((entries.len() as u64 + 1).to_le_bytes());
    for (key, kind, value) in [("general.architecture", 8, text("llama"))].iter().chain(entries) {
        bytes.extend([text(key), kind.to_le_bytes().to_vec(), value.clone()].concat());
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path()).unwrap()
}

/// A string of a GGUF file.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// An array of a GGUF file.
fn array(kind: u32, entries: &[Vec<u8>]) -> Vec<u8> {
    let count = (entries.len() as u64).to_le_bytes();
    [kind.to_le_bytes().as_slice(), &count, &entries.concat()].concat()
}

#[test]
fn keys_that_are_absent_or_wrong_are_named() {
    let refused = |entries: &[(&str, u32, Vec<u8>)], want: &str| {
        let reason = GgufTokenizer::read(&gguf(entries)).unwrap_err();
        assert!(reason.contains(want), "{reason}: {want}");
    };
    refused(&[], "the key `tokenizer.ggml.model` is absent");
    let model = |name: &str| ("tokenizer.ggml.model", 8, text(name));
    refused(&[("tokenizer.ggml.model", 4, 7u32.to_le_bytes().to_vec())], "model is not a string");
    refused(&[model("rwkv")], "`rwkv` is not known");
    refused(&[model("gpt2")], "`tokenizer.ggml.merges` is absent");
    refused(&[model("llama")], "`tokenizer.ggml.scores` is absent");
    let merges = ("tokenizer.ggml.merges", 9, array(8, &[text("a b")]));
    refused(&[model("gpt2"), merges.clone()], "`tokenizer.ggml.tokens` is absent");
    let tokens = ("tokenizer.ggml.tokens", 9, array(8, &[text("a"), text("b"), text("ab")]));
    let kinds = |last: u32| {
        let entries = [1, 3, last].map(|kind| kind.to_le_bytes().to_vec());
        ("tokenizer.ggml.token_type", 9, array(5, &entries))
    };
    let small = [model("gpt2"), merges, tokens];
    let with = |more: &[(&'static str, u32, Vec<u8>)]| [&small, more].concat();
    refused(&with(&[kinds(9)]), "token_type: the entry 2");
    let begins = |flag: bool| ("tokenizer.ggml.add_bos_token", 7, vec![flag.into()]);
    refused(&with(&[kinds(1), begins(true)]), "`tokenizer.ggml.bos_token_id` is absent");

    let read = GgufTokenizer::read(&gguf(&with(&[kinds(1)]))).unwrap();
    let want = GgufTokenizer {
        tokens: ["a", "b", "ab"].map(String::from).into(),
        types: vec![TokenType::Normal, TokenType::Control, TokenType::Normal],
        splitting: Splitting::ByteLevel { pre: "default".into(), merges: vec!["a b".into()] },
        begin: None,
        end: None,
    };
    assert_eq!(read, want);
    // A text of Llama 3 begins with a token of its own, unless the file says otherwise.
    let pre = ("tokenizer.ggml.pre", 8, text("llama-bpe"));
    let id = ("tokenizer.ggml.bos_token_id", 4, 1u32.to_le_bytes().to_vec());
    let read = |more: &[_]| GgufTokenizer::read(&gguf(&with(more))).unwrap().begin;
    assert_eq!(read(&[kinds(1), pre.clone(), id.clone()]), Some(1));
    assert_eq!(read(&[kinds(1), pre, id.clone(), begins(false)]), None);
    assert_eq!(read(&[kinds(1), id, begins(true)]), Some(1));
}

/// Numbers, which SmolLM2's vocabulary does not have as tokens, and a word that is a token without
/// a merge. The expected tokens follow from the expressions by hand.
#[test]
fn numbers_are_split_as_the_pre_tokenizer_says() {
    let tokens = ["1", "2", "3", "4", "12", "123", "1234", "x", "y", "xy"].map(String::from);
    for (pre, want) in [
        ("default", [&[5, 3][..], &[7, 8]]),
        ("gpt-2", [&[6], &[7, 8]]),
        ("llama-bpe", [&[5, 3], &[9]]),
        ("qwen2", [&[0, 1, 2, 3], &[7, 8]]),
        ("smollm", [&[0, 1, 2, 3], &[7, 8]]),
    ] {
        let merges = ["1 2", "12 3", "123 4"].map(String::from).into();
        let tokenizer = GgufTokenizer {
            tokens: tokens.clone().into(),
            types: vec![TokenType::Normal; tokens.len()],
            splitting: Splitting::ByteLevel { pre: pre.into(), merges },
            begin: None,
            end: None,
        };
        let tokenizer = tokenizer.build().unwrap();
        let ids = |text| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!([ids("1234"), ids("xy")], want, "{pre}");
    }
}

/// A vocabulary of SentencePiece with bytes, unknown, begin and end, and one user-defined token.
fn pieces(space: bool) -> GgufTokenizer {
    let vocabulary = &llama_cpp()["vocabulary"];
    let types: Vec<i64> = serde_json::from_value(vocabulary["types"].clone()).unwrap();
    GgufTokenizer {
        tokens: serde_json::from_value(vocabulary["tokens"].clone()).unwrap(),
        types: types.into_iter().map(|kind| TokenType::of(kind.into()).unwrap()).collect(),
        splitting: Splitting::Pieces {
            scores: serde_json::from_value(vocabulary["scores"].clone()).unwrap(),
            space,
        },
        begin: Some(1),
        end: None,
    }
}

#[test]
fn pieces_have_the_tokens_of_llama_cpp() {
    let reference = llama_cpp();
    for space in [true, false] {
        let tokenizer = pieces(space).build().unwrap();
        let cases = reference["pieces"].as_array().unwrap().iter().filter(|case| case["space"] == space);
        let cases: Vec<_> = cases.collect();
        assert!(cases.len() > 5);
        cases.into_iter().for_each(|case| check(&tokenizer, case));
    }
}

/// Control tokens are not shown, user-defined ones are.
#[test]
fn only_control_tokens_are_hidden() {
    let tokenizer = pieces(true).build().unwrap();
    let ids = tokenizer.encode("<s>the</s><|turn|>and", true).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the<|turn|> and");
    let ended = GgufTokenizer { end: Some(2), ..pieces(true) }.build().unwrap();
    assert_eq!(ended.encode("the", true).unwrap().get_ids(), [1, 267, 2]);
    assert_eq!(ended.encode("the", false).unwrap().get_ids(), [267]);
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |tokenizer: GgufTokenizer, want: &str| {
        let reason = tokenizer.build().err().unwrap_or_else(|| panic!("{want}: not refused"));
        assert!(reason.contains(want), "{reason}: {want}");
    };
    let changed = |change: &dyn Fn(&mut GgufTokenizer)| {
        let mut tokenizer = pieces(true);
        change(&mut tokenizer);
        tokenizer
    };
    refused(changed(&|t| t.tokens[270] = "in".into()), "the tokens 262 and 270 are both \"in\"");
    refused(changed(&|t| t.types.truncate(7)), "token_type has 7 entries");
    refused(changed(&|t| t.begin = Some(1000)), "bos_token_id is 1000");
    refused(changed(&|t| t.tokens[13] = "x".into()), "no token <0x0A>");
    refused(changed(&|t| t.tokens[270] = "q".repeat(3)), "the character 'q'");
    let scored = |at: usize, score: f32| {
        changed(&|t| match &mut t.splitting {
            Splitting::Pieces { scores, .. } => scores[at] = score,
            other => panic!("{other:?}"),
        })
    };
    // The merges of `▁t` and `he`; then that of a byte, which is never merged.
    refused(scored(261, 0.0), "\"▁t\" and \"he\" both have 0");
    refused(scored(261, f32::NAN), "that of \"he\" is not a number");
    assert!(scored(5, -1.0).build().is_ok());
    refused(changed(&|t| t.splitting = Splitting::Pieces { scores: vec![0.0], space: true }), "scores has 1");

    let byte_level = |pre: &str, merges: &[&str]| {
        let merges = merges.iter().map(|merge| merge.to_string()).collect();
        changed(&|t| t.splitting = Splitting::ByteLevel { pre: pre.into(), merges: Vec::clone(&merges) })
    };
    assert!(byte_level("gpt-2", &["a b", "b c"]).build().is_ok());
    refused(byte_level("tekken", &[]), "pre: `tekken` is not known");
    refused(byte_level("gpt-2", &["ab"]), "\"ab\" is not a pair");
    refused(byte_level("gpt-2", &["a b", "b c", "a b"]), "\"a b\" occurs twice");
    refused(byte_level("gpt-2", &["a z"]), "`z`");
}
