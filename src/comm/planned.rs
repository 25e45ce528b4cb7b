//! A communicator without peers, for planning the memory and transfers of one rank.

use super::{Call, Communicator, Incoming, Outgoing, ReduceOp, Shards};
use crate::{
    device::{AnyMut, AnyRef, Meta},
    error::{Error, Result},
    security::{Channel, Roles},
};

/// One simulated rank of a group of any size. There are no other ranks: every collective returns at
/// once and moves no data.
///
/// It works only on [`Meta`], which has no values; on any other device the results would be wrong.
/// [`Group::planned`](super::Group::planned) makes a planned group that logs its transfers.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    rank: usize,
    size: usize,
}

impl Planned {
    /// Returns rank `rank` of a group of `size` ranks.
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn new(rank: usize, size: usize) -> Result<Self> {
        if rank >= size {
            return Err(Error::invalid("planned group", format!("rank {rank} of a group of {size}")));
        }
        Ok(Self { rank, size })
    }
}

impl Communicator<Meta> for Planned {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn channel(&self) -> Channel {
        Channel::MEMORY
    }

    fn roles(&self) -> Roles {
        Roles::UNRESTRICTED
    }

    fn all_reduce(&self, _: &Call, _: ReduceOp, _: AnyMut<'_, Meta>) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, _: &Call, _: &Shards, _: AnyRef<'_, Meta>, _: AnyMut<'_, Meta>) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter(
        &self,
        _: &Call,
        _: ReduceOp,
        _: &Shards,
        _: AnyRef<'_, Meta>,
        _: AnyMut<'_, Meta>,
    ) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &Call, _: usize, _: AnyMut<'_, Meta>) -> Result<()> {
        Ok(())
    }

    fn exchange(&self, _: &Call, _: Option<Outgoing<'_, Meta>>, _: Option<Incoming<'_, Meta>>) -> Result<()> {
        Ok(())
    }

    fn barrier(&self, _: &Call) -> Result<()> {
        Ok(())
    }

    /// # Errors
    /// When a color is given, because the colors of the other ranks are unknown.
    fn split(
        &self,
        _: &Call,
        color: Option<u64>,
        _: u64,
        _: &str,
    ) -> Result<Option<Box<dyn Communicator<Meta>>>> {
        let Some(color) = color else { return Ok(None) };
        let reason = format!(
            "a planned group does not know which other ranks have color {color}; make a planned group for each axis"
        );
        Err(Error::Unsupported { op: "split", reason })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use crate::{
        Tensor,
        comm::{Group, Op, ReduceOp, Transfer},
        device::{Cpu, DType, Device, Meta},
        kernels::{Activation, AttentionChoices, Backend, NormKind, Pointwise},
        launch,
        optim::{AdamW, clip_scale, grad_norm},
        parallel::{AttentionConfig, BlockConfig, Layer, ResidualStream, TransformerBlock},
        shard::{Partition, Reduction, Replicated, Shape, Shard},
        tensor::{Random, Weights},
        trace,
    };
    use half::bf16;

    /// Calls each operation of a group once, with uneven partitions.
    fn everything<B: Pointwise>(group: &Group<B>) -> crate::Result<()> {
        let (device, rank, size) = (group.device(), group.rank(), group.size());
        let partition = Partition::from_sizes((0..size).map(|rank| 3 * rank + 1));
        let shard = || Tensor::<f32, B>::zeros(device, [5, partition.size(rank), 2]);
        let whole = || Tensor::<f64, B>::zeros(device, [partition.total(), 4]);
        let mut x = whole()?;
        group.all_reduce(ReduceOp::Max, &mut x)?;
        assert_eq!(group.all_gather(&shard()?, 1, &partition)?.shape().dims(), [5, partition.total(), 2]);
        let own = group.reduce_scatter(ReduceOp::Sum, &x, 0, &partition)?;
        assert_eq!(own.shape().dims(), [partition.size(rank), 4]);
        group.broadcast(size - 1, &mut x)?;
        let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
        let arrived =
            group.exchange(Some((to, &shard()?)), Some((from, [5, partition.size(from), 2].into())))?;
        assert_eq!(arrived.map(|x| x.shape().dims().to_vec()), Some(vec![5, partition.size(from), 2]));
        group.barrier()?;
        let started = [
            group.start_all_reduce(ReduceOp::Sum, whole()?)?,
            group.start_reduce_scatter(ReduceOp::Sum, whole()?, 0, &partition)?,
        ];
        let gathered = group.start_all_gather(shard()?, 1, &partition)?;
        assert_eq!(gathered.wait()?.shape().dims(), [5, partition.total(), 2]);
        let shapes = started.map(|pending| pending.wait().map(|x| x.shape()));
        assert_eq!(
            shapes,
            [[partition.total(), 4], [partition.size(rank), 4]].map(|dims| Ok(Shape::from(dims)))
        );
        // Too many elements for `Algorithm::Gather`.
        let group = group.with_reduction(Reduction::Invariant { blocks: 8 });
        let Some(tree) = group.tree()? else { return Ok(()) };
        let term = |_| Tensor::zeros(device, [70, 100]);
        let terms = tree.nodes(rank).into_iter().map(term).collect::<crate::Result<_>>()?;
        assert_eq!(group.tree_all_reduce::<f32>(&tree, terms)?.shape().dims(), [70, 100]);
        Ok(())
    }

    #[test]
    fn a_planned_group_records_and_holds_what_every_rank_of_a_group_does() {
        for size in 1..=3 {
            let moved = launch::threads(size, |world| {
                let (group, record) = world.recorded();
                everything(&group)?;
                Ok(record.take())
            });
            for (rank, moved) in moved.unwrap().into_iter().enumerate() {
                let device = Meta::new();
                let (group, record) = Group::planned(&device, rank, size).unwrap();
                everything(&group).unwrap();
                assert_eq!((record.take(), device.memory().live), (moved, 0), "rank {rank} of {size}");
            }
        }
    }

    /// Returns the live bytes after each of: loading a block, forward, backward, an optimizer step.
    fn step<S: ResidualStream, B: Backend>(group: &Group<B>) -> crate::Result<[usize; 4]> {
        let (device, source) = (group.device(), Random::normal(1, 0.1));
        let config = BlockConfig::new(
            AttentionConfig::new(72, 9).with_kv_heads(3).with_choices(AttentionChoices::CAUSAL),
            90,
            Activation::GeluTanh,
            NormKind::LayerNorm { eps: 1e-5 },
        )
        .with_mlp_bias(true);
        let block = TransformerBlock::<S, bf16, B>::load(group, &Weights::new(&source), &config)?;
        let loaded = device.memory().live;
        let rows = S::local_rows(group, 150)?.len();
        let x = S::of_local(group, 150, Tensor::zeros(device, [rows, 72])?)?;
        let (y, saved) = block.forward(x.clone())?;
        let forward = device.memory().live;
        let dx = block.backward(saved, y.clone())?;
        // After the barrier no rank reads this rank's started buffers.
        group.barrier()?;
        let backward = device.memory().live;
        drop((x, y, dx));
        let norm = grad_norm(&block.params(), &[group])?;
        AdamW::default().step(&block.params(), 1e-3, clip_scale(norm, 1.0)?)?;
        Ok([loaded, forward, backward, device.memory().live])
    }

    #[test]
    fn a_planned_rank_of_a_block_moves_and_holds_what_a_rank_does() {
        fn same<S: ResidualStream>(reduction: Reduction) {
            let ranks = launch::threads(3, |world| {
                let (group, record) = world.with_reduction(reduction).recorded();
                Ok((step::<S, Cpu>(&group)?, record.take()))
            });
            for (rank, expected) in ranks.unwrap().into_iter().enumerate() {
                let (group, record) = Group::planned(&Meta::new(), rank, 3).unwrap();
                let bytes = step::<S, Meta>(&group.with_reduction(reduction)).unwrap();
                assert_eq!((bytes, record.take()), expected, "rank {rank}, {reduction:?}");
            }
        }
        for reduction in [Reduction::Fast, Reduction::Invariant { blocks: 5 }] {
            same::<Replicated>(reduction);
            same::<Shard<0>>(reduction);
        }
    }

    #[test]
    fn any_rank_of_any_size_is_planned_without_memory() {
        let device = Meta::new();
        let (group, record) = Group::planned(&device, 5, 64).unwrap();
        let mut x = Tensor::<f32, _>::zeros(&device, [1 << 20, 1 << 14]).unwrap();
        group.all_reduce(ReduceOp::Sum, &mut x).unwrap();
        let moved = record.take();
        let transfer = Transfer { op: Op::AllReduce, dtype: DType::F32, elements: 1 << 34 };
        assert_eq!(moved, [transfer]);
        assert_eq!((moved[0].wire_bytes(64), device.memory().live), ((2 * 63) << 30, 1 << 36));
        assert!(Group::planned(&device, usize::MAX - 1, usize::MAX).is_ok());
        for (rank, size) in [(64, 64), (0, 0), (usize::MAX, 1)] {
            let words = Group::planned(&device, rank, size).unwrap_err().to_string();
            assert_eq!(words, format!("planned group: rank {rank} of a group of {size}"));
        }
    }

    #[test]
    fn a_planned_group_is_not_split() {
        let device = Meta::new();
        let (group, _) = Group::planned(&device, 1, 4).unwrap();
        assert!(group.split(None, 0).unwrap().is_none());
        let words = group.split(Some(3), 0).unwrap_err().to_string();
        assert!(words.starts_with("split: not supported: ") && words.contains("for each axis"), "{words}");
    }

    #[test]
    fn a_planned_group_leaves_no_trace_in_the_record_of_a_job() {
        let records = launch::threads(2, |world| {
            world.barrier()?;
            let device = Meta::new();
            let (group, _) = Group::planned(&device, 7 - world.rank(), 8)?;
            for _ in 0..trace::CAPACITY {
                group.start_all_reduce(ReduceOp::Sum, Tensor::<f32, _>::zeros(&device, [9])?)?.wait()?;
            }
            assert!(group.split(Some(1), 0).is_err());
            world.barrier()?;
            Ok(trace::snapshot())
        });
        for record in records.unwrap() {
            let ops: Vec<_> = record.entries.iter().map(|entry| (&*entry.op, entry.end.is_some())).collect();
            assert_eq!(ops, [("barrier", true); 2]);
            assert!(record.groups.values().all(|group| group.name == "world" && group.size == 2));
            assert!(record.entries.iter().all(|entry| entry.failure.is_none()));
        }
    }
}
