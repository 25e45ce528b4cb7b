//! Reference feed-forward layers, plain and gated. Tests compare the tensor-parallel MLPs with
//! these functions, and the reference block uses them.

use super::{Activation, linear, linear_backward};
use ndarray::{Array1, Array2};

/// A feed-forward layer with its weights.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// [`mlp`].
    Plain {
        /// Its weights.
        weights: MlpWeights,
        /// The activation between `up` and `down`.
        act: Activation,
    },
    /// [`gated_mlp`].
    Gated {
        /// Its weights.
        weights: GatedMlpWeights,
        /// The activation of the gate.
        act: Activation,
    },
}

impl Mlp {
    /// `y = mlp(x)`, both `[tokens, hidden]`.
    ///
    /// # Panics
    /// When shapes disagree.
    pub fn apply(&self, x: &Array2<f64>) -> Array2<f64> {
        match self {
            Self::Plain { weights, act } => mlp(weights, *act, x),
            Self::Gated { weights, act } => gated_mlp(weights, *act, x),
        }
    }

    /// `(dx, dself)`: the gradients of [`Mlp::apply`]. `dself` has each gradient in the field of
    /// its weight.
    ///
    /// # Panics
    /// When shapes disagree.
    pub fn backward(&self, x: &Array2<f64>, dy: &Array2<f64>) -> (Array2<f64>, Self) {
        match self {
            Self::Plain { weights, act } => {
                let MlpGrads { dx, weights } = mlp_backward(weights, *act, x, dy);
                (dx, Self::Plain { weights, act: *act })
            }
            Self::Gated { weights, act } => {
                let GatedMlpGrads { dx, weights } = gated_mlp_backward(weights, *act, x, dy);
                (dx, Self::Gated { weights, act: *act })
            }
        }
    }
}

/// The weights of [`mlp`].
#[derive(Clone, Debug, PartialEq)]
pub struct MlpWeights {
    /// `[ffn, hidden]`.
    pub up: Array2<f64>,
    /// `[ffn]`.
    pub up_bias: Option<Array1<f64>>,
    /// `[hidden, ffn]`.
    pub down: Array2<f64>,
    /// `[hidden]`.
    pub down_bias: Option<Array1<f64>>,
}

/// `y = act(x upᵀ + up_bias) downᵀ + down_bias`.
///
/// `x, y: [tokens, hidden]`. Source: Vaswani et al., arXiv 1706.03762, section 3.3.
///
/// # Panics
/// When shapes disagree.
pub fn mlp(w: &MlpWeights, act: Activation, x: &Array2<f64>) -> Array2<f64> {
    let u = linear(x, &w.up, w.up_bias.as_ref());
    linear(&act.apply(&u), &w.down, w.down_bias.as_ref())
}

/// The gradients of [`mlp`].
#[derive(Clone, Debug, PartialEq)]
pub struct MlpGrads {
    /// `[tokens, hidden]`.
    pub dx: Array2<f64>,
    /// The gradients, each in the field of its weight. `None` for an absent bias.
    pub weights: MlpWeights,
}

/// `da = dy down`, `du = act'(u) ⊙ da`, `dx = du up` with `u = x upᵀ + up_bias`: the gradients of
/// [`mlp`].
///
/// `dy: [tokens, hidden]`.
///
/// # Panics
/// When shapes disagree.
pub fn mlp_backward(w: &MlpWeights, act: Activation, x: &Array2<f64>, dy: &Array2<f64>) -> MlpGrads {
    let u = linear(x, &w.up, w.up_bias.as_ref());
    let down = linear_backward(&act.apply(&u), &w.down, dy);
    let up = linear_backward(x, &w.up, &act.backward(&u, &down.dx));
    MlpGrads {
        dx: up.dx,
        weights: MlpWeights {
            up: up.dw,
            up_bias: w.up_bias.as_ref().map(|_| up.db),
            down: down.dw,
            down_bias: w.down_bias.as_ref().map(|_| down.db),
        },
    }
}

