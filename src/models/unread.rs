//! The check for tensors of a checkpoint that no parameter of a model has read.

use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    tensor::{Param, WeightSource},
};
use std::collections::BTreeSet;

/// The largest number of names that an error lists.
const LISTED: usize = 3;

/// Rejects a source with a tensor under one of `roots` that no parameter in `params` has read. Such
/// a source belongs to a model that the configuration does not describe. Ignores tensors for which
/// `harmless` is true. Accepts a source that does not list its names.
pub(super) fn refuse_unread<T: Element, B: Backend>(
    op: &'static str,
    source: &dyn WeightSource,
    params: &[Param<T, B>],
    roots: &[impl AsRef<str>],
    harmless: impl Fn(&str) -> bool,
) -> Result<()> {
    let Some(names) = source.names() else { return Ok(()) };
    let mut read = BTreeSet::new();
    for param in params {
        read.extend(param.regions().iter().map(|region| region.tensor.clone()));
    }
    let below = |name: &str, root: &str| name.strip_prefix(root).is_some_and(|rest| rest.starts_with('.'));
    let unread = |name: &String| {
        roots.iter().any(|root| below(name, root.as_ref())) && !read.contains(name) && !harmless(name)
    };
    let unread: Vec<String> = names.into_iter().filter(unread).collect();
    if unread.is_empty() {
        return Ok(());
    }
    let mut listed: Vec<String> =
        unread.iter().take(LISTED).map(|name| format!("`{}`", name.escape_debug())).collect();
    if unread.len() > LISTED {
        listed.push("…".into());
    }
    let (count, s, listed) = (unread.len(), if unread.len() == 1 { "" } else { "s" }, listed.join(", "));
    let reason = format!(
        "the configuration's model has no parameter for {count} tensor{s} of the checkpoint: {listed}"
    );
    Err(Error::invalid(op, reason))
}
