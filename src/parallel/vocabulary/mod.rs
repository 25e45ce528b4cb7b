//! The first and last layers of a model, which are sharded by vocabulary: embeddings and cross
//! entropy.

mod cross_entropy;
mod embedding;

pub use {
    cross_entropy::{CrossEntropySaved, Losses, Smoothing, VocabParallelCrossEntropy},
    embedding::{PositionEmbedding, VocabParallelEmbedding},
};
