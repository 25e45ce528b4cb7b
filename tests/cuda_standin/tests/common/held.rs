//! A stream that makes no progress, like one whose collective waits for a peer.

use cuda_standin::{driver, stream::Progress};
use std::sync::Arc;

/// Blocks the stream until this is dropped.
pub struct BlockedStream(Arc<Progress>);

pub fn block(stream: usize) -> BlockedStream {
    let gate = Arc::<Progress>::default();
    let waiting = Arc::clone(&gate);
    let name = |who: &cuda_standin::memory::Accessor| {
        who.name.replace(Some("a collective".into()));
        Ok(())
    };
    driver::stream(stream).unwrap().push(true, name, move || waiting.wait(1)).unwrap();
    BlockedStream(gate)
}

impl Drop for BlockedStream {
    fn drop(&mut self) {
        self.0.reach(1);
    }
}
