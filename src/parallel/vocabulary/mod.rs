//! The two ends of a model, whose tables are sharded by vocabulary: embeddings and cross entropy.

mod cross_entropy;
mod embedding;

pub use {
    cross_entropy::{CrossEntropySaved, Losses, Smoothing, VocabParallelCrossEntropy},
    embedding::{PositionEmbedding, VocabParallelEmbedding},
};
