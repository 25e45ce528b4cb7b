//! Matrix products on a device without memory: recorded with their operations and bytes.

use super::{Batch, Epilogue, Gemm, GemmTerm, check, check_terms, flops};
use crate::{
    device::{Device, Element, Meta, WorkKind},
    error::{Result, same_size},
    kernels::{Activation, MatMut, MatRef, Pointwise, pointwise::check_row},
};

impl Meta {
    /// Records a batch of products C ← A B + β C as one kernel. Operands with a stride of 0 are the
    /// same for all products.
    fn record_products<T: Element, C: Element>(&self, batch: Batch, [m, k, n]: [usize; 3], beta: f64) {
        let bytes = |stride: usize, rows: usize, cols: usize, size: usize| {
            let count = if stride == 0 { batch.count.min(1) } else { batch.count };
            [count, rows, cols, size].iter().fold(1, |all: u128, factor| all.saturating_mul(*factor as u128))
        };
        let [a, b] = [bytes(batch.a, m, k, size_of::<T>()), bytes(batch.b, k, n, size_of::<T>())];
        // With β = 0, C is not read.
        let c = bytes(batch.c, m, n, size_of::<C>()).saturating_mul(if beta == 0.0 { 1 } else { 2 });
        if c > 0 {
            let bytes = a.saturating_add(b).saturating_add(c);
            self.record(WorkKind::Product, T::DTYPE, flops(batch.count, [m, k, n]), bytes);
        }
    }
}

