//! Collectives of a save: the tensors of all ranks, their elements, and the work of the first rank.

use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::{Error, Result, same_shape, same_size},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, ParamRegion, Region, Tensor},
};
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

/// The maximal number of elements of one all-reduce.
const CHUNK: usize = 1 << 22;

/// The maximal number of bytes of one all-reduce, on all ranks together.
const CHUNK_BYTES: usize = 1 << 27;

/// The interval of all-reduces while the first rank writes.
const HEARTBEAT: Duration = Duration::from_millis(50);

/// Returns the tensors of the model: the tensors of the first rank in its order, then the tensors
/// that only later ranks have. Checks that each element has exactly one owner.
pub(super) fn all_tensors<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
) -> Result<Vec<(String, Shape)>> {
    /// The name of a tensor, its shape, and the regions that a rank owns.
    type Own = (String, Vec<usize>, Vec<Ranges>);
    let mut own: Vec<Own> = Vec::new();
    let mut places = BTreeMap::new();
    for param in params {
        for ParamRegion { tensor, region, owned, .. } in param.regions().iter() {
            let place = *places.entry(tensor.clone()).or_insert_with(|| {
                own.push((tensor.clone(), region.shape().dims().to_vec(), Vec::new()));
                own.len() - 1
            });
            if *owned && !region.extent().is_empty() {
                own[place].2.push(region.ranges().to_vec());
            }
        }
    }
    let bad = |error: serde_json::Error| Error::invalid("save", format!("the names of tensors: {error}"));
    let text = serde_json::to_string(&own).map_err(bad)?;
    let mut all: Vec<(String, Shape, Vec<Ranges>)> = Vec::new();
    let mut places = BTreeMap::new();
    for rank in 0..group.size() {
        for (name, dims, owned) in
            serde_json::from_str::<Vec<Own>>(&broadcast_text(group, rank, &text)?).map_err(bad)?
        {
            let place = *places.entry(name.clone()).or_insert_with(|| {
                all.push((name, Shape::new(&dims), Vec::new()));
                all.len() - 1
            });
            let (name, shape, regions) = &mut all[place];
            same_shape(
                "save",
                &format!("`{name}` of rank {rank}"),
                &dims,
                "that of an earlier rank",
                shape.dims(),
            )?;
            let is_duplicate =
                |new: &&Ranges| regions.iter().any(|old| old.iter().zip(*new).all(|(a, b)| overlap(a, b)));
            if let Some(new) = owned.iter().find(is_duplicate) {
                let reason = format!("{new:?} of `{name}` is owned by rank {rank} and by another rank");
                return Err(Error::invalid("save", reason));
            }
            regions.extend(owned);
        }
    }
    let len = |region: &Ranges| region.iter().map(ExactSizeIterator::len).product::<usize>();
    for (name, shape, regions) in &all {
        same_size(
            "save",
            &format!("the elements of `{name}` that the ranks of the group own"),
            regions.iter().map(len).sum(),
            "those of its shape",
            shape.len(),
        )?;
    }
    Ok(all.into_iter().map(|(name, shape, _)| (name, shape)).collect())
}

/// The ranges of a region, as [`Region::ranges`].
type Ranges = Vec<Range<usize>>;

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Gathers one tensor, a few rows at a time. On the rank where `host` is given, appends the tensor
/// to `host`.
pub(super) fn gather<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
    name: &str,
    shape: Shape,
    mut host: Option<&mut Vec<T>>,
) -> Result<()> {
    let mut own: Vec<(Region, Vec<T>)> = Vec::new();
    for param in params {
        let regions = param.regions();
        let regions: Vec<_> = regions.iter().filter(|own| own.owned && own.tensor == *name).collect();
        if regions.is_empty() {
            continue;
        }
        let (all, width) = (param.value()?.to_vec()?, param.shape().split_at(0).1);
        for ParamRegion { region, row, .. } in regions {
            let start = row * width;
            own.push((region.clone(), all[start..start + region.extent().len()].to_vec()));
        }
    }
    let rows = shape.dims().first().copied().unwrap_or(1);
    let width = shape.len().checked_div(rows).unwrap_or(0);
    let chunk = CHUNK.min(CHUNK_BYTES / size_of::<T>() / group.size());
    let at_a_time = (chunk / width.max(1)).max(1);
    let nothing = T::from_f64(-0.0);
    for first in (0..rows).step_by(at_a_time) {
        let range = first * width..rows.min(first + at_a_time) * width;
        let mut chunk = vec![nothing; range.len()];
        for (region, elements) in &own {
            let mut from = elements.as_slice();
            for source in region.runs() {
                let (elements, rest) = from.split_at(source.len());
                let (start, end) = (source.start.max(range.start), source.end.min(range.end));
                if start < end {
                    chunk[start - range.start..end - range.start]
                        .copy_from_slice(&elements[start - source.start..end - source.start]);
                }
                from = rest;
            }
        }
        let mut chunk = Tensor::<T, B>::from_slice(group.device(), [range.len()], &chunk)?;
        group.all_reduce(ReduceOp::Sum, &mut chunk)?;
        if let Some(host) = &mut host {
            host.extend(chunk.to_vec()?);
        }
    }
    Ok(())
}

/// Runs `work` on the first rank, which returns the result. The other ranks wait, however long
/// `work` takes, and return `None`. If `work` fails, all ranks return its error.
///
/// Collectives: an all-reduce of one number every [`HEARTBEAT`] and at the end. After a failure,
/// two broadcasts.
pub(super) fn on_first_rank<R: Send, B: Backend>(
    group: &Group<B>,
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
    let result = match group.rank() {
        0 => Some(thread::scope(|scope| -> Result<Result<R>> {
            let (send, finished) = channel();
            let work = move || {
                // Ignore the error: the receiver is gone if a collective failed, for example after
                // a rank was lost.
                let _ = send.send(work());
            };
            let writer = match thread::Builder::new().name("save".into()).spawn_scoped(scope, work) {
                Ok(writer) => writer,
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
            let _ = writer.join();
            Ok(Err(Error::internal("save", "the thread that writes panicked")))
        })?),
        _ => None,
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
    let text = broadcast_text(group, 0, &text)?;
    result.transpose()?;
    let (path, reason) = text.split_once('\0').unwrap_or(("", &text));
    Err(match path {
        "" => Error::invalid("save", format!("rank 0 failed: {reason}")),
        path => Error::io(path, &std::io::Error::other(format!("rank 0 failed: {reason}"))),
    })
}

/// Broadcasts a text from rank `root`.
fn broadcast_text<B: Backend>(group: &Group<B>, root: usize, text: &str) -> Result<String> {
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