/// The weights of [`gated_mlp`].
#[derive(Clone, Debug, PartialEq)]
pub struct GatedMlpWeights {
    /// `[ffn, hidden]`.
    pub gate: Array2<f64>,
    /// `[ffn, hidden]`.
    pub up: Array2<f64>,
    /// `[hidden, ffn]`.
    pub down: Array2<f64>,
}

/// `y = (act(x gateᵀ) ⊙ (x upᵀ)) downᵀ`; with [`Activation::Silu`] this is SwiGLU.
///
/// `x, y: [tokens, hidden]`. Source: Shazeer, arXiv 2002.05202, section 2.
///
/// # Panics
/// When shapes disagree.
pub fn gated_mlp(w: &GatedMlpWeights, act: Activation, x: &Array2<f64>) -> Array2<f64> {
    assert_eq!(w.gate.dim(), w.up.dim(), "gated_mlp: the shapes of gate and of up");
    let g = linear(x, &w.gate, None);
    let u = linear(x, &w.up, None);
    linear(&(act.apply(&g) * u), &w.down, None)
}

/// The gradients of [`gated_mlp`].
#[derive(Clone, Debug, PartialEq)]
pub struct GatedMlpGrads {
    /// `[tokens, hidden]`.
    pub dx: Array2<f64>,
    /// The gradients, each in the field of its weight.
    pub weights: GatedMlpWeights,
}

