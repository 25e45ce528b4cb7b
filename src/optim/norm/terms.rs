//! Terms of sums of squares, computed on the device.

use crate::{
    device::Element,
    error::Result,
    kernels::{Backend, MatMut, MatRef},
    tensor::Tensor,
};

/// Terms of several sums, on the device. All terms are downloaded together, because each download
/// synchronizes with the device.
pub(super) struct Terms<B: Backend> {
    /// Buffers of terms, and the number of terms in each.
    rows: Vec<(Tensor<f64, B>, usize)>,
    parts: Vec<Part>,
}

/// Consecutive terms.
enum Part {
    /// `count` terms of one sum.
    Sum { count: usize, sum: usize },
    /// One term of each of these sums.
    Each(Vec<usize>),
    /// Two times `count` terms. The term of the sum is a times the product of their sums.
    Product { count: usize, a: f64, sum: usize },
    /// Twice as many terms as there are sums. A term of a sum is the product of two of them.
    Products(Vec<usize>),
}

impl<B: Backend> Default for Terms<B> {
    fn default() -> Self {
        Self { rows: Vec::new(), parts: Vec::new() }
    }
}

impl<B: Backend> Terms<B> {
    /// Adds Σ x² over each row of x to one sum.
    pub(super) fn squares<T: Element>(&mut self, device: &B, x: MatRef<'_, T, B>, sum: usize) -> Result<()> {
        self.place(device, x)?;
        self.parts.push(Part::Sum { count: x.rows(), sum });
        Ok(())
    }

    /// Adds Σ x² over row i of x to sum `sums[i]`.
    pub(super) fn squares_of_rows<T: Element>(
        &mut self,
        device: &B,
        x: MatRef<'_, T, B>,
        sums: Vec<usize>,
    ) -> Result<()> {
        self.place(device, x)?;
        self.parts.push(Part::Each(sums));
        Ok(())
    }

    /// Adds (Σ x²) (Σ y²) over row i of x and row i of y to sum `sums[i]`.
    pub(super) fn products_of_rows<T: Element>(
        &mut self,
        device: &B,
        (x, y): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        sums: Vec<usize>,
    ) -> Result<()> {
        self.place(device, x)?;
        self.place(device, y)?;
        self.parts.push(Part::Products(sums));
        Ok(())
    }

    /// Adds a (tr x) (tr y) of two square matrices of equal size to one sum.
    pub(super) fn product_of_traces<T: Element>(
        &mut self,
        (x, y): (&Tensor<T, B>, &Tensor<T, B>),
        (a, sum): (f64, usize),
    ) -> Result<()> {
        self.place_diagonal(x)?;
        self.place_diagonal(y)?;
        self.parts.push(Part::Product { count: x.shape().rows(), a, sum });
        Ok(())
    }

    /// Adds the elements of x to one sum.
    pub(super) fn elements<T: Element>(&mut self, x: &Tensor<T, B>, sum: usize) -> Result<()> {
        let (device, count) = (x.device(), x.len());
        let to = self.reserve(device, count)?;
        device.copy(MatRef::<T, B>::new(x.slice(), 1, count)?, MatMut::new(to, 1, count)?)?;
        self.parts.push(Part::Sum { count, sum });
        Ok(())
    }

    fn place_diagonal<T: Element>(&mut self, x: &Tensor<T, B>) -> Result<()> {
        let (device, count) = (x.device(), x.shape().rows());
        let Some(before) = count.checked_sub(1) else { return Ok(()) };
        // In rows of one element more, all elements of the diagonal but the last are in a column.
        let rows = B::narrow(x.slice(), 0..before * (count + 1));
        let column = MatRef::<T, B>::new(rows, before, count + 1)?.columns(0..1);
        device.copy(column, MatMut::new(self.reserve(device, before)?, before, 1)?)?;
        let last = B::narrow(x.slice(), count * count - 1..count * count);
        device.copy(MatRef::<T, B>::new(last, 1, 1)?, MatMut::new(self.reserve(device, 1)?, 1, 1)?)
    }

    fn place<T: Element>(&mut self, device: &B, x: MatRef<'_, T, B>) -> Result<()> {
        let place = self.reserve(device, x.rows())?;
        device.square_sums(x, place)
    }

    /// Reserves `count` adjacent terms.
    fn reserve(&mut self, device: &B, count: usize) -> Result<B::SliceMut<'_, f64>> {
        const TOGETHER: usize = 1 << 16;
        let fits = self.rows.last().is_some_and(|(rows, taken)| taken + count <= rows.len());
        if !fits {
            self.rows.push((Tensor::empty(device, [count.max(TOGETHER)])?, 0));
        }
        let last = self.rows.len() - 1;
        let (rows, taken) = &mut self.rows[last];
        *taken += count;
        Ok(B::narrow_mut(rows.slice_mut()?, *taken - count..*taken))
    }

    /// Downloads the terms and returns the sums, each in the order of its terms.
    pub(super) fn into_sums(self, count: usize) -> Result<Vec<f64>> {
        let mut terms = Vec::new();
        for (rows, taken) in &self.rows {
            let at = terms.len();
            terms.resize(at + taken, 0.0);
            rows.device().download(B::narrow(rows.slice(), 0..*taken), &mut terms[at..])?;
        }
        let (mut sums, mut rest) = (vec![0.0; count], &terms[..]);
        let mut take = |count: usize| {
            let (own, others) = rest.split_at(count);
            rest = others;
            own
        };
        for part in self.parts {
            match part {
                Part::Sum { count, sum } => sums[sum] += take(count).iter().sum::<f64>(),
                Part::Each(of) => of.iter().zip(take(of.len())).for_each(|(&sum, term)| sums[sum] += term),
                Part::Product { count, a, sum } => {
                    let [x, y] = [(); 2].map(|()| take(count).iter().sum::<f64>());
                    sums[sum] += a * x * y;
                }
                Part::Products(of) => {
                    let factors = take(of.len()).iter().zip(take(of.len()));
                    of.iter().zip(factors).for_each(|(&sum, (x, y))| sums[sum] += x * y);
                }
            }
        }
        Ok(sums)
    }
}
