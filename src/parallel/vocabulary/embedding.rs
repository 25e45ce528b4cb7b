//! Token embeddings, whose vocabulary is sharded over the ranks, and position embeddings.

use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Backend, NO_ROW},
    ops,
    parallel::{Bias, ColumnParallelLinear, Columns, DTensor, Layer, ResidualStream, sums::Sums},
    shard::{Partial, Sequences},
    tensor::{Param, Region, Role, SampleTerm, Weights},
};
use std::marker::PhantomData;

/// yᵢ = `W[idᵢ]`: ids → S. The ids are the same on every rank. W: `[vocabulary, hidden]`, sharded
/// by rows, with at least one row on each rank.
///
/// * Forward: each rank looks up the ids whose rows it holds, and takes 0 for the other ids. The
///   leaving collective of S (all-reduce, or reduce-scatter over tokens) adds the ranks' terms. The
///   sum is exact, because at most one term of each element is not 0.
/// * Backward: the entering collective of S (none, or an all-gather) gives each rank all rows of
///   dy. Row r of dW is the sum of the dyᵢ with idᵢ = r, or 0 for the padding id
///   ([`VocabParallelEmbedding::with_padding`]).
///
/// [`VocabParallelEmbedding::tied_head`] makes the output head of a model with tied weights.
///
/// Source: Shoeybi et al., 2019: Megatron-LM, section 3.
///
/// ```
/// use ndarray::arr2;
/// use shardwise::prelude::*;
///
/// let table = arr2(&[[1.0], [2.0], [3.0]]).into_dyn();
/// let source = Arrays([("weight".into(), table)].into());
/// launch::threads(2, |world| {
///     let weights = Weights::new(&source); // rank 0 has rows 0 and 1, rank 1 row 2
///     let embedding = VocabParallelEmbedding::<Replicated, f32, _>::load(&world, &weights, 3, 1)?;
///     let (y, _) = embedding.forward(&[2, 0, 1], Sequences::one(3))?;
///     assert_eq!(y.local().to_vec()?, [3.0, 1.0, 2.0]);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct VocabParallelEmbedding<S: ResidualStream, T: Element, B: Device> {
    table: ColumnParallelLinear<S, T, B>,
    padding: Option<u32>,
}

impl<S: ResidualStream, T: Element, B: Backend> VocabParallelEmbedding<S, T, B> {
    /// Reads this rank's rows of `weight`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape, or there are fewer tokens in the vocabulary
    /// than ranks.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, vocabulary: usize, hidden: usize) -> Result<Self> {
        group.partition("embedding", "words", vocabulary, 1)?;
        let columns = Columns::even(group, vocabulary)?;
        let table = ColumnParallelLinear::load(group, weights, hidden, &columns, Bias::None)?;
        Ok(Self { table, padding: None })
    }

    /// Sets the padding id. A lookup of this id adds nothing to the gradient of its row, as for
    /// `padding_idx` of `torch.nn.Embedding`. The backward of a tied head still adds to the
    /// gradient of this row.
    ///
    /// # Errors
    /// When the id is beyond the vocabulary.
    pub fn with_padding(self, padding: Option<u32>) -> Result<Self> {
        let words = self.vocabulary();
        match padding.filter(|&id| id as usize >= words) {
            Some(id) => Err(Error::invalid(
                "embedding",
                format!("the padding {id} is beyond a vocabulary of {words} words"),
            )),
            None => Ok(Self { padding, ..self }),
        }
    }

    /// Returns the number of tokens in the whole vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.table.partition().total()
    }

    /// Computes the embeddings of ids that form these sequences, and the saved values for the
    /// backward.
    ///
    /// # Errors
    /// When an id is beyond the vocabulary, the sequences do not have one row per id, or a
    /// collective fails.
    #[track_caller]
    pub fn forward(&self, ids: &[u32], sequences: Sequences) -> Result<(DTensor<S, T, B>, Vec<u32>)> {
        let _site = self.table.weight().site().enter();
        let (group, words) = (self.table.group(), self.vocabulary());
        if let Some(id) = ids.iter().find(|&&id| id as usize >= words) {
            return Err(Error::invalid(
                "embedding",
                format!("id {id} is beyond a vocabulary of {words} words"),
            ));
        }
        let own = self.table.partition().range(group.rank());
        let local = |&id: &u32| if own.contains(&(id as usize)) { id - own.start as u32 } else { NO_ROW };
        let mut rows: Vec<u32> = ids.iter().map(local).collect();
        let term = self.table.weight().rows(&rows)?;
        // `rows` is saved for the backward, in which the padding id gets no gradient.
        rows.iter_mut()
            .zip(ids)
            .filter(|(_, id)| self.padding == Some(**id))
            .for_each(|(row, _)| *row = NO_ROW);
        let term = DTensor::<Partial, T, B>::partial(group, term)?.with_sequences(sequences)?;
        Ok((term.exact()?.leave()?, rows))
    }

    /// Adds to the table's gradient. `rows` are the values that the forward has saved.
    ///
    /// # Errors
    /// When dy has another shape than the embeddings, or a collective fails.
    #[track_caller]
    pub fn backward(&self, rows: &[u32], dy: DTensor<S, T, B>) -> Result<()> {
        let (table, _site) = (self.table.weight(), self.table.weight().site().enter());
        dy.check("embedding backward", self.table.group())?;
        let (words, cols) = (table.shape().rows(), table.shape().cols());
        same_size("embedding backward", "features of dy", dy.shape().cols(), "those of the table", cols)?;
        let dy = dy.enter()?;
        let dy_rows = dy.local().shape().rows();
        same_size("embedding backward", "the number of ids", rows.len(), "rows of dy", dy_rows)?;
        if table.keeps_terms() {
            table.keep_term(SampleTerm::Lookup {
                ids: rows.to_vec(),
                dy: dy.local().clone(),
                samples: dy.sequences().clone(),
            });
            return Ok(());
        }
        let dy = dy.local();
        table.add_grad_over(rows.len(), |tokens| {
            let dy_mat = dy.mat().block(tokens.clone(), 0..cols);
            ops::scatter_rows(dy.device(), &rows[tokens], words, dy_mat)
        })
    }

    /// Returns the table, the only parameter.
    pub fn params(&self) -> Vec<Param<T, B>> {
        self.table.params()
    }

    /// Makes the output head with the same weight: logits = X Wᵀ, S → Shard<1>. Make only one head:
    /// for each head that exists, each backward must add one more term before the table's gradient
    /// is complete ([`Param::tie`]).
    pub fn tied_head(&self) -> ColumnParallelLinear<S, T, B> {
        self.table.tied()
    }
}