/// `da = dy down`, `dg = act'(g) ⊙ u ⊙ da`, `du = act(g) ⊙ da`, `dx = dg gate + du up` with
/// `g = x gateᵀ`, `u = x upᵀ`: the gradients of [`gated_mlp`].
///
/// `dy: [tokens, hidden]`.
///
/// # Panics
/// When shapes disagree.
pub fn gated_mlp_backward(
    w: &GatedMlpWeights,
    act: Activation,
    x: &Array2<f64>,
    dy: &Array2<f64>,
) -> GatedMlpGrads {
    assert_eq!(w.gate.dim(), w.up.dim(), "gated_mlp_backward: the shapes of gate and of up");
    let g = linear(x, &w.gate, None);
    let u = linear(x, &w.up, None);
    let activated = act.apply(&g);
    let down = linear_backward(&(&activated * &u), &w.down, dy);
    let gate = linear_backward(x, &w.gate, &act.backward(&g, &(&down.dx * &u)));
    let up = linear_backward(x, &w.up, &(&down.dx * &activated));
    GatedMlpGrads {
        dx: gate.dx + up.dx,
        weights: GatedMlpWeights { gate: gate.dw, up: up.dw, down: down.dw },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{check_gradient, loss, random};
    use ndarray::array;

    fn plain() -> MlpWeights {
        MlpWeights {
            up: random((5, 3), 1),
            up_bias: Some(random(5, 2)),
            down: random((3, 5), 3),
            down_bias: Some(random(3, 4)),
        }
    }

    fn gated() -> GatedMlpWeights {
        GatedMlpWeights { gate: random((5, 3), 1), up: random((5, 3), 2), down: random((3, 5), 3) }
    }

    #[test]
    fn literals() {
        let x = array![[1.0, 2.0]];
        let w = MlpWeights {
            up: array![[1.0, 1.0], [1.0, -1.0]],
            up_bias: Some(array![1.0, 0.5]),
            down: array![[2.0, 5.0], [3.0, 5.0]],
            down_bias: Some(array![10.0, 20.0]),
        };
        // x upᵀ + up_bias = [4, -0.5], whose relu is [4, 0].
        assert_eq!(mlp(&w, Activation::Relu, &x), array![[18.0, 32.0]]);

        let w = GatedMlpWeights {
            gate: array![[1.0, 1.0], [1.0, -1.0]],
            up: array![[0.0, 2.0], [1.0, 0.0]],
            down: array![[2.0, 5.0], [3.0, 5.0]],
        };
        // relu(x gateᵀ) = [3, 0] and x upᵀ = [4, 1].
        assert_eq!(gated_mlp(&w, Activation::Relu, &x), array![[24.0, 36.0]]);
    }

    #[test]
    fn plain_gradients() {
        let (w, act, x, dy) = (plain(), Activation::GeluTanh, random((4, 3), 5), random((4, 3), 6));
        let grads = mlp_backward(&w, act, &x, &dy);
        check_gradient("dx", &x, &grads.dx, |x| loss(mlp(&w, act, x), &dy));
        check_gradient("up", &w.up, &grads.weights.up, |up| {
            loss(mlp(&MlpWeights { up: up.clone(), ..w.clone() }, act, &x), &dy)
        });
        check_gradient("down", &w.down, &grads.weights.down, |down| {
            loss(mlp(&MlpWeights { down: down.clone(), ..w.clone() }, act, &x), &dy)
        });
        let (up_bias, down_bias) = (w.up_bias.as_ref().unwrap(), w.down_bias.as_ref().unwrap());
        check_gradient("up_bias", up_bias, grads.weights.up_bias.as_ref().unwrap(), |bias| {
            loss(mlp(&MlpWeights { up_bias: Some(bias.clone()), ..w.clone() }, act, &x), &dy)
        });
        check_gradient("down_bias", down_bias, grads.weights.down_bias.as_ref().unwrap(), |bias| {
            loss(mlp(&MlpWeights { down_bias: Some(bias.clone()), ..w.clone() }, act, &x), &dy)
        });
    }

    #[test]
    fn gated_gradients() {
        let (w, act, x, dy) = (gated(), Activation::Silu, random((4, 3), 5), random((4, 3), 6));
        let grads = gated_mlp_backward(&w, act, &x, &dy);
        check_gradient("dx", &x, &grads.dx, |x| loss(gated_mlp(&w, act, x), &dy));
        check_gradient("gate", &w.gate, &grads.weights.gate, |gate| {
            loss(gated_mlp(&GatedMlpWeights { gate: gate.clone(), ..w.clone() }, act, &x), &dy)
        });
        check_gradient("up", &w.up, &grads.weights.up, |up| {
            loss(gated_mlp(&GatedMlpWeights { up: up.clone(), ..w.clone() }, act, &x), &dy)
        });
        check_gradient("down", &w.down, &grads.weights.down, |down| {
            loss(gated_mlp(&GatedMlpWeights { down: down.clone(), ..w.clone() }, act, &x), &dy)
        });
    }

    #[test]
    fn an_absent_bias_is_zero_and_has_no_gradient() {
        let (x, dy) = (random((4, 3), 5), random((4, 3), 6));
        let without = MlpWeights { up_bias: None, down_bias: None, ..plain() };
        let zero =
            MlpWeights { up_bias: Some(Array1::zeros(5)), down_bias: Some(Array1::zeros(3)), ..plain() };
        assert_eq!(mlp(&without, Activation::Silu, &x), mlp(&zero, Activation::Silu, &x));
        let grads = mlp_backward(&without, Activation::Silu, &x, &dy);
        assert_eq!((grads.weights.up_bias, grads.weights.down_bias), (None, None));
    }

    #[test]
    fn mlp_chooses_the_function() {
        let (act, x, dy) = (Activation::Silu, random((4, 3), 5), random((4, 3), 6));
        let layer = Mlp::Plain { weights: plain(), act };
        assert_eq!(layer.apply(&x), mlp(&plain(), act, &x));
        let MlpGrads { dx, weights } = mlp_backward(&plain(), act, &x, &dy);
        assert_eq!(layer.backward(&x, &dy), (dx, Mlp::Plain { weights, act }));

        let layer = Mlp::Gated { weights: gated(), act };
        assert_eq!(layer.apply(&x), gated_mlp(&gated(), act, &x));
        let GatedMlpGrads { dx, weights } = gated_mlp_backward(&gated(), act, &x, &dy);
        assert_eq!(layer.backward(&x, &dy), (dx, Mlp::Gated { weights, act }));
    }

    #[test]
    #[should_panic(expected = "gated_mlp: the shapes of gate and of up")]
    fn disagreeing_shapes_panic() {
        gated_mlp(
            &GatedMlpWeights { up: random((1, 3), 2), ..gated() },
            Activation::Silu,
            &random((1, 3), 4),
        );
    }
}
