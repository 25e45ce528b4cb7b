//! Serves requests by continuous batching with a decoder on 1, 2 and 3 tensor-parallel ranks. The
//! cache has two slots, and another thread fills the queue of requests. A request gets a slot as
//! soon as one is free, so that a step mixes the prompts of new requests with the last tokens of
//! running ones. Each request must get the tokens that it gets without other requests.
//!
//! `cargo run --release --bin serve`

use shardwise::{models::*, prelude::*};
use std::{
    collections::BTreeMap,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

const SLOTS: usize = 2;
/// The largest number of tokens of a prompt and its answer together.
const ROOM: usize = 32;
/// How long a rank waits for the others in a collective. Before one of the requests, the queue is
/// empty for longer than this deadline.
const DEADLINE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(100);

/// The request's number, its prompt, and the number of new tokens.
type Request = (usize, Vec<u32>, usize);
type Model = Decoder<Replicated, f64, Cpu>;

/// A request that has a slot.
struct Running {
    slot: usize,
    id: usize,
    wanted: usize,
    /// The tokens that are not in the cache yet: first the prompt, later the last token.
    unread: Vec<u32>,
    tokens: Vec<u32>,
}

fn main() -> Result<()> {
    // The milliseconds before each request, the length of its prompt, and the number of new tokens.
    let plan = [(0, 5, 12), (0, 3, 4), (1, 7, 6), (1500, 4, 8), (1, 9, 5)];
    let prompt = |id: usize, length: usize| (0..length).map(|at| (97 * id + 31 * at) as u32 % 1000).collect();
    let requests = plan.iter().enumerate().map(|(id, &(_, length, wanted))| (id, prompt(id, length), wanted));
    let requests: Vec<Request> = requests.collect();

    let model = load(&Group::solo(&Cpu::new()))?;
    let expected = requests.iter().map(|request| Ok((request.0, alone(&model, request)?)));
    let expected: BTreeMap<usize, Vec<u32>> = expected.collect::<Result<_>>()?;

    for ranks in 1..=3 {
        println!("{ranks} ranks:");
        let (sender, receiver) = mpsc::channel();
        let queue = Mutex::new(receiver);
        let served = thread::scope(|scope| {
            scope.spawn(|| fill(sender, plan.map(|(pause, ..)| Duration::from_millis(pause)), &requests));
            launch::Threads::new(ranks).deadline(DEADLINE).run(|world| serve(&world, &queue))
        })?;
        for (id, tokens) in &served[0] {
            println!("  request {id}: {tokens:?}");
        }
        if served.iter().any(|rank| *rank != expected) {
            return Err(Error::invalid(
                "serve",
                format!("{served:?} on {ranks} ranks, but alone {expected:?}"),
            ));
        }
    }
    println!("Every request got the tokens that it gets alone.");
    Ok(())
}

fn fill(queue: Sender<Request>, pauses: [Duration; 5], requests: &[Request]) {
    for (pause, request) in pauses.into_iter().zip(requests) {
        thread::sleep(pause);
        // A send fails only after the ranks have failed, and the ranks report their own error.
        let _ = queue.send(request.clone());
    }
}

fn load(group: &Group<Cpu>) -> Result<Model> {
    let block = BlockConfig::new(
        AttentionConfig::new(48, 6).with_choices(AttentionChoices::CAUSAL),
        128,
        Activation::Silu,
        NormKind::RmsNorm { eps: 1e-5 },
    )
    .with_gate(true);
    let mut config = DecoderConfig::new(1000, block, 2);
    // Unties the head, because a random model with a tied head only repeats the last token.
    config.tied = false;
    config.positions = Some(ROOM);
    Decoder::load(group, &Random::normal(1, 0.2), &config)
}

/// Returns the tokens that a request gets with a cache of its own.
fn alone(model: &Model, (_, prompt, wanted): &Request) -> Result<Vec<u32>> {
    let mut cache = model.cache(1, ROOM)?;
    let (mut unread, mut tokens) = (prompt.clone(), Vec::new());
    while tokens.len() < *wanted {
        let logits = model.step(&unread, &[0], &[unread.len()], &mut cache)?;
        unread = Sampler::greedy().sample(&logits, &[cache.len(0) as u64])?;
        tokens.extend(&unread);
    }
    Ok(tokens)
}

/// Rank 0 reads the queue and broadcasts the result: a request, if there is one, and whether
/// further requests may follow.
fn receive(
    world: &Group<Cpu>,
    queue: &Mutex<Receiver<Request>>,
    wait: bool,
) -> Result<(Option<Request>, bool)> {
    let poll = |patience| match queue.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(patience) {
        Ok(request) => Some((Some(request), true)),
        Err(RecvTimeoutError::Disconnected) => Some((None, false)),
        Err(RecvTimeoutError::Timeout) => None,
    };
    let found = if wait {
        world.wait_for(0, || Ok(poll(POLL)))?
    } else if world.rank() == 0 {
        poll(Duration::ZERO)
    } else {
        None
    };
    let json = |error: serde_json::Error| Error::invalid("serve", error.to_string());
    let found = serde_json::to_vec(&found.unwrap_or((None, true))).map_err(json)?;
    serde_json::from_slice(&world.broadcast_bytes(0, &found)?).map_err(json)
}

/// Serves all requests and returns their tokens by number. All ranks make the same decisions,
/// because they receive the same requests.
fn serve(world: &Group<Cpu>, queue: &Mutex<Receiver<Request>>) -> Result<BTreeMap<usize, Vec<u32>>> {
    let model = load(world)?;
    let mut cache = model.cache(SLOTS, ROOM)?;
    let (mut running, mut done, mut open) = (Vec::<Running>::new(), BTreeMap::new(), true);
    loop {
        let is_free = |running: &[Running], slot| running.iter().all(|text| text.slot != slot);
        while open && let Some(slot) = (0..SLOTS).find(|&slot| is_free(&running, slot)) {
            let request;
            (request, open) = receive(world, queue, running.is_empty())?;
            let Some((id, unread, wanted)) = request else { break };
            running.push(Running { slot, id, wanted, unread, tokens: Vec::new() });
        }
        if running.is_empty() {
            return Ok(done);
        }
        let slots: Vec<usize> = running.iter().map(|text| text.slot).collect();
        let counts: Vec<usize> = running.iter().map(|text| text.unread.len()).collect();
        let ids: Vec<u32> = running.iter().flat_map(|text| text.unread.iter().copied()).collect();
        if world.rank() == 0 {
            let old = running.iter().filter(|text| !text.tokens.is_empty()).count();
            println!("  step: {} prompt tokens of {} new, {old} running", ids.len() - old, slots.len() - old);
        }
        let logits = model.step(&ids, &slots, &counts, &mut cache)?;
        // The sampler draws noise by a sequence's length, so each token gets different noise.
        let numbers: Vec<u64> = slots.iter().map(|&slot| cache.len(slot) as u64).collect();
        for (text, token) in running.iter_mut().zip(Sampler::greedy().sample(&logits, &numbers)?) {
            text.tokens.push(token);
            text.unread = vec![token];
        }
        for text in running.extract_if(.., |text| text.tokens.len() >= text.wanted) {
            cache.truncate(text.slot, 0)?;
            done.insert(text.id, text.tokens);
        }
    }
}
