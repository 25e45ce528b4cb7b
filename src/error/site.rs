//! The call site of a group's call.

use std::{cell::Cell, collections::BTreeSet, fmt, marker::PhantomData, panic::Location, sync::Mutex};

/// The site of a group's call: the layer that made the call, or a line of the program. Later
/// versions may add kinds of sites.
///
/// A layer's site is the layer's path in the model, as in a checkpoint:
/// ``layer `model.layers.3.mlp.down_proj` ``. The calls of your own layers have such a site if
/// `forward` and `backward` begin with [`Site::enter`]. Otherwise their site is a line of the
/// program.
///
/// ```
/// use shardwise::prelude::*;
/// let source = Random::normal(1, 0.02);
/// let error = launch::threads(2, |world| {
///     let weights = Weights::new(&source).at("model.router");
///     let device = world.device();
///     let weight = Param::<f32, _>::load(device, &weights, "w", Role::Weight, [1, 1], vec![])?;
///     let _site = weight.site().enter();
///     let mut x = Tensor::<f32>::zeros(device, [1 + world.rank()])?; // other shapes: an error
///     world.all_reduce(ReduceOp::Sum, &mut x)
/// });
/// assert!(error.unwrap_err().to_string().contains("at layer `model.router`"));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Site {
    /// The layer with this path.
    InLayer(&'static str),
    /// This line of the program.
    AtLine(&'static Location<'static>),
}

thread_local! {
    static CURRENT: Cell<Option<Site>> = const { Cell::new(None) };
}

impl Site {
    /// Returns the site that [`Site::enter`] has set on this thread, or else the caller's line.
    #[track_caller]
    pub fn here() -> Self {
        CURRENT.get().unwrap_or(Self::AtLine(Location::caller()))
    }

    /// Makes this the site of the thread's calls until the guard is dropped. Drop guards in the
    /// reverse order of their creation, as the end of nested blocks does.
    pub fn enter(self) -> SiteGuard {
        SiteGuard { outer: CURRENT.replace(Some(self)), thread: PhantomData }
    }
}

/// Restores the previous site when the guard is dropped: see [`Site::enter`].
#[must_use = "the site applies only until this guard is dropped"]
#[derive(Debug)]
pub struct SiteGuard {
    outer: Option<Site>,
    thread: PhantomData<*const ()>,
}

impl Drop for SiteGuard {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
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

/// Returns the path of the layer that owns these tensors: drops the last component of each name,
/// and takes the common prefix.
///
/// Leaks each distinct path once, because a [`Site`] holds the path as a `&'static str`.
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

/// Returns the leading components that two paths have in common.
fn common<'a>(left: &'a str, right: &str) -> &'a str {
    let common = left.split('.').zip(right.split('.')).take_while(|(left, right)| left == right);
    let len: usize = common.map(|(component, _)| component.len() + 1).sum();
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