impl Gemm for Meta {
    fn gemm_batched<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        batch: Batch,
        _: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        check(batch, &a, &b, &c)?;
        self.record_products::<T, C>(batch, [a.rows(), a.cols(), b.cols()], beta);
        Ok(())
    }

    /// True, as on the CPU, so that layers take the same code paths and keep the same tensors.
    fn splits_exactly(&self) -> bool {
        true
    }

    /// Counts no memory for partial sums and records no additions of them, because on the CPU they
    /// are blocks in the cache.
    fn gemm_tree<T: Element>(
        &self,
        terms: &[GemmTerm<'_, T, Self>],
        c: MatMut<'_, T::Acc, Self>,
    ) -> Result<()> {
        check_terms(terms, &c)?;
        for (a, b) in terms.iter().flat_map(|term| &term.products) {
            self.record_products::<T, T::Acc>(Batch::ONE, [a.rows(), a.cols(), b.cols()], 0.0);
        }
        Ok(())
    }

    fn linear<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        Epilogue { bias, activation }: Epilogue<'_, '_, T, Self>,
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "activation";
        if let Some(bias) = bias {
            check_row("bias", "the bias", Self::len(bias), y.cols())?;
        }
        let Some((f, mut pre)) = activation else {
            self.gemm(1.0, x, w.t(), 0.0, y.reborrow())?;
            return bias.map_or(Ok(()), |bias| self.add_bias(bias, y));
        };
        same_size(OP, "rows of pre", pre.rows(), "rows of y", y.rows())?;
        same_size(OP, "columns of pre", pre.cols(), "columns of y", y.cols())?;
        self.linear(x, w, Epilogue { bias, activation: None }, pre.reborrow())?;
        self.activate(f, pre.read(), y)
    }

    fn linear_dx<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        through: Option<(Activation, MatRef<'_, T, Self>)>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "activation backward";
        let Some((f, pre)) = through else { return self.gemm(1.0, dy, w, 0.0, dx) };
        same_size(OP, "rows of pre", pre.rows(), "rows of dx", dx.rows())?;
        same_size(OP, "columns of pre", pre.cols(), "columns of dx", dx.cols())?;
        // The CPU kernel allocates one temporary of the size of its result.
        let mut product = self.empty::<T>(dx.rows() * dx.cols())?;
        let mut product = MatMut::<T, Self>::new(Self::slice_mut(&mut product), dx.rows(), dx.cols())?;
        self.gemm(1.0, dy, w, 0.0, product.reborrow())?;
        self.activate_backward(f, pre, product.read(), dx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Cpu,
        kernels::{Backend, Product},
        rng::Philox,
        tensor::Tensor,
    };

    fn mat<B: Device>(device: &B, rows: usize, cols: usize) -> Tensor<f32, B> {
        Tensor::empty(device, [rows, cols]).unwrap()
    }

    /// The operations that a call counts.
    fn counted(device: &Meta, call: impl FnOnce() -> Result<()>) -> u64 {
        let before = device.flops();
        call().unwrap();
        device.flops() - before
    }

    #[test]
    fn a_product_counts_two_operations_an_element_and_depth() {
        let device = Meta::new();
        let (x, w, dy) = (mat(&device, 5, 7), mat(&device, 11, 7), mat(&device, 5, 11));
        let (mut y, mut pre, mut dx) = (mat(&device, 5, 11), mat(&device, 5, 11), mat(&device, 5, 7));
        let (mut dw, mut db) = (mat(&device, 11, 7), mat(&device, 1, 11));
        let one = 2 * 5 * 7 * 11;
        let gemm = || device.gemm(1.0, x.mat(), w.mat().t(), 0.0, y.mat_mut()?);
        assert_eq!(counted(&device, gemm), one);
        let bias = Meta::narrow(dy.slice(), 0..11);
        let activation = Some((Activation::Silu, pre.mat_mut().unwrap()));
        let epilogue = Epilogue { bias: Some(bias), activation };
        let linear = || device.linear(x.mat(), w.mat(), epilogue, y.mat_mut()?);
        assert_eq!(counted(&device, linear), one);
        let through = Some((Activation::Silu, x.mat()));
        let backward = || device.linear_dx(dy.mat(), w.mat(), through, dx.mat_mut()?);
        assert_eq!(counted(&device, backward), one);
        let sums = db.slice_mut().unwrap();
        let weights = || device.linear_dw(dy.mat(), x.mat(), 1.0, dw.mat_mut()?, Some(sums));
        assert_eq!(counted(&device, weights), one);

        let batch = Batch { count: 3, a: 5, b: 0, c: 5 };
        let (a, b, mut c) = (mat(&device, 3, 5), mat(&device, 5, 5), mat(&device, 3, 5));
        let batched = || {
            let a = MatRef::<f32, Meta>::new(a.slice(), 1, 5)?;
            device.gemm_batched(batch, 1.0, a, b.mat(), 0.0, MatMut::<f32, Meta>::new(c.slice_mut()?, 1, 5)?)
        };
        assert_eq!(counted(&device, batched), 3 * 2 * 5 * 5);
        let products = vec![Product { a: a.mat(), b: b.mat(), beta: 0.0, c: c.mat_mut().unwrap() }];
        assert_eq!(counted(&device, || device.gemm_all(products)), 2 * 3 * 5 * 5);
    }

    #[test]
    fn a_tree_counts_its_products_and_takes_no_memory() {
        let device = Meta::new();
        let (a, b, mut c) = (mat(&device, 9, 6), mat(&device, 6, 20), mat(&device, 9, 20));
        let before = device.memory();
        let term = |range: std::ops::Range<usize>, merges| {
            let pair = (a.mat().columns(range.clone()), b.mat().block(range, 0..20));
            GemmTerm { products: vec![pair], merges }
        };
        let terms = [term(0..1, 0), term(1..3, 1), GemmTerm { products: vec![], merges: 0 }, term(3..6, 2)];
        let tree = || device.gemm_tree(&terms, c.mat_mut()?);
        assert_eq!(counted(&device, tree), 2 * 9 * 6 * 20);
        assert_eq!(device.memory(), before);
    }

    /// Makes products of every kind, the first of them large enough for several threads. Returns
    /// the operations that the device has counted after each product.
    fn products<B: Backend>(device: &B, flops: impl Fn(&B) -> u64) -> Result<Vec<u64>> {
        let (random, mut drawn, mut seen) = (Philox::stream(7, 0), 0, Vec::new());
        let mut below = |bound: usize| {
            drawn += 1;
            (random.uniform(drawn) * bound as f64) as usize
        };
        for case in 0..50 {
            // Up to 15 or up to 60, so that products are skinny or blocked.
            let mut size = || below(16) * [1, 4][below(2)];
            let [m, k, n] = if case == 0 { [170, 180, 190] } else { [size(), size(), size()] };
            let (x, w, dy) = (mat(device, m, k), mat(device, n, k), mat(device, m, n));
            let (mut y, mut pre, mut dx) = (mat(device, m, n), mat(device, m, n), mat(device, m, k));
            let mut dw = mat(device, n, k);
            let bias = mat(device, 1, n);
            device.gemm(1.0, x.mat(), w.mat().t(), 0.0, y.mat_mut()?)?;
            seen.push(flops(device));
            let epilogue = Epilogue { bias: Some(bias.slice()), activation: None };
            device.linear(x.mat(), w.mat(), epilogue, y.mat_mut()?)?;
            seen.push(flops(device));
            let activation = Some((Activation::Relu, pre.mat_mut()?));
            device.linear(x.mat(), w.mat(), Epilogue { bias: None, activation }, y.mat_mut()?)?;
            seen.push(flops(device));
            let through = Some((Activation::Relu, x.mat()));
            device.linear_dx(dy.mat(), w.mat(), through, dx.mat_mut()?)?;
            seen.push(flops(device));
            device.linear_dw(dy.mat(), x.mat(), 1.0, dw.mat_mut()?, None)?;
            seen.push(flops(device));
            let split = below(k + 1);
            let term = |depth: std::ops::Range<usize>, merges| {
                let products = vec![(x.mat().columns(depth.clone()), w.mat().columns(depth).t())];
                GemmTerm { products, merges }
            };
            device.gemm_tree(&[term(0..split, 0), term(split..k, 1)], y.mat_mut()?)?;
            seen.push(flops(device));
            let batch = Batch { count: 3, a: 0, b: 0, c: m * n };
            let mut all = mat(device, 3 * m, n);
            let c = MatMut::new(all.slice_mut()?, m, n)?;
            device.gemm_batched(batch, 1.0, x.mat(), w.mat().t(), 0.0, c)?;
            seen.push(flops(device));
            let one = |c| Product { a: x.mat(), b: w.mat().t(), beta: 0.0, c };
            device.gemm_all(vec![one(y.mat_mut()?), one(pre.mat_mut()?)])?;
            seen.push(flops(device));
        }
        Ok(seen)
    }

    #[test]
    fn a_cpu_counts_the_same_operations() {
        let threads = std::num::NonZeroUsize::new(2).unwrap();
        let planned = products(&Meta::new(), Meta::flops).unwrap();
        assert_eq!(products(&Cpu::new(), Cpu::flops).unwrap(), planned);
        assert_eq!(products(&Cpu::new().with_threads(threads), Cpu::flops).unwrap(), planned);
    }

    #[test]
    fn the_largest_products_do_not_overflow() {
        let device = Meta::new();
        let (a, b) = (mat(&device, usize::MAX, 0), mat(&device, 0, usize::MAX));
        // No tensor is that large, so the count is tested directly.
        let batch = Batch { count: usize::MAX, a: 1, b: 1, c: 1 };
        device.record_products::<f32, f32>(batch, [usize::MAX; 3], 1.0);
        assert_eq!(device.flops(), u64::MAX);
        assert!(Tensor::<f32, Meta>::empty(&device, [usize::MAX, usize::MAX]).is_err());
        assert!(device.gemm(1.0, a.mat(), b.mat(), 0.0, mat(&device, 0, 0).mat_mut().unwrap()).is_err());
    }

    #[test]
    fn operands_that_disagree_are_the_error_of_a_cpu() {
        fn errors<B: Backend>(device: &B) -> Vec<String> {
            let of = |rows, cols| mat(device, rows, cols);
            let (x, w, mut y, mut pre) = (of(5, 7), of(11, 7), of(5, 11), of(4, 11));
            let short = of(1, 10);
            let batch = Batch { count: 2, a: 35, b: 0, c: 0 };
            let term = |merges| GemmTerm { products: vec![(x.mat(), w.mat().t())], merges };
            let results = [
                device.gemm(1.0, x.mat(), w.mat(), 0.0, y.mat_mut().unwrap()),
                device.gemm(1.0, x.mat(), w.mat().t(), 0.0, pre.mat_mut().unwrap()),
                device.gemm_batched(batch, 1.0, x.mat(), w.mat().t(), 0.0, y.mat_mut().unwrap()),
                device.gemm_tree(&[term(1)], y.mat_mut().unwrap()),
                device.gemm_tree(&[term(0), term(0)], y.mat_mut().unwrap()),
                device.linear(
                    x.mat(),
                    w.mat(),
                    Epilogue { bias: Some(short.slice()), activation: None },
                    y.mat_mut().unwrap(),
                ),
                device.linear(
                    x.mat(),
                    w.mat(),
                    Epilogue { bias: None, activation: Some((Activation::Relu, pre.mat_mut().unwrap())) },
                    y.mat_mut().unwrap(),
                ),
                device.linear_dx(
                    x.mat(),
                    w.mat(),
                    Some((Activation::Relu, short.mat())),
                    y.mat_mut().unwrap(),
                ),
                device.add(x.mat(), w.mat(), y.mat_mut().unwrap()),
                device.gather(w.mat(), &[0, 1, 2, 3, 11], of(5, 7).mat_mut().unwrap()),
            ];
            results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
        }
        assert_eq!(errors(&Meta::new()), errors(&Cpu::new()));
    }
}
