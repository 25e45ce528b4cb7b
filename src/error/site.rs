//! Where a call of a group was made.

use std::{cell::Cell, collections::BTreeSet, fmt, marker::PhantomData, panic::Location, sync::Mutex};

/// Where a call of a group was made: the layer that made it, or a line of the program.
///
/// A layer is known by its path in the model, as in a checkpoint: ``layer
/// `model.layers.3.mlp.down_proj` ``. A layer of your own is, too, if it says so where its
/// `forward` and `backward` begin; else its calls have their lines.
///
/// ```
/// use shardwise::{Error, Result, Tensor, comm::ReduceOp, launch, tensor::{Param, Random, Role, Weights}};
/// let source = Random::normal(1, 0.02);
/// let error = launch::threads(2, |world| {
///     let weights = Weights::new(&source).at("model.router");
///     let weight = Param::<f32, _>::load(world.device(), &weights, "weight", Role::Weight, [1, 1], vec![])?;
///     let _site = weight.site().enter();
///     world.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::zeros(world.device(), [1 + world.rank()])?)
/// });
/// assert!(error.unwrap_err().to_string().contains("at layer `model.router`"));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// In the layer of this path.
    InLayer(&'static str),
    /// At this line.
    AtLine(&'static Location<'static>),
}

thread_local! {
    static CURRENT: Cell<Option<Site>> = const { Cell::new(None) };
}

impl Site {
    /// What [`Site::enter`] has said on this thread, or else the caller's line.
    #[track_caller]
    pub fn here() -> Self {
        CURRENT.get().unwrap_or(Self::AtLine(Location::caller()))
    }

    /// Calls of this thread are made here, until the guard is dropped. Guards have to be dropped in
    /// the reverse of the order in which they were made, as variables of nested blocks are.
    pub fn enter(self) -> SiteGuard {
        SiteGuard { before: CURRENT.replace(Some(self)), thread: PhantomData }
    }
}

/// PipelineEnds what [`Site::enter`] has begun.
#[must_use = "calls are made here until this is dropped"]
#[derive(Debug)]
pub struct SiteGuard {
    before: Option<Site>,
    thread: PhantomData<*const ()>,
}

impl Drop for SiteGuard {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InLayer(path) => write!(f, "layer `{}`", path.escape_debug()),
            Self::AtLine(line) => write!(f, "{}:{}", line.file(), line.line()),
        }
    }
}

/// The path of the layer of these tensors: what their names have in common, without each one's last
/// part.
///
/// Each path is kept once, as long as the process runs: errors carry it anywhere.
pub(crate) fn layer_of<'a>(tensors: impl Iterator<Item = &'a str>) -> &'static str {
    static PATHS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let path = tensors.map(|name| name.rsplit_once('.').map_or("", |(path, _)| path)).reduce(common);
    let path = path.unwrap_or_default();
    let mut paths = PATHS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(known) = paths.get(path) {
        return known;
    }
    let path: &'static str = Box::leak(path.into());
    paths.insert(path);
    path
}

/// The parts that two paths have in common at their beginnings.
fn common<'a>(left: &'a str, right: &str) -> &'a str {
    let parts = left.split('.').zip(right.split('.')).take_while(|(left, right)| left == right);
    let len: usize = parts.map(|(part, _)| part.len() + 1).sum();
    &left[..len.saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_what_its_tensors_have_in_common() {
        let layer = |names: &[&str]| layer_of(names.iter().copied());
        assert_eq!(layer(&["h.0.attn.c_attn.weight"; 3]), "h.0.attn.c_attn");
        assert_eq!(layer(&["l.3.attn.q.weight", "l.3.attn.k.weight", "l.3.attn.v.weight"]), "l.3.attn");
        assert_eq!(layer(&["a.bc.weight", "a.bd.weight"]), "a");
        assert_eq!(layer(&["a.b.weight", "b.b.weight"]), "");
        assert_eq!((layer(&["weight"]), layer(&[])), ("", ""));
        assert!(std::ptr::eq(layer(&["x.y"]), layer(&["x.z"])), "kept once");
    }

    #[test]
    fn the_innermost_site_holds_until_its_guard_is_dropped_or_unwound() {
        let line = Site::here();
        assert!(matches!(line, Site::AtLine(line) if line.file() == file!()));
        let outer = Site::InLayer("outer").enter();
        let inner = std::panic::catch_unwind(|| {
            let _inner = Site::InLayer("inner").enter();
            assert_eq!(Site::here(), Site::InLayer("inner"));
            std::panic::resume_unwind(Box::new("lost"));
        });
        assert!(inner.is_err());
        assert_eq!(Site::here(), Site::InLayer("outer"));
        drop(outer);
        assert!(matches!(Site::here(), Site::AtLine(_)));
    }
}
