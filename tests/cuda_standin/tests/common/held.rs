//! A stream that stands still, as one does whose collective waits for a peer.

use cuda_standin::{driver, stream::Progress};
use std::sync::Arc;

/// What was asked of the stream before goes on when this is dropped.
pub struct Held(Arc<Progress>);

pub fn hold(stream: usize) -> Held {
    let gate = Arc::<Progress>::default();
    let waiting = Arc::clone(&gate);
    let name = |who: &cuda_standin::memory::Accessor| {
        who.name.replace(Some("a collective".into()));
        Ok(())
    };
    driver::stream(stream).unwrap().push(true, name, move || waiting.wait(1)).unwrap();
    Held(gate)
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.reach(1);
    }
}
