//! What a plan may not choose freely.

/// Fixes parts of a strategy. A search considers only strategies that have these values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The number of replicas.
    pub data: Option<usize>,
    /// The number of pipeline ranks.
    pub pipeline: Option<usize>,
    /// The number of tensor-parallel ranks.
    pub tensor: Option<usize>,
    /// The number of sequences of a microbatch.
    pub sequences: Option<usize>,
    /// Whether the residual stream is sharded over tokens.
    pub sequence_parallel: Option<bool>,
}

impl Limits {
    /// Sets the number of replicas.
    pub fn with_data(self, data: usize) -> Self {
        Self { data: Some(data), ..self }
    }

    /// Sets the number of pipeline ranks.
    pub fn with_pipeline(self, pipeline: usize) -> Self {
        Self { pipeline: Some(pipeline), ..self }
    }

    /// Sets the number of tensor-parallel ranks.
    pub fn with_tensor(self, tensor: usize) -> Self {
        Self { tensor: Some(tensor), ..self }
    }

    /// Sets the number of sequences of a microbatch.
    pub fn with_sequences(self, sequences: usize) -> Self {
        Self { sequences: Some(sequences), ..self }
    }

    /// Sets whether the residual stream is sharded over tokens.
    pub fn with_sequence_parallel(self, sequence_parallel: bool) -> Self {
        Self { sequence_parallel: Some(sequence_parallel), ..self }
    }
}
