//! Checks the head of a model with tied weights.

use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    tensor::{Param, Role, WeightSource},
};

/// The weights of a table that are compared at a time.
const COMPARED: usize = 1 << 18;

/// Rejects a head that differs from the embedding's table although the configuration ties the two.
/// Each rank compares its own rows. A row that differs or cannot be read is an error on every rank.
#[track_caller]
pub(super) fn refuse_another_head<T: Element, B: Backend>(
    group: &Group<B>,
    source: &dyn WeightSource,
    head: &str,
    param: &Param<T, B>,
) -> Result<()> {
    let (mut table, mut same) = (String::new(), true);
    let mut compare = || {
        if !B::HAS_VALUES {
            return Ok(());
        }
        for own in param.regions().iter() {
            source.check(head, &own.region)?;
            table.clone_from(&own.tensor);
            let (rows, width) = (own.region.ranges()[0].clone(), own.region.extent().cols());
            let strip = (COMPARED / width.max(1)).max(1);
            for start in rows.clone().step_by(strip) {
                // The source is read for both, because the parameter may be quantized.
                let part = own.region.clone().narrow(0, start..rows.end.min(start + strip));
                let [mut one, mut other] = [(); 2].map(|()| vec![T::default(); part.extent().len()]);
                source.read(&own.tensor, Role::Weight, &part, T::any_mut(one.as_mut_slice()))?;
                source.read(head, Role::Weight, &part, T::any_mut(other.as_mut_slice()))?;
                let equal = |(a, b): (&T, &T)| {
                    a.to_f64() == b.to_f64() || (a.to_f64().is_nan() && b.to_f64().is_nan())
                };
                same &= one.iter().zip(&other).all(equal);
            }
        }
        Ok(())
    };
    let compared = compare();
    let differs = f64::from(u8::from(compared.is_err() || !same));
    let differs = group.all_reduce_host(ReduceOp::Max, &[differs])?[0];
    compared?;
    if differs == 0.0 {
        return Ok(());
    }
    let reason = format!(
        "the configuration ties the head to the embedding, but `{head}` differs from `{table}`: to use `{head}`, set \
         `tie_word_embeddings` to false in config.json"
    );
    Err(Error::invalid("decoder", reason))
}
