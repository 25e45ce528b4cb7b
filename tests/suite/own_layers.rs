//! User-defined linear layers, built from the public API, at the edges of a tensor-parallel region.

use crate::{
    dev::Dev,
    invariant::same_bits,
    support::{Case, Spread, arrays, matrix, random, run},
};
use shardwise::{
    Result, Site, Tensor,
    comm::{Group, Overlap},
    kernels::Backend,
    ops,
    parallel::{
        Bias, ColumnParallelLinear, Columns, DTensor, Enter, Layer, Leave, Linear, ResidualStream,
        RowParallelLinear,
    },
    shard::{Copied, Partial, Partition, Replicated, Shard},
    tensor::{Param, Region, Role, Weights},
};

/// A weight with dimension `dim` sharded over the ranks.
struct Sharded<B: Backend> {
    group: Group<B>,
    weight: Param<f64, B>,
    partition: Partition,
    features: [usize; 2],
}

impl<B: Backend> Sharded<B> {
    fn load(
        group: &Group<B>,
        weights: &Weights<'_>,
        [inputs, outputs]: [usize; 2],
        dim: usize,
    ) -> Result<Self> {
        let partition = group.even_partition([outputs, inputs][dim])?;
        let region = Region::whole([outputs, inputs]).narrow(dim, partition.range(group.rank()));
        let weight = Param::load_region(group.device(), weights, "weight", Role::Weight, region, true)?;
        Ok(Self { group: group.clone(), weight, partition, features: [inputs, outputs] })
    }

    fn product(&self, x: &Tensor<f64, B>) -> Result<Tensor<f64, B>> {
        Ok(ops::linear(x, &self.weight.value()?, None, None)?.0)
    }

    fn back(&self, dy: &Tensor<f64, B>) -> Result<Tensor<f64, B>> {
        ops::linear_dx(dy, &self.weight.value()?, None)
    }

    fn grad(&self, x: &Tensor<f64, B>, dy: &Tensor<f64, B>) -> Result<()> {
        let mut dw = Tensor::empty(x.device(), self.weight.shape())?;
        ops::linear_dw(x.device(), (dy.mat(), x.mat()), 0.0, dw.mat_mut()?, None)?;
        self.weight.add_grad(dw)
    }
}

/// Defines a linear layer between two placements by a [`Sharded`] weight.
macro_rules! own {
    ($name:ident, $from:ty => $to:ty, |$layer:ident, $local:ident| $output:expr, $input_grad:expr) => {
        struct $name<B: Backend>(Sharded<B>);

        impl<B: Backend> Layer<f64, B> for $name<B> {
            type In = $from;
            type Out = $to;
            type Saved = Tensor<f64, B>;

            fn forward(&self, x: DTensor<$from, f64, B>) -> Result<(DTensor<$to, f64, B>, Tensor<f64, B>)> {
                x.check("own", &self.0.group)?;
                let ($layer, $local) = (&self.0, self.0.product(x.local())?);
                Ok(($output?, x.into_local()))
            }

            fn backward(
                &self,
                x: Tensor<f64, B>,
                dy: DTensor<Dual<$to>, f64, B>,
            ) -> Result<DTensor<Dual<$from>, f64, B>> {
                let dx = self.input_grad(&dy)?;
                self.param_grads(&x, &dy)?;
                Ok(dx)
            }

            fn params(&self) -> Vec<Param<f64, B>> {
                vec![self.0.weight.clone()]
            }
        }

        impl<B: Backend> Linear<f64, B> for $name<B> {
            const OPS: [&'static str; 2] = ["own", "own backward"];

            fn group(&self) -> &Group<B> {
                &self.0.group
            }

            fn site(&self) -> Site {
                self.0.weight.site()
            }

            fn features(&self) -> [usize; 2] {
                self.0.features
            }

            fn splits(&self) -> [bool; 2] {
                [false; 2]
            }

            fn input_grad(&self, dy: &DTensor<Dual<$to>, f64, B>) -> Result<DTensor<Dual<$from>, f64, B>> {
                let ($layer, $local) = (&self.0, self.0.back(dy.local())?);
                $input_grad
            }

            fn param_grads(&self, x: &Tensor<f64, B>, dy: &DTensor<Dual<$to>, f64, B>) -> Result<()> {
                self.0.grad(x, dy.local())
            }
        }
    };
}

type Dual<P> = <P as shardwise::shard::Placement>::Dual;

own!(
    OwnColumn, Copied => Shard<1>,
    |layer, local| DTensor::shard(&layer.group, local, &layer.partition),
    DTensor::partial(&layer.group, local)
);
own!(
    OwnRow, Shard<1> => Partial,
    |layer, local| DTensor::partial(&layer.group, local),
    DTensor::shard(&layer.group, local, &layer.partition)
);

/// A user-defined layer at the edge of a region has the bits of the crate's layer, with and without
/// chunks.
fn agree<S: ResidualStream + Spread>(world: usize, overlap: Overlap) {
    let (tokens, inputs, outputs) = (9, 8, 11);
    let source = arrays([("weight", random(world as u64, "w", &[outputs, inputs]))]);
    let (x, dy) = (matrix(1, "x", tokens, inputs), matrix(1, "dy", tokens, outputs));
    let case = Case { overlap, ..Case::new(world, &x, &dy, &source) };
    let own = run!(f64, &case, |group, weights| {
        Ok(Enter::<S, _>::new(OwnColumn(Sharded::load(group, weights, [inputs, outputs], 0)?)))
    });
    let crates = run!(f64, &case, |group, weights| {
        let columns = Columns::even(group, outputs)?;
        ColumnParallelLinear::<S, f64, Dev>::load(group, weights, inputs, &columns, Bias::None)
    });
    same_bits("a column", &own.unwrap(), &crates.unwrap());
    let own = run!(f64, &case, |group, weights| {
        Ok(Leave::<S, _>::new(OwnRow(Sharded::load(group, weights, [inputs, outputs], 1)?)))
    });
    let crates = run!(f64, &case, |group, weights| {
        RowParallelLinear::<S, f64, Dev>::load(group, weights, &group.even_partition(inputs)?, outputs, false)
    });
    same_bits("a row", &own.unwrap(), &crates.unwrap());
}

#[test]
fn a_linear_layer_of_ones_own_works_at_the_edges_of_a_region() {
    for world in [1, 2, 3, 5, 8] {
        for overlap in [Overlap::Off, Overlap::Chunks(3)] {
            agree::<Replicated>(world, overlap);
            agree::<Shard<0>>(world, overlap);
        }
    }
}
