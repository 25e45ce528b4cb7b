//! The transfers of a rank.

use super::Strategy;
use crate::comm::Transfer;
use std::collections::BTreeMap;

/// Transfers, each with how often it is made.
pub type Transfers = BTreeMap<Transfer, u64>;

/// A rank's transfers in a step, by group, as [`TransferLog`](crate::comm::TransferLog) has them.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Traffic {
    /// In the tensor-parallel group.
    pub tensor: Transfers,
    /// In the pipeline's group. The sender logs an exchange.
    pub pipeline: Transfers,
    /// In the group of the pipeline's first and last rank, for a tied table.
    pub ends: Transfers,
    /// In the group of replicas.
    pub data: Transfers,
}

impl Traffic {
    /// The fewest bytes that the rank has to send: [`Transfer::wire_bytes`].
    pub fn sent(&self, strategy: &Strategy) -> u64 {
        let Strategy { data, pipeline, tensor, .. } = *strategy;
        let groups =
            [(&self.tensor, tensor), (&self.pipeline, pipeline), (&self.ends, 2), (&self.data, data)];
        let of = |(transfers, ranks): (&Transfers, usize)| -> u64 {
            transfers.iter().map(|(transfer, count)| transfer.wire_bytes(ranks) as u64 * count).sum()
        };
        groups.into_iter().map(of).sum()
    }
}
