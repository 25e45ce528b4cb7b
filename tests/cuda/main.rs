//! Tests of the CUDA device, and the suite of operators, layers, models and training on it.
//!
//! They need a GPU, or its stand-in: `scripts/cuda_standin.sh cargo test --features nccl --test
//! cuda`. Without either they report that they were not run.

#[path = "../suite/block.rs"]
mod block;
#[path = "../suite/concat.rs"]
mod concat;
mod counts;
#[path = "../suite/decoding.rs"]
mod decoding;
mod dev;
mod device;
#[path = "../suite/disagree.rs"]
mod disagree;
#[path = "../suite/exact.rs"]
mod exact;
#[path = "../suite/invariant.rs"]
mod invariant;
mod kernels;
#[path = "../suite/layers.rs"]
mod layers;
#[path = "../suite/models.rs"]
mod models;
mod nccl;
#[path = "../suite/optim.rs"]
mod optim;
#[path = "../suite/overlap.rs"]
mod overlap;
#[path = "../suite/params.rs"]
mod params;
mod quantized;
#[path = "../suite/states.rs"]
mod states;
#[path = "../suite/support.rs"]
mod support;
#[path = "../suite/training.rs"]
mod training;
#[path = "../suite/vocabulary.rs"]
mod vocabulary;
