//! Roles of processes: what a signed list forbids, no rank of the job can do.

use crate::job::{DEADLINE, Job, run};
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, Op, ReduceOp},
    device::Cpu,
    parallel::{Bias, ColumnLinear, Columns, Layer},
    security::Role::{self, Checkpointer, Trainer},
    shard::Partition,
    tensor::{Random, Weights},
    train::DataParallel,
    weights::{self, Checkpoint},
};

/// Runs a job whose ranks have these roles.
fn job<R: Send>(roles: &[Role], rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Vec<Result<R>> {
    let job = Job::new(roles.len());
    let list = job.list("roles.json", |members| {
        members.iter_mut().zip(roles).for_each(|(member, role)| member.role = *role);
    });
    let mut envs: Vec<_> = (0..roles.len()).map(|rank| job.env(rank)).collect();
    for (rank, env) in envs.iter_mut().enumerate() {
        env.identity = job.identity(&format!("rank{rank}.pem"), &list);
    }
    run(DEADLINE, envs, rank)
}

fn layer(group: &Group<Cpu>) -> Result<ColumnLinear<f32, Cpu>> {
    let source = Random::normal(5, 0.5);
    ColumnLinear::load(group, &Weights::new(&source).at("fc"), 4, &Columns::even(group, 7)?, Bias::Add)
}

#[test]
fn the_checkpointer_saves_and_a_trainer_does_not() {
    let mut outcomes = Vec::new();
    for roles in [[Checkpointer, Trainer, Trainer], [Trainer, Checkpointer, Trainer], [Trainer; 3]] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("saved");
        let moved = job(&roles, |group| {
            let (own, log) = group.recorded();
            weights::save(&own, &layer(&group)?.params(), &path)?;
            let moved = log.take().into_iter().filter(|moved| moved.op == Op::Exchange);
            Ok(moved.map(|moved| moved.elements).sum::<usize>())
        });
        let loaded = Checkpoint::open(&path).is_ok_and(|saved| saved.names().count() == 2);
        outcomes.push((moved, loaded));
    }
    // Ranks 1 and 2 each hold 2 of the 7 features, of 4 weights and a bias.
    let (moved, loaded) = &outcomes[0];
    assert_eq!((moved, loaded), (&vec![Ok(0), Ok(10), Ok(10)], &true));
    for (moved, loaded) in &outcomes[1..] {
        for outcome in moved {
            assert!(
                matches!(outcome, Err(Error::NotPermitted { op: "save", role: "trainer", .. })),
                "{moved:?}"
            );
        }
        assert!(!loaded);
    }
    // All messages pass through rank 0.
    let relayed = outcomes[1].0[1].as_ref().unwrap_err().to_string();
    assert!(
        relayed.contains("rank 0 of the job, which relays every message, has the role `trainer`"),
        "{relayed}"
    );
}

#[test]
fn no_collective_sends_a_weight_to_a_trainer() {
    type Send = fn(&Group<Cpu>, Tensor<f32>) -> Result<()>;
    let sends: [(&str, Send); 4] = [
        ("all_reduce", |group, mut x| group.all_reduce(ReduceOp::Sum, &mut x)),
        ("all_gather", |group, x| group.all_gather(&x, 0, &Partition::even(4, 2)).map(drop)),
        ("broadcast", |group, mut x| group.broadcast(0, &mut x)),
        ("all_reduce", |group, mut x| group.split_all(3)?.all_reduce(ReduceOp::Max, &mut x)),
    ];
    let mut refused = 0;
    for (op, send) in sends {
        for outcome in job(&[Checkpointer, Trainer], |group| {
            // Each rank has 2 rows of 4 weights.
            let source = Random::normal(5, 0.5);
            let weights = Weights::new(&source);
            let columns = Columns::even(&group, 4)?;
            let layer = ColumnLinear::<f32, Cpu>::load(&group, &weights.at("fc"), 4, &columns, Bias::None)?;
            send(&group, layer.params()[0].value()?)
        }) {
            let Err(Error::NotPermitted { op: refusing, .. }) = outcome else { panic!("{op}: {outcome:?}") };
            assert_eq!(refusing, op);
            refused += 1;
        }
    }
    assert_eq!(refused, 8);
}

/// Rank 0 relays the messages of a group that it is not in. What is no weight passes, and replicas
/// of other weights than rank 0's do not.
#[test]
fn only_weights_are_kept_from_the_relay() {
    let outcomes = job(&[Trainer; 3], |world| {
        let group = world.split_all(u64::from(world.rank() > 0))?;
        let mut x = Tensor::<f32>::full(group.device(), [2], group.rank() as f64)?;
        group.broadcast(0, &mut x)?;
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        let other = 1 - group.rank().min(1);
        if group.size() == 2 {
            group.exchange(Some((other, &x)), Some((other, x.shape())))?;
        }
        assert_eq!(group.broadcast_bytes(0, b"request")?, b"request");
        let layer = layer(&Group::solo(group.device()))?;
        Ok(DataParallel::new(&group, &layer.params()).map(drop))
    });
    let mut outcomes = outcomes.into_iter().map(Result::unwrap);
    assert_eq!(outcomes.next(), Some(Ok(())));
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::NotPermitted { op: "broadcast", .. })), "{outcome:?}");
    }
}

/// Replicas hold the same weights as rank 0, which relays them.
#[test]
fn trainers_keep_replicas_equal() {
    let outcomes = job(&[Trainer; 2], |group| {
        let layer = layer(&Group::solo(group.device()))?;
        let params = layer.params();
        params[0].set(Tensor::full(group.device(), params[0].shape(), group.rank() as f64)?)?;
        DataParallel::new(&group, &params)?;
        params[0].value()?.to_vec()
    });
    assert_eq!(outcomes, [Ok(vec![0.0; 28]), Ok(vec![0.0; 28])]);
}
