//! Reference transformer block. Tests compare the outputs and all gradients of the tensor-parallel
//! block with the reference.

use super::{
    AttentionSpec, AttentionWeights, Mlp, Norm, SelfAttentionGrads, self_attention, self_attention_backward,
};
use ndarray::{Array, Array2, ArrayD, ArrayViewMutD, Dimension};
use std::ops::Range;

/// The position of the norms in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before each layer, within the residual branch, as in GPT-2 and Llama.
    Pre,
    /// After each residual sum, as in BERT.
    Post,
}

/// The weights and settings of a [`block`].
#[derive(Clone, Debug, PartialEq)]
pub struct BlockWeights {
    /// The heads of the attention.
    pub spec: AttentionSpec,
    /// The weights of the attention.
    pub attention: AttentionWeights,
    /// The norm before or after the attention.
    pub norm1: Norm,
    /// The norm before or after the MLP.
    pub norm2: Norm,
    /// The MLP.
    pub mlp: Mlp,
    /// The position of the norms.
    pub placement: NormPlacement,
}

impl BlockWeights {
    /// Lists the name and a copy of every parameter in a fixed order. Skips absent biases.
    ///
    /// The names are `attention.{q,k,v,o}.{weight,bias}`, `norm1.{weight,bias}`,
    /// `norm2.{weight,bias}`, `mlp.{up,down}.{weight,bias}` and `mlp.gate.weight`.
    pub fn named(&self) -> Vec<(&'static str, ArrayD<f64>)> {
        self.clone().named_mut().into_iter().map(|(name, array)| (name, array.to_owned())).collect()
    }

    /// Lists the name and a view of every parameter, as [`BlockWeights::named`].
    pub fn named_mut(&mut self) -> Vec<(&'static str, ArrayViewMutD<'_, f64>)> {
        fn norm(norm: &mut Norm) -> (ArrayViewMutD<'_, f64>, Option<ArrayViewMutD<'_, f64>>) {
            match norm {
                Norm::LayerNorm { gamma, beta, .. } => (view(gamma), Some(view(beta))),
                Norm::RmsNorm { gamma, .. } => (view(gamma), None),
            }
        }
        let a = &mut self.attention;
        let (norm1_weight, norm1_bias) = norm(&mut self.norm1);
        let (norm2_weight, norm2_bias) = norm(&mut self.norm2);
        let (up, up_bias, gate, down, down_bias) = match &mut self.mlp {
            Mlp::Plain { weights: w, .. } => {
                (&mut w.up, w.up_bias.as_mut(), None, &mut w.down, w.down_bias.as_mut())
            }
            Mlp::Gated { weights: w, .. } => (&mut w.up, None, Some(&mut w.gate), &mut w.down, None),
        };
        let named = [
            ("attention.q.weight", Some(view(&mut a.q))),
            ("attention.q.bias", a.q_bias.as_mut().map(view)),
            ("attention.k.weight", Some(view(&mut a.k))),
            ("attention.k.bias", a.k_bias.as_mut().map(view)),
            ("attention.v.weight", Some(view(&mut a.v))),
            ("attention.v.bias", a.v_bias.as_mut().map(view)),
            ("attention.o.weight", Some(view(&mut a.o))),
            ("attention.o.bias", a.o_bias.as_mut().map(view)),
            ("norm1.weight", Some(norm1_weight)),
            ("norm1.bias", norm1_bias),
            ("norm2.weight", Some(norm2_weight)),
            ("norm2.bias", norm2_bias),
            ("mlp.up.weight", Some(view(up))),
            ("mlp.up.bias", up_bias.map(view)),
            ("mlp.gate.weight", gate.map(view)),
            ("mlp.down.weight", Some(view(down))),
            ("mlp.down.bias", down_bias.map(view)),
        ];
        named.into_iter().filter_map(|(name, array)| Some((name, array?))).collect()
    }
}

fn view<D: Dimension>(array: &mut Array<f64, D>) -> ArrayViewMutD<'_, f64> {
    array.view_mut().into_dyn()
}

/// [`NormPlacement::Pre`]: `h = x + attn(norm1(x))`, `y = h + mlp(norm2(h))`.
/// [`NormPlacement::Post`]: `h = norm1(x + attn(x))`, `y = norm2(h + mlp(h))`.
///
/// `attn` is [`self_attention`]. `x, y: [tokens, hidden]`; `sequences` and `valid` as in
/// [`attention`](super::attention()). Source: Xiong et al., arXiv 2002.04745, table 1.
///
/// # Panics
/// When shapes disagree, and as [`attention`](super::attention()).
pub fn block(
    w: &BlockWeights,
    x: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
) -> Array2<f64> {
    let attn = |x: &Array2<f64>| self_attention(&w.spec, &w.attention, x, sequences, valid);
    match w.placement {
        NormPlacement::Pre => {
            let h = residual(x, attn(&w.norm1.apply(x)));
            residual(&h, w.mlp.apply(&w.norm2.apply(&h)))
        }
        NormPlacement::Post => {
            let h = w.norm1.apply(&residual(x, attn(x)));
            w.norm2.apply(&residual(&h, w.mlp.apply(&h)))
        }
    }
}

