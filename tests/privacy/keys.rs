//! The way of the run key to the ranks.

use crate::claims::Claims;
use shardwise::{
    prelude::*,
    privacy::*,
    security::{Channel, Policy, Reach},
};
use std::rc::Rc;

#[test]
fn no_key_travels_between_machines_in_plaintext() {
    let plaintext = Channel::plaintext(Reach::Network);
    // A batch names the key.
    let agree = |ranks: usize, channel: Channel, policy: Policy| {
        let outcomes = launch::threads(ranks, |world| {
            let inner = world.communicator();
            let claims = Claims { channel: Some(channel), policy: Some(policy), ..Claims::of(inner) };
            let group = Group::new(Rc::new(claims), world.device());
            Ok(RunKey::agree(&group).and_then(|key| Ok(PoissonSampler::new(&key, 1000, 0.5)?.batch(0))))
        });
        let outcomes = outcomes.expect("the ranks start");
        assert!(outcomes.len() == ranks && outcomes.iter().all(|outcome| *outcome == outcomes[0]));
        outcomes.into_iter().next().expect("a rank")
    };
    let trusted = |network: &str| Policy::TrustedNetwork(network.parse().expect("a network"));
    for policy in [Policy::Any, Policy::RequireEncrypted, trusted("203.0.113.0/24")] {
        let error = agree(2, plaintext, policy).unwrap_err();
        assert!(matches!(error, Error::NotEncrypted { .. }), "{error}");
        assert!(error.to_string().starts_with("the transport of the run key sends plaintext"), "{error}");
    }
    // Every machine has the loopback network.
    let mut batches = Vec::new();
    for (ranks, channel, policy) in [
        (2, plaintext, trusted("127.0.0.0/8")),
        (2, Channel { encrypted: true, ..plaintext }, Policy::RequireEncrypted),
        (2, Channel::plaintext(Reach::Machine), Policy::RequireEncrypted),
        (1, plaintext, Policy::RequireEncrypted),
    ] {
        let batch = agree(ranks, channel, policy).expect("a key");
        assert!((300..700).contains(&batch.len()), "{} samples", batch.len());
        batches.push(batch);
    }
    batches.dedup();
    assert_eq!(batches.len(), 4, "each start has a key of its own");
}
