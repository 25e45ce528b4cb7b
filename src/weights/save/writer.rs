//! The rank that writes: its work, and the texts that ranks broadcast.

use crate::{
    comm::{Group, ReduceOp},
    error::{Error, Result},
    kernels::Backend,
    tensor::Tensor,
};
use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

/// The interval of all-reduces while a rank writes.
const HEARTBEAT: Duration = Duration::from_millis(50);

/// Runs `work` on rank `writer`, which returns the result. The other ranks wait, however long
/// `work` takes, and return `None`. If `work` fails, all ranks return its error.
///
/// Collectives: an all-reduce of one number every [`HEARTBEAT`] and at the end. After a failure,
/// two broadcasts.
pub(super) fn on_writer<R: Send, B: Backend>(
    group: &Group<B>,
    writer: usize,
    work: impl FnOnce() -> Result<R> + Send,
) -> Result<Option<R>> {
    const DONE: f64 = 0.0;
    const BUSY: f64 = 1.0;
    const FAILED: f64 = 2.0;
    let exchange = |state: f64| -> Result<f64> {
        let mut state = Tensor::<f64, B>::full(group.device(), [1], state)?;
        group.all_reduce(ReduceOp::Max, &mut state)?;
        Ok(state.to_vec()?[0])
    };
    let result = if group.rank() == writer {
        Some(thread::scope(|scope| -> Result<Result<R>> {
            let (send, finished) = channel();
            let work = move || {
                // Ignore the error: the receiver is gone if a collective failed, for example after
                // a rank was lost.
                let _ = send.send(work());
            };
            let thread = match thread::Builder::new().name("save".into()).spawn_scoped(scope, work) {
                Ok(thread) => thread,
                Err(error) => {
                    return Ok(Err(Error::invalid("save", format!("cannot start a thread: {error}"))));
                }
            };
            loop {
                match finished.recv_timeout(HEARTBEAT) {
                    Ok(result) => return Ok(result),
                    Err(RecvTimeoutError::Timeout) => exchange(BUSY)?,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
            }
            let _ = thread.join();
            Ok(Err(Error::internal("save", "the thread that writes panicked")))
        })?)
    } else {
        None
    };
    let mut state = exchange(if matches!(result, Some(Err(_))) { FAILED } else { DONE })?;
    while state == BUSY {
        state = exchange(DONE)?;
    }
    if state != FAILED {
        return result.transpose();
    }
    let text = match &result {
        Some(Err(Error::Io { path, reason, .. })) => format!("{}\0{reason}", path.display()),
        Some(Err(error)) => format!("\0{error}"),
        _ => String::new(),
    };
    let text = broadcast_text(group, writer, &text)?;
    result.transpose()?;
    let (path, reason) = text.split_once('\0').unwrap_or(("", &text));
    let reason = format!("rank {writer} failed: {reason}");
    Err(match path {
        "" => Error::invalid("save", reason),
        path => Error::io(path, &std::io::Error::other(reason)),
    })
}

/// Broadcasts a text from rank `root`.
pub(super) fn broadcast_text<B: Backend>(group: &Group<B>, root: usize, text: &str) -> Result<String> {
    let mut len = Tensor::<f64, B>::full(group.device(), [1], text.len() as f64)?;
    group.broadcast(root, &mut len)?;
    let mut bytes = vec![0.0_f32; len.to_vec()?[0] as usize];
    if bytes.is_empty() {
        return Ok(String::new());
    }
    if group.rank() == root {
        bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = f32::from(from));
    }
    let mut bytes = Tensor::<f32, B>::from_slice(group.device(), [bytes.len()], &bytes)?;
    group.broadcast(root, &mut bytes)?;
    let bytes = bytes.to_vec()?.into_iter().map(|byte| byte as u8).collect();
    String::from_utf8(bytes).map_err(|error| Error::invalid("save", error.to_string()))
}