/// Returns `x + branch`. Panics if the shapes differ, because `+` would broadcast.
fn residual(x: &Array2<f64>, branch: Array2<f64>) -> Array2<f64> {
    assert_eq!(x.dim(), branch.dim(), "block: the shapes of x and of a residual branch");
    x + branch
}

/// The gradients of [`block`].
#[derive(Clone, Debug, PartialEq)]
pub struct BlockGrads {
    /// `[tokens, hidden]`.
    pub dx: Array2<f64>,
    /// The gradients, each in the field of its weight, and the settings of the block.
    /// [`BlockWeights::named`] lists the gradients.
    pub weights: BlockWeights,
}

/// `dh = dy + f'(h)ᵀ dy` through each residual sum `y = h + f(h)`: the gradients of [`block`].
///
/// `dy: [tokens, hidden]`.
///
/// # Panics
/// As [`block`], and when the shapes of `x` and `dy` differ.
pub fn block_backward(
    w: &BlockWeights,
    x: &Array2<f64>,
    sequences: &[Range<usize>],
    valid: Option<&[bool]>,
    dy: &Array2<f64>,
) -> BlockGrads {
    assert_eq!(x.dim(), dy.dim(), "block_backward: the shapes of x and of dy");
    let attn = |x: &Array2<f64>| self_attention(&w.spec, &w.attention, x, sequences, valid);
    let attn_backward = |x: &Array2<f64>, dy: &Array2<f64>| {
        self_attention_backward(&w.spec, &w.attention, x, sequences, valid, dy)
    };
    let (dx, attention, norm1, norm2, mlp) = match w.placement {
        NormPlacement::Pre => {
            let normalized = w.norm1.apply(x);
            let h = residual(x, attn(&normalized));
            let (dmlp, mlp) = w.mlp.backward(&w.norm2.apply(&h), dy);
            let (dnorm2, norm2) = w.norm2.backward(&h, &dmlp);
            let dh = dy + dnorm2;
            let SelfAttentionGrads { dx: dattn, weights: attention } = attn_backward(&normalized, &dh);
            let (dnorm1, norm1) = w.norm1.backward(x, &dattn);
            (dh + dnorm1, attention, norm1, norm2, mlp)
        }
        NormPlacement::Post => {
            let sum1 = residual(x, attn(x));
            let h = w.norm1.apply(&sum1);
            let sum2 = residual(&h, w.mlp.apply(&h));
            let (dsum2, norm2) = w.norm2.backward(&sum2, dy);
            let (dmlp, mlp) = w.mlp.backward(&h, &dsum2);
            let (dsum1, norm1) = w.norm1.backward(&sum1, &(dsum2 + dmlp));
            let SelfAttentionGrads { dx: dattn, weights: attention } = attn_backward(x, &dsum1);
            (dsum1 + dattn, attention, norm1, norm2, mlp)
        }
    };
    BlockGrads {
        dx,
        weights: BlockWeights { spec: w.spec.clone(), attention, norm1, norm2, mlp, placement: w.placement },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{assert_close, check_gradient, loss, one_sequence, random};
    use crate::reference::{Activation, GatedMlpWeights, MlpWeights};
    use ndarray::ShapeBuilder;

    /// Returns sin(k), sin(2k), sin(3k), …, because a program in any language can compute these
    /// numbers.
    fn wave<S: ShapeBuilder>(shape: S, k: f64) -> Array<f64, S::Dim> {
        let mut i = 0.0;
        Array::from_shape_simple_fn(shape, || {
            i += 1.0;
            (k * i).sin()
        })
    }

    /// BERT: biases, LayerNorm after the layers, a plain MLP, multi-head attention.
    fn bert() -> BlockWeights {
        let norm = |k: f64| Norm::LayerNorm { gamma: wave(4, k), beta: wave(4, k + 0.05), eps: 0.1 };
        BlockWeights {
            spec: AttentionSpec {
                heads: 2,
                kv_heads: 2,
                head_dim: 2,
                causal: false,
                window: None,
                scale: 0.7,
            },
            attention: AttentionWeights {
                q: wave((4, 4), 1.1),
                q_bias: Some(wave(4, 1.15)),
                k: wave((4, 4), 1.2),
                k_bias: Some(wave(4, 1.25)),
                v: wave((4, 4), 1.3),
                v_bias: Some(wave(4, 1.35)),
                o: wave((4, 4), 1.4),
                o_bias: Some(wave(4, 1.45)),
            },
            norm1: norm(1.5),
            norm2: norm(1.6),
            mlp: Mlp::Plain {
                weights: MlpWeights {
                    up: wave((5, 4), 1.7),
                    up_bias: Some(wave(5, 1.75)),
                    down: wave((4, 5), 1.8),
                    down_bias: Some(wave(4, 1.85)),
                },
                act: Activation::GeluErf,
            },
            placement: NormPlacement::Post,
        }
    }

    /// Llama: no biases, RMSNorm before the layers, a gated MLP, causal grouped-query attention
    /// with heads that are together wider than hidden.
    fn llama() -> BlockWeights {
        let norm = |k: f64| Norm::RmsNorm { gamma: wave(4, k), eps: 0.1 };
        BlockWeights {
            spec: AttentionSpec {
                heads: 4,
                kv_heads: 2,
                head_dim: 3,
                causal: true,
                window: None,
                scale: 0.6,
            },
            attention: AttentionWeights {
                q: wave((12, 4), 1.1),
                q_bias: None,
                k: wave((6, 4), 1.2),
                k_bias: None,
                v: wave((6, 4), 1.3),
                v_bias: None,
                o: wave((4, 12), 1.4),
                o_bias: None,
            },
            norm1: norm(1.5),
            norm2: norm(1.6),
            mlp: Mlp::Gated {
                weights: GatedMlpWeights {
                    gate: wave((5, 4), 1.7),
                    up: wave((5, 4), 1.8),
                    down: wave((4, 5), 1.9),
                },
                act: Activation::Silu,
            },
            placement: NormPlacement::Pre,
        }
    }

    /// Two packed sequences; row 3 is outside of both, rows 1 and 6 are padding.
    const SEQUENCES: [Range<usize>; 2] = [0..3, 4..7];
    const VALID: [bool; 7] = [true, false, true, true, true, true, false];

    /// The outputs for `x = wave((7, 4), 0.9)`, computed by an independent program in plain Python.
    const BERT: [[f64; 4]; 7] = [
        [2.4075433421469192, -0.08713249371730843, -1.3668537817464856, 0.24183495179269382],
        [2.4113199552565963, -0.08681249664497691, -1.3549243530274917, 0.24342922414355223],
        [2.403977622548146, -0.08731793443278152, -1.3763702217268399, 0.2407670580080835],
        [2.4694864816394317, -0.08464835638767218, -1.1482041856280245, 0.26515380294884894],
        [2.397344833370021, -0.08762965773993756, -1.3931258807884477, 0.23895767302475462],
        [2.422231211970882, -0.08597134151774961, -1.3190985508725384, 0.24802796987710274],
        [2.395746828911443, -0.08718532012561897, -1.3909952199975613, 0.2402804413790311],
    ];

    const LLAMA: [[f64; 4]; 7] = [
        [0.9530293517324983, -3.526909899086964, 6.004324993431008, -2.640253304743087],
        [-2.1647832516934944, -3.9533013867825857, 4.317740083797914, -0.1794645330187656],
        [1.9306924406851929, -3.6294901353466713, 4.022484965200794, -2.7304329618471543],
        [-0.7654755459546396, 0.035358229901401396, 0.8038158368778802, 0.9638599508634873],
        [2.0828892686933433, 0.48653602252509265, -3.0792016020011874, -0.2620706545397632],
        [-1.122285827617525, -1.5328893045415004, 4.965519352401969, -1.629589110625226],
        [1.494450772105729, -0.8065354266740018, -2.087584965211841, 0.3408274000762498],
    ];

    #[test]
    fn literals() {
        let x = wave((7, 4), 0.9);
        for (what, w, expected) in [("bert", bert(), BERT), ("llama", llama(), LLAMA)] {
            let y = block(&w, &x, &SEQUENCES, Some(&VALID));
            assert_close(what, &y, &Array2::from(expected.to_vec()), 1e-13);
        }
    }

    #[test]
    fn gradients() {
        let (x, dy) = (random((7, 4), 1), random((7, 4), 2));
        for (model, weights) in [("bert", bert()), ("llama", llama())] {
            for placement in [NormPlacement::Pre, NormPlacement::Post] {
                let w = BlockWeights { placement, ..weights.clone() };
                let run =
                    |w: &BlockWeights, x: &Array2<f64>| loss(block(w, x, &SEQUENCES, Some(&VALID)), &dy);
                let grads = block_backward(&w, &x, &SEQUENCES, Some(&VALID), &dy);
                check_gradient(&format!("{model} {placement:?} dx"), &x, &grads.dx, |x| run(&w, x));
                for (i, (name, gradient)) in grads.weights.named().into_iter().enumerate() {
                    let what = format!("{model} {placement:?} {name}");
                    check_gradient(&what, &w.named()[i].1, &gradient, |value| {
                        let mut w = w.clone();
                        w.named_mut()[i].1.assign(value);
                        run(&w, &x)
                    });
                }
            }
        }
    }

    #[test]
    fn names() {
        let names = |w: &BlockWeights| w.named().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let with_biases = [
            "attention.q.weight",
            "attention.q.bias",
            "attention.k.weight",
            "attention.k.bias",
            "attention.v.weight",
            "attention.v.bias",
            "attention.o.weight",
            "attention.o.bias",
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "mlp.up.weight",
            "mlp.up.bias",
            "mlp.down.weight",
            "mlp.down.bias",
        ];
        let gated = [
            "attention.q.weight",
            "attention.k.weight",
            "attention.v.weight",
            "attention.o.weight",
            "norm1.weight",
            "norm2.weight",
            "mlp.up.weight",
            "mlp.gate.weight",
            "mlp.down.weight",
        ];
        assert_eq!(names(&bert()), with_biases);
        assert_eq!(names(&llama()), gated);
        let dy = Array2::zeros((2, 4));
        let grads = block_backward(&llama(), &wave((2, 4), 0.9), &one_sequence(2), None, &dy);
        assert_eq!(names(&grads.weights), gated);
    }

    #[test]
    fn each_name_is_the_field_it_says() {
        fn of<D: Dimension>(w: &BlockWeights, name: &str, field: &Array<f64, D>) {
            let named = w.named().into_iter().find(|(n, _)| *n == name);
            assert_eq!(named.unwrap().1, field.clone().into_dyn(), "{name}");
        }
        let w = bert();
        let a = &w.attention;
        of(&w, "attention.q.weight", &a.q);
        of(&w, "attention.q.bias", a.q_bias.as_ref().unwrap());
        of(&w, "attention.k.weight", &a.k);
        of(&w, "attention.k.bias", a.k_bias.as_ref().unwrap());
        of(&w, "attention.v.weight", &a.v);
        of(&w, "attention.v.bias", a.v_bias.as_ref().unwrap());
        of(&w, "attention.o.weight", &a.o);
        of(&w, "attention.o.bias", a.o_bias.as_ref().unwrap());
        for (norm, name) in [(&w.norm1, "norm1"), (&w.norm2, "norm2")] {
            let Norm::LayerNorm { gamma, beta, .. } = norm else { panic!("{name} is a LayerNorm") };
            of(&w, &format!("{name}.weight"), gamma);
            of(&w, &format!("{name}.bias"), beta);
        }
        let Mlp::Plain { weights, .. } = &w.mlp else { panic!("a plain MLP") };
        of(&w, "mlp.up.weight", &weights.up);
        of(&w, "mlp.up.bias", weights.up_bias.as_ref().unwrap());
        of(&w, "mlp.down.weight", &weights.down);
        of(&w, "mlp.down.bias", weights.down_bias.as_ref().unwrap());

        let w = llama();
        let Mlp::Gated { weights, .. } = &w.mlp else { panic!("a gated MLP") };
        of(&w, "mlp.up.weight", &weights.up);
        of(&w, "mlp.gate.weight", &weights.gate);
        of(&w, "mlp.down.weight", &weights.down);
    }

    /// If both layers return 0, a pre-norm block is the identity, and a post-norm block applies
    /// only the norms.
    #[test]
    fn silent_layers_leave_the_residual() {
        let mut w = llama();
        for (name, mut array) in w.named_mut() {
            if name == "attention.o.weight" || name == "mlp.down.weight" {
                array.fill(0.0);
            }
        }
        let x = wave((3, 4), 0.9);
        assert_eq!(block(&w, &x, &one_sequence(3), None), x);
        w.placement = NormPlacement::Post;
        assert_eq!(block(&w, &x, &one_sequence(3), None), w.norm2.apply(&w.norm1.apply(&x)));
    }

    #[test]
    fn no_tokens() {
        for w in [bert(), llama()] {
            let x = Array2::zeros((0, 4));
            assert_eq!(block(&w, &x, &[], None).dim(), (0, 4));
            let grads = block_backward(&w, &x, &[], None, &x);
            assert!(grads.weights.named().iter().all(|(_, g)| g.iter().all(|&g| g == 0.0)));
        }
    }

    #[test]
    #[should_panic(expected = "block: the shapes of x and of a residual branch")]
    fn a_branch_that_would_broadcast_panics() {
        let mut w = llama();
        w.attention.o = wave((1, 12), 1.4);
        block(&w, &wave((2, 4), 0.9), &one_sequence(2), None);
    }

    #[test]
    #[should_panic(expected = "block_backward: the shapes of x and of dy")]
    fn disagreeing_shapes_panic() {
        block_backward(&llama(), &Array2::zeros((2, 4)), &[], None, &Array2::zeros((1, 4)));
    }
}