/// yᵢ = xᵢ + `P[position of row i in its sequence]`: S → S. P: `[positions, hidden]`, learned,
/// equal on every rank.
///
/// [`PositionEmbedding::add_rows`] adds the rows of P at indices other than positions, such as the
/// token types of BERT.
///
/// Collectives: the forward makes none. With `Shard<0>`, the backward makes an all-reduce of dP,
/// because each rank has only its own tokens.
#[derive(Debug)]
pub struct PositionEmbedding<S: ResidualStream, T: Element, B: Device> {
    table: Param<T, B>,
    sums: Sums<B>,
    stream: PhantomData<S>,
}

impl<S: ResidualStream, T: Element, B: Backend> PositionEmbedding<S, T, B> {
    /// Reads `weight`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn load(group: &Group<B>, weights: &Weights<'_>, positions: usize, hidden: usize) -> Result<Self> {
        let (region, owned) = (Region::whole([positions, hidden]), group.rank() == 0);
        let table = Param::load_region(group.device(), weights, "weight", Role::Weight, region, owned)?;
        let sums = Sums::of(group)?;
        Ok(Self { table: sums.replicated(table), sums, stream: PhantomData })
    }

    /// Computes yᵢ = xᵢ + `P[rowsᵢ]`, and the saved values for the backward: all indices. `rows`
    /// has one index for each token of the whole tensor, and is the same on every rank.
    ///
    /// # Errors
    /// When there is not one index per token, or an index other than `NO_ROW` is beyond the table.
    pub fn add_rows(
        &self,
        x: DTensor<S, T, B>,
        rows: impl Iterator<Item = u32>,
    ) -> Result<(DTensor<S, T, B>, Vec<u32>)> {
        x.check("position embedding", self.sums.group())?;
        let (rows, tokens): (Vec<u32>, _) = (rows.collect(), x.shape().rows());
        same_size("position embedding", "the number of indices", rows.len(), "that of tokens", tokens)?;
        let table = self.table.shape().rows();
        if let Some(row) = rows.iter().find(|&&row| row as usize >= table && row != NO_ROW) {
            let reason = format!(
                "a token has index {row}, but the table has {table} rows; if the index is a position and the tokens form \
                 several sequences, set them by `with_sequences`"
            );
            return Err(Error::invalid("position embedding", reason));
        }
        let added = self.table.rows(&rows[x.local_range(0)])?;
        Ok((x.map_local(|local| ops::add(local, &added))?, rows))
    }
}

impl<S: ResidualStream, T: Element, B: Backend> Layer<T, B> for PositionEmbedding<S, T, B> {
    type In = S;
    type Out = S;
    type Saved = Vec<u32>;

    #[track_caller]
    fn forward(&self, x: DTensor<S, T, B>) -> Result<(DTensor<S, T, B>, Self::Saved)> {
        let sequences = x.sequences().clone();
        self.add_rows(x, sequences.positions())
    }

    #[track_caller]
    fn backward(&self, positions: Self::Saved, dy: DTensor<S, T, B>) -> Result<DTensor<S, T, B>> {
        let _site = self.table.site().enter();
        dy.check("position embedding backward", self.sums.group())?;
        let (table, device, cols) = (self.table.shape(), dy.local().device(), dy.shape().cols());
        const OP: &str = "position embedding backward";
        same_size(OP, "the number of positions", positions.len(), "rows of dy", dy.shape().rows())?;
        same_size(OP, "features of dy", cols, "those of the table", table.cols())?;
        if self.table.keeps_terms() {
            let all = dy.clone().enter()?;
            let (samples, all) = (all.sequences().clone(), all.into_local());
            self.table.keep_term(SampleTerm::Lookup { ids: positions, dy: all, samples });
            return Ok(dy);
        }
        let positions = &positions[dy.local_range(0)];
        self.sums.add_over_tokens(&self.table, &dy, |rows, grad| {
            device.fill(0.0, grad.mat_mut()?)?;
            device.scatter_add(
                &positions[rows.clone()],
                dy.local().mat().block(rows, 0..cols),
                grad.mat_mut()?,
            )
        })?;
        Ok(dy)
    }

    fn params(&self) -> Vec<Param<T, B>> {
        vec![self.table.clone()]
    }
}
