//! Reads the rotary embedding of a configuration.

use super::{HUGE, json::Json, positive};
use crate::{
    kernels::RopePairs,
    ops::{RopeConfig, RopeScaling},
};
use serde_json::Map;

/// Reads the rotary embedding from `rope_parameters`, or in older files from `rope_theta` and
/// `rope_scaling`. If a file has both `rope_parameters` and `rope_scaling`, takes `rope_scaling`,
/// as transformers does.
///
/// `partial_rotary_factor` must be 1. With another factor, transformers' models of these families
/// still rotate all features of a head, or fail.
pub(super) fn rope(json: &Json<'_>, head_dim: usize, context: usize) -> Result<RopeConfig, String> {
    let (new, old) = (json.object("rope_parameters")?, json.object("rope_scaling")?);
    let empty = Map::new();
    let inner = old.or(new).unwrap_or_else(|| Json::new(json.kind, &empty));
    if let Some(layers) = inner.nested() {
        return Err(format!("`{}` by type of layer (`{}`) is not known", inner.path, layers.escape_debug()));
    }
    for json in [json, &inner] {
        json.only("partial_rotary_factor", 1.0)?;
    }
    let (own, outer) = (inner.number("rope_theta")?, json.number("rope_theta")?);
    let base = positive("rope_theta", own.or(outer).unwrap_or(10000.0))?;
    let (kind, before) = (inner.text("rope_type")?, inner.text("type")?);
    let kind = kind.or(before).unwrap_or("default");
    let scaling = scaling(json, &inner, kind, context)?;
    inner.finish(&[])?;
    Ok(RopeConfig { dim: head_dim, base, pairs: RopePairs::Halves, scaling })
}

fn scaling(json: &Json<'_>, inner: &Json<'_>, kind: &str, context: usize) -> Result<RopeScaling, String> {
    let factor = || {
        let factor = inner.number("factor")?;
        positive("factor", factor.ok_or_else(|| format!("rope of type `{kind}` without a `factor`"))?)
    };
    // Some types need the trained length. It is a key of the configuration, a key of the rope
    // parameters, or otherwise the model's context.
    let key = "original_max_position_embeddings";
    let (outer, own) = (json.optional_size(key, HUGE)?, inner.optional_size(key, HUGE)?);
    let trained = outer.or(own).unwrap_or(context);
    let number = |key: &str, usual: f64| Ok::<_, String>(inner.number(key)?.unwrap_or(usual));
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        // Transformers uses the model's context for this type, so another trained length is an
        // error.
        "dynamic" if trained != context => {
            return Err(format!(
                "rope of type `dynamic` with `{key}` of {trained}, but `max_position_embeddings` is {context}"
            ));
        }
        "dynamic" => RopeScaling::DynamicNtk { factor: factor()?, trained },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low: number("low_freq_factor", 1.0)?,
            high: number("high_freq_factor", 4.0)?,
            trained,
        },
        "yarn" => {
            let factor = match inner.number("factor")? {
                None => context as f64 / trained as f64,
                Some(_) => factor()?,
            };
            let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
            let magnitude = match (
                inner.number("attention_factor")?,
                inner.number("mscale")?.filter(|scale| *scale != 0.0),
                inner.number("mscale_all_dim")?.filter(|scale| *scale != 0.0),
            ) {
                (Some(magnitude), ..) => magnitude,
                (None, Some(one), Some(all)) => scale(one) / scale(all),
                _ => RopeScaling::yarn_magnitude(factor),
            };
            RopeScaling::Yarn {
                factor,
                trained,
                fast: number("beta_fast", 32.0)?,
                slow: number("beta_slow", 1.0)?,
                truncate: inner.flag("truncate")?.unwrap_or(true),
                magnitude,
            }
        }
        other => return Err(format!("rope of type `{}` is not known", other.escape_debug())),
    })
}
