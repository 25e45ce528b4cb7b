//! The tokenizer of a converted checkpoint gives the tokens that llama2.c gives.

use std::{io::Write, path::Path, process::Command};
use tokenizers::Tokenizer;

/// The licence of llama2.c's model is unknown, so the model is not part of the project. The test
/// does nothing if `../shared/data` does not have the model.
#[test]
fn stories_have_the_tokens_of_llama2c() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let data = root.join("../shared/data");
    let (target, script) = (tempfile::tempdir().unwrap(), root.join("scripts/convert_llama2c.py"));
    let converted = Command::new("python3")
        .arg(script)
        .args([data.join("stories260K.bin"), data.join("tok512.bin"), target.path().into()])
        .output();
    if !data.join("stories260K.bin").exists() || converted.is_err() {
        // Past libtest, which hides what a passing test prints.
        let reason = "NOT RUN: python3 or ../shared/data/stories260K.bin is not there";
        std::io::stderr().write_all(format!("\n{reason}\n").as_bytes()).unwrap();
        return;
    }
    assert!(converted.as_ref().unwrap().status.success(), "{converted:?}");
    let text = std::fs::read_to_string(data.join("stories260k_reference.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let want: Vec<u32> = serde_json::from_value(json["ids"].clone()).unwrap();
    let tokenizer = Tokenizer::from_file(target.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.decode(&want, true).unwrap(), json["text"].as_str().unwrap());
    let prompt = tokenizer.encode("Once upon a time, there was a little girl", true).unwrap();
    assert_eq!(prompt.get_ids(), &want[..prompt.get_ids().len()]);
}
