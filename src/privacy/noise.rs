//! Gaussian noise by global index.

use super::{
    key::RunKey,
    normal::{COUNT, Words, normal},
};
use crate::{
    device::Element,
    error::{Error, Result, same_shape, same_size},
    kernels::Backend,
    tensor::{Param, Tensor},
};

const OP: &str = "noise";

/// g + s z: adds noise z ~ N(0, 1), scaled by s = `deviation`, to each element of a parameter's
/// gradient. Each sum is computed in f64 and rounded once.
///
/// z is a function of the key, the step, and the element's tensor and index in the whole tensor. So
/// every rank that holds an element adds the same noise, at every number of ranks, and no noise is
/// sent. Call it after the gradient is summed over the samples of all ranks, and only once for each
/// key and step: the same noise in two sums cancels in their difference.
///
/// On a device without values, it returns the gradient.
///
/// The proof of privacy assumes real numbers. Rounding to the element type can leak more in theory.
/// Source: Casacuberta et al., 2022: Widespread Underestimation of Sensitivity in
/// Differentially Private Libraries.
///
/// # Errors
/// When the deviation is negative or not finite, or the gradient has another shape than the
/// parameter.
pub(super) fn add_noise<T: Element, B: Backend>(
    key: &RunKey,
    step: u64,
    deviation: f64,
    param: &Param<T, B>,
    grad: &Tensor<T::Acc, B>,
) -> Result<Tensor<T::Acc, B>> {
    let name = param.name();
    if !(deviation >= 0.0 && deviation.is_finite()) {
        let reason =
            format!("the deviation of `{name}` is {deviation}, but it has to be at least 0 and finite");
        return Err(Error::invalid(OP, reason));
    }
    let what = format!("the gradient of `{name}`");
    same_shape(OP, &what, grad.shape().dims(), "the parameter", param.shape().dims())?;
    let (len, width) = (param.shape().len(), param.shape().split_at(0).1);
    // Elements without noise would be released as they are.
    let regions = param.regions();
    let mut spans: Vec<_> = regions.iter().map(|own| (own.row * width, own.region.extent().len())).collect();
    spans.sort_unstable();
    let covered = spans.into_iter().fold(0, |end, (start, len)| if start == end { end + len } else { end });
    let what = format!("the number of elements of `{name}` that its regions fill once, in order,");
    same_size(OP, &what, covered, "that of the parameter", len)?;
    if !B::HAS_VALUES {
        return Ok(grad.clone());
    }
    let mut values = grad.to_vec()?;
    let (mut words, mut noise): (Words, _) = ([[0; COUNT]; 4], [0.0; COUNT]);
    let mut add = |words: &Words, values: &mut [T::Acc]| {
        normal(words, &mut noise);
        for (value, z) in values.iter_mut().zip(&noise) {
            *value = T::Acc::from_f64(value.to_f64() + deviation * z);
        }
    };
    for own in regions.iter() {
        let stream = key.stream("noise", &own.tensor);
        // The elements `start..start + count` wait for their noise.
        let (mut start, mut count) = (own.row * width, 0);
        for run in own.region.runs() {
            stream.words(step, run.start as u64..run.end as u64, |_, of_element: [u64; 4]| {
                for (words, word) in words.iter_mut().zip(of_element) {
                    words[count] = word;
                }
                count += 1;
                if count == COUNT {
                    add(&words, &mut values[start..start + COUNT]);
                    (start, count) = (start + COUNT, 0);
                }
            });
        }
        add(&words, &mut values[start..start + count]);
    }
    Tensor::from_vec(param.device(), param.shape(), values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Cpu, Meta},
        tensor::{ParamRegion, Random, Region, Role, Weights},
    };
    use half::bf16;

    fn param<T: Element, B: Backend>(device: &B, tensor: &str, region: Region) -> Param<T, B> {
        let source = Random::normal(1, 0.02);
        Param::load_region(device, &Weights::new(&source), tensor, Role::Weight, region, true).unwrap()
    }

    /// The noise of a region, in f64.
    fn noise(seed: u64, step: u64, tensor: &str, region: Region) -> Vec<f64> {
        let (key, cpu) = (RunKey::known_without_privacy(seed), Cpu::new());
        let param = param::<f64, _>(&cpu, tensor, region);
        let zeros = Tensor::zeros(&cpu, param.shape()).unwrap();
        add_noise(&key, step, 1.0, &param, &zeros).unwrap().to_vec().unwrap()
    }

    const N: usize = 1_000_000;

    fn million(step: u64, tensor: &str) -> Vec<f64> {
        noise(1, step, tensor, Region::whole([1000, N / 1000]))
    }

    /// All bounds are 5 standard deviations, or for the distance of Kolmogorov and Smirnov a
    /// probability of 10⁻⁶: √(ln(2·10⁶) / (2 n)).
    #[test]
    fn noise_has_the_normal_distribution() {
        let mut values = million(0, "w");
        let n = N as f64;
        let moment = |power: i32| values.iter().map(|z| z.powi(power)).sum::<f64>() / n;
        for (power, mean, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let got = moment(power);
            assert!((got - mean).abs() < 5.0 * f64::sqrt(variance / n), "the mean of z^{power} is {got}");
        }
        // Neighbours are independent.
        let product = values.windows(2).map(|two| two[0] * two[1]).sum::<f64>() / n;
        assert!(product.abs() < 5.0 / n.sqrt(), "{product}");
        values.sort_unstable_by(f64::total_cmp);
        let distance = values.iter().enumerate().map(|(at, z)| {
            let below = 0.5 * libm::erfc(-z / std::f64::consts::SQRT_2);
            (below - at as f64 / n).abs().max(((at + 1) as f64 / n - below).abs())
        });
        let distance = distance.fold(0.0, |most, one| if one > most || one.is_nan() { one } else { most });
        assert!(distance < f64::sqrt(f64::ln(2e6) / (2.0 * n)), "{distance}");
        assert!(values[0] < -4.0 && values[N - 1] > 4.0, "{} to {}", values[0], values[N - 1]);
    }

    #[test]
    fn tensors_steps_and_keys_have_independent_noise() {
        let one = million(0, "w");
        let whole = Region::whole([1000, N / 1000]);
        for other in [million(1, "w"), million(0, "v"), noise(2, 0, "w", whole)] {
            assert_eq!(one.len(), other.len());
            let product = one.iter().zip(&other).map(|(a, b)| a * b).sum::<f64>() / N as f64;
            let squares =
                one.iter().zip(&other).map(|(a, b)| (a * a - 1.0) * (b * b - 1.0)).sum::<f64>() / N as f64;
            let bound = 5.0 / (N as f64).sqrt();
            assert!(product.abs() < bound && squares.abs() < 2.0 * bound, "{product}, {squares}");
        }
        assert_eq!(one, million(0, "w"));
    }

    #[test]
    fn a_shard_has_its_part_of_the_whole_noise() {
        let whole = Region::whole([6, 5, 4]);
        let all = noise(1, 9, "w", whole.clone());
        for part in [
            whole.clone().narrow(0, 2..5),
            whole.clone().narrow(1, 1..4),
            whole.clone().narrow(0, 5..6).narrow(1, 2..3).narrow(2, 1..4),
            whole.clone().narrow(0, 3..3),
        ] {
            let wanted: Vec<f64> = part.runs().into_iter().flatten().map(|at| all[at]).collect();
            assert_eq!(noise(1, 9, "w", part), wanted);
        }
        // A merged parameter has the rows of several tensors.
        let (cpu, source) = (Cpu::new(), Random::normal(1, 0.02));
        let of = |tensor: &str, region: Region, row| ParamRegion {
            tensor: tensor.into(),
            region,
            row,
            owned: false,
        };
        let (q, k) = (Region::whole([4, 3]).narrow(0, 1..3), Region::whole([2, 3]));
        let regions = vec![of("k", k.clone(), 2), of("q", q.clone(), 0)];
        let merged =
            Param::<f64, _>::load(&cpu, &Weights::new(&source), "qk", Role::Weight, [4, 3], regions).unwrap();
        let ones = Tensor::full(&cpu, [4, 3], 1.0).unwrap();
        let key = RunKey::known_without_privacy(1);
        let got = add_noise(&key, 2, 0.5, &merged, &ones).unwrap().to_vec().unwrap();
        let parts = [noise(1, 2, "q", q), noise(1, 2, "k", k)].concat();
        assert_eq!(got, parts.iter().map(|z| 1.0 + 0.5 * z).collect::<Vec<_>>());
    }

    #[test]
    fn the_sum_is_rounded_once_to_the_accumulator() {
        let (key, cpu) = (RunKey::known_without_privacy(1), Cpu::new());
        let param = param::<bf16, _>(&cpu, "w", Region::whole([40, 5]));
        let values: Vec<f32> = (0..200).map(|at| at as f32 / 7.0).collect();
        let grad = Tensor::<f32>::from_vec(&cpu, [40, 5], values.clone()).unwrap();
        let got = add_noise(&key, 0, 3.0, &param, &grad).unwrap().to_vec().unwrap();
        let noise = noise(1, 0, "w", Region::whole([40, 5]));
        assert_eq!((got.len(), noise.len()), (200, 200));
        for ((got, value), z) in got.iter().zip(values).zip(noise) {
            assert_eq!(*got, (f64::from(value) + 3.0 * z) as f32);
        }
    }

    #[test]
    fn bad_input_is_named() {
        let (key, cpu) = (RunKey::known_without_privacy(1), Cpu::new());
        let w = param::<f32, _>(&cpu, "w", Region::whole([4, 3]));
        let grad = |shape: [usize; 2]| Tensor::<f32>::zeros(&cpu, shape).unwrap();
        for deviation in [-1.0, f64::NAN, f64::INFINITY] {
            let error = add_noise(&key, 0, deviation, &w, &grad([4, 3])).unwrap_err().to_string();
            assert!(error.contains(&format!("the deviation of `w` is {deviation}")), "{error}");
        }
        let error = add_noise(&key, 0, 1.0, &w, &grad([3, 4])).unwrap_err();
        assert!(matches!(&error, Error::Shapes { left, .. } if left == "the gradient of `w`"), "{error}");
        // Rows that no region fills would have no noise.
        let source = Random::normal(1, 0.02);
        for rows in [vec![0], vec![1], vec![0, 0], vec![0, 3]] {
            let of = |&row: &usize| {
                let region = Region::whole([if row == 3 { 1 } else { 2 }, 3]);
                ParamRegion { tensor: format!("t{row}"), region, row, owned: true }
            };
            let regions = rows.iter().map(of).collect();
            let w = Param::<f32, _>::load(&cpu, &Weights::new(&source), "w", Role::Weight, [4, 3], regions)
                .unwrap();
            let error = add_noise(&key, 0, 1.0, &w, &grad([4, 3])).unwrap_err();
            assert!(matches!(error, Error::Sizes { right_size: 12, .. }), "{error}");
        }
        assert_eq!(add_noise(&key, 0, 0.0, &w, &grad([4, 3])).unwrap().to_vec().unwrap(), [0.0; 12]);
        let meta = Meta::new();
        let w = param::<f32, _>(&meta, "w", Region::whole([4, 3]));
        let grad = Tensor::<f32, _>::empty(&meta, [4, 3]).unwrap();
        assert_eq!(add_noise(&key, 0, 1.0, &w, &grad).unwrap().shape().dims(), [4, 3]);
    }
}
