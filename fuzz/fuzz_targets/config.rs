//! Any text as a config.json: an error or a model's configuration, and never a panic, also when a checkpoint that lacks its
//! tensors is to be loaded with it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardwise::{
    comm::Group,
    device::Cpu,
    models::{Bert, Decoder, ModelConfig},
    shard::Replicated,
    tensor::Arrays,
};

fuzz_target!(|text: &str| {
    let Ok(config) = ModelConfig::parse(text) else { return };
    let (solo, nothing) = (Group::solo(&Cpu::new()), Arrays::default());
    match config {
        ModelConfig::Decoder(config) => {
            assert!(Decoder::<Replicated, f32, Cpu>::load(&solo, &nothing, &config).is_err());
        }
        ModelConfig::Bert(config) => {
            assert!(Bert::<Replicated, f32, Cpu>::load(&solo, &nothing, &config).is_err());
        }
    }
});
