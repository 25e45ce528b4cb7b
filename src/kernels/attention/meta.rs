//! Attention on a device without memory: recorded with its operations and bytes.

use super::{Attention, AttentionSpec, CacheSpec, check, check_append, check_cached, flops};
use crate::{
    device::{Device, Element, Meta, MetaSlice, MetaSliceMut, WorkKind},
    error::{Result, same_size},
    kernels::{MatMut, MatRef, view::unit_columns},
};

impl Meta {
    /// Records attention with an output of `out` bytes and other operands of these bytes. Records
    /// nothing if the output has no elements.
    fn record_attention<T: Element>(&self, flops: u128, out: u128, others: &[u128]) {
        if out > 0 {
            let bytes = others.iter().fold(out, |sum, bytes| sum.saturating_add(*bytes));
            self.record(WorkKind::Attention, T::DTYPE, flops, bytes);
        }
    }
}

impl Attention for Meta {
    fn attention<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
        lse: MetaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        let kv_like = [("k", k.dims()), ("v", v.dims())];
        check("attention", spec, &[("q", q.dims()), ("out", out.dims())], &kv_like, Self::len_mut(&lse))?;
        let others = [q.bytes(), k.bytes(), v.bytes(), lse.bytes()];
        self.record_attention::<T>(flops::forward(spec), out.bytes(), &others);
        Ok(())
    }

    fn attention_backward<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatRef<'_, T, Self>,
        lse: MetaSlice<'_, T::Acc>,
        dout: MatRef<'_, T, Self>,
        dqkv: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "attention backward";
        let query_like = [("q", q.dims()), ("out", out.dims()), ("dout", dout.dims())];
        check(OP, spec, &query_like, &[("k", k.dims()), ("v", v.dims())], Self::len(lse))?;
        unit_columns(OP, dqkv.dims())?;
        same_size(OP, "rows of the gradient", dqkv.rows(), "rows of q", q.rows())?;
        let heads = spec.heads.kv_heads.saturating_mul(2).saturating_add(spec.heads.kv_of_query.len());
        let width = heads.saturating_mul(spec.heads.head_dim);
        same_size(OP, "columns of the gradient", dqkv.cols(), "those of q, k and v", width)?;
        let others = [q.bytes(), k.bytes(), v.bytes(), lse.bytes(), dout.bytes(), dqkv.bytes()];
        self.record_attention::<T>(flops::backward(spec), out.bytes(), &others);
        Ok(())
    }

    fn append_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        keys: MatMut<'_, T, Self>,
        values: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let from = [("k", k.dims()), ("v", v.dims())];
        check_append(spec, cache, from, [("the keys", keys.dims()), ("the values", values.dims())])?;
        self.record_elementwise::<T>(WorkKind::Other, 2 * k.bytes(), &[2 * v.bytes()]);
        Ok(())
    }

    fn attention_cached<T: Element>(
        &self,
        spec: &AttentionSpec<'_>,
        cache: &CacheSpec<'_>,
        q: MatRef<'_, T, Self>,
        k: MatRef<'_, T, Self>,
        v: MatRef<'_, T, Self>,
        out: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let kv_like = [("the keys", k.dims()), ("the values", v.dims())];
        check_cached(spec, cache, &[("q", q.dims()), ("out", out.dims())], &kv_like)?;
        // The kernel reads only the positions that a query attends to.
        let read = flops::cached_positions(spec) * spec.heads.kv_heads as u128;
        let read = 2 * read * spec.heads.head_dim as u128 * size_of::<T>() as u128;
        self.record_attention::<T>(flops::cached(spec), out.bytes(), &[q.bytes(), read]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Cpu,
        kernels::{AttentionChoices, Backend, QkvHeads},
        rng::Philox,
        shard::Sequences,
        tensor::Tensor,
    };

    /// Random integers below a bound.
    struct RandomIntegers(Philox, u64);

    impl RandomIntegers {
        fn below(&mut self, bound: usize) -> usize {
            self.1 += 1;
            (self.0.uniform(self.1) * bound as f64) as usize
        }
    }

    fn mat<B: Device>(device: &B, rows: usize, cols: usize) -> Tensor<f32, B> {
        Tensor::empty(device, [rows, cols]).unwrap()
    }

    /// The operations of a forward, a backward and, if the spec allows it, attention to a cache.
    fn counted<B: Backend>(device: &B, flops: impl Fn(&B) -> u64, spec: &AttentionSpec<'_>) -> [u64; 3] {
        let (rows, heads, dim) = (spec.sequences.rows(), spec.heads.kv_of_query.len(), spec.heads.head_dim);
        let (q, k) = (mat(device, rows, heads * dim), mat(device, rows, spec.heads.kv_heads * dim));
        let (mut out, mut lse) = (q.clone(), mat(device, rows, heads));
        let mut dqkv = mat(device, rows, (heads + 2 * spec.heads.kv_heads) * dim);
        let (to, sums) = (out.mat_mut().unwrap(), lse.slice_mut().unwrap());
        device.attention(spec, q.mat(), k.mat(), k.mat(), to, sums).unwrap();
        let forward = flops(device);
        let (o, grad) = (out.mat(), dqkv.mat_mut().unwrap());
        device.attention_backward(spec, q.mat(), k.mat(), k.mat(), o, lse.slice(), q.mat(), grad).unwrap();
        let backward = flops(device) - forward;
        if !spec.heads.choices.causal || spec.sequences.valid().is_some() {
            return [forward, backward, 0];
        }
        let (slots, capacity) = ((0..spec.sequences.len()).collect::<Vec<_>>(), 64);
        let cache = CacheSpec { slots: &slots, capacity };
        let cached = mat(device, slots.len() * spec.heads.kv_heads * capacity, dim);
        device
            .attention_cached(spec, &cache, q.mat(), cached.mat(), cached.mat(), out.mat_mut().unwrap())
            .unwrap();
        [forward, backward, flops(device) - forward - backward]
    }

    /// Counts the visible pairs one by one, for attention within sequences and for attention to a
    /// cache.
    fn one_by_one(spec: &AttentionSpec<'_>) -> [u64; 2] {
        let (window, mut pairs) = (spec.heads.choices.window.unwrap_or(usize::MAX), [0, 0]);
        for (sequence, rows) in spec.sequences.iter().enumerate() {
            for query in rows.clone() {
                let visible = |key: usize| {
                    let masked = spec.heads.choices.causal && (key > query || query - key >= window);
                    !masked && spec.sequences.valid().is_none_or(|valid| valid[key])
                };
                pairs[0] += rows.clone().filter(|&key| visible(key)).count() as u64;
                let place = spec.sequences.start(sequence) + query - rows.start;
                pairs[1] += (0..=place).filter(|key| place - key < window).count() as u64;
            }
        }
        pairs
    }

    #[test]
    fn operations_are_those_of_the_pairs_that_masks_leave() {
        let mut random = RandomIntegers(Philox::stream(3, 0), 0);
        for case in 0..300 {
            let lengths: Vec<usize> = (0..random.below(4)).map(|_| random.below(12)).collect();
            let mut sequences = Sequences::packed(lengths);
            if random.below(2) == 0 {
                let starts: Vec<usize> = (0..sequences.len()).map(|_| random.below(40)).collect();
                sequences = sequences.starting_at(&starts).unwrap();
            }
            if random.below(2) == 0 {
                let valid: Vec<bool> = (0..sequences.rows()).map(|_| random.below(3) > 0).collect();
                sequences = sequences.masked(&valid).unwrap();
            }
            let kv_heads = 1 + random.below(3);
            let kv_of_query: Vec<usize> = (0..random.below(5)).map(|_| random.below(kv_heads)).collect();
            let causal = random.below(3) > 0;
            let window = (causal && random.below(2) == 0).then(|| 1 + random.below(9));
            let choices = AttentionChoices { causal, window, scale: None };
            let heads = QkvHeads { kv_of_query, kv_heads, head_dim: 1 + random.below(5), choices };
            let spec = AttentionSpec { heads: &heads, sequences: &sequences };
            let width = heads.query_width() as u64;
            let [within, cached] = one_by_one(&spec).map(|pairs| pairs * width);
            let cached = if !causal || sequences.valid().is_some() { 0 } else { 4 * cached };
            let want = [4 * within, 10 * within, cached];
            assert_eq!(counted(&Meta::new(), Meta::flops, &spec), want, "case {case}: {spec:?}");
            assert_eq!(counted(&Cpu::new(), Cpu::flops, &spec), want, "case {case}: {spec:?}");
        }
    }

    #[test]
    fn the_longest_sequences_do_not_overflow() {
        let device = Meta::new();
        for (causal, window) in [(false, None), (true, None), (true, Some(usize::MAX)), (true, Some(3))] {
            let sequences = Sequences::one(usize::MAX);
            let choices = AttentionChoices { causal, window, scale: None };
            let of = |kv_of_query, kv_heads| QkvHeads { kv_of_query, kv_heads, head_dim: 1, choices };
            let sequences = &sequences;
            // Without heads the matrices have no elements.
            let (none, before) = (mat(&device, usize::MAX, 0), device.flops());
            let (mut out, mut lse) = (none.clone(), none.clone());
            let (to, sums) = (out.mat_mut().unwrap(), lse.slice_mut().unwrap());
            let spec = AttentionSpec { heads: &of(vec![], 0), sequences };
            device.attention(&spec, none.mat(), none.mat(), none.mat(), to, sums).unwrap();
            assert_eq!(device.flops(), before);
            let spec = AttentionSpec { heads: &of(vec![0, 0], 1), sequences };
            device.record_attention::<f32>(flops::backward(&spec), 1, &[u128::MAX]);
            assert_eq!(device.flops(), u64::MAX);
        }
    }

    #[test]
    fn operands_that_disagree_are_the_error_of_a_cpu() {
        fn errors<B: Backend>(device: &B) -> Vec<String> {
            let sequences = Sequences::packed([2, 3]).starting_at(&[0, 6]).unwrap();
            let choices = AttentionChoices::CAUSAL;
            let heads = QkvHeads { kv_of_query: vec![0, 0, 1], kv_heads: 2, head_dim: 4, choices };
            let spec = AttentionSpec { heads: &heads, sequences: &sequences };
            let (cache, small) =
                (CacheSpec { slots: &[0, 1], capacity: 9 }, CacheSpec { slots: &[0, 1], capacity: 8 });
            let (q, k, cached) = (mat(device, 5, 12), mat(device, 5, 8), mat(device, 36, 4));
            let (mut out, mut lse, mut keys) = (mat(device, 5, 12), mat(device, 5, 2), mat(device, 36, 4));
            let (mut dqkv, mut values) = (mat(device, 5, 27), mat(device, 36, 4));
            let enough = mat(device, 5, 3);
            let blind = AttentionChoices { window: Some(0), ..choices };
            let blind = QkvHeads { choices: blind, ..heads.clone() };
            let unseen = AttentionSpec { heads: &blind, ..spec };
            let (q, k, cached) = (q.mat(), k.mat(), cached.mat());
            let (o, l, d) = (&mut out, &mut lse, &mut dqkv);
            let results = [
                device.attention(&spec, q, k, k, o.mat_mut().unwrap(), l.slice_mut().unwrap()),
                device.attention(&spec, k, k, k, o.mat_mut().unwrap(), l.slice_mut().unwrap()),
                device.attention(&unseen, q, k, k, o.mat_mut().unwrap(), l.slice_mut().unwrap()),
                device.attention_backward(&spec, q, k, k, q, enough.slice(), q, d.mat_mut().unwrap()),
                device.attention_cached(&spec, &small, q, cached, cached, o.mat_mut().unwrap()),
                device.attention_cached(&spec, &cache, q, k, cached, o.mat_mut().unwrap()),
                device.append_cached(&spec, &small, k, k, keys.mat_mut().unwrap(), values.mat_mut().unwrap()),
            ];
            results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
        }
        assert_eq!(errors(&Meta::new()), errors(&Cpu::new()));
    }
}
