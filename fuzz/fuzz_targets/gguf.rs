//! Any bytes as a GGUF file: an error, or a file whose metadata, tensors and configuration can be
//! read. Never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardwise::{
    device::AnyMut,
    models::ModelConfig,
    tensor::{Region, Role, WeightSource},
    weights::Gguf,
};

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let Ok(gguf) = Gguf::open(&path) else { return };
    for key in gguf.keys() {
        _ = gguf.get(key);
    }
    for name in gguf.names() {
        let region = Region::whole(gguf.shape(name).unwrap());
        if gguf.check(name, &region).is_err() {
            continue;
        }
        // The file holds the tensor: a block has at most two weights for each byte. Reading fails
        // only if a scale is not finite.
        let mut all = vec![0.0_f32; region.extent().len()];
        assert!(all.len() <= 2 * bytes.len());
        _ = gguf.read(name, Role::Weight, &region, AnyMut::F32(all.as_mut_slice()));
        if let Some(format) = gguf.format(name) {
            let mut blocks = vec![0; all.len() / format.weights() * format.bytes()];
            _ = gguf.read_blocks(name, &region, &mut blocks);
        }
    }
    _ = ModelConfig::of_gguf(&gguf);
});
