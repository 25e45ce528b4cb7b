//! Any bytes as a safetensors file: an error or a checkpoint whose tensors can be looked at, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardwise::{
    device::AnyMut,
    tensor::{Region, Role, WeightSource},
    weights::Checkpoint,
};

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(&path) else { return };
    for name in checkpoint.names() {
        let shape = checkpoint.shape(name).unwrap();
        // What is there can be read: no tensor is larger than the file.
        if checkpoint.dtype(name).is_ok() && shape.len() <= 4 {
            let mut all = vec![0.0_f32; shape.iter().product()];
            assert!(all.len() <= bytes.len());
            let whole = Region::whole(shape);
            checkpoint.read(name, Role::Weight, &whole, AnyMut::F32(all.as_mut_slice())).unwrap();
        }
    }
});
