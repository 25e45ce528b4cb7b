//! How far results are apart: what tests, examples and benches compare by.

/// The largest of all |got − want|; ∞ where one of them is NaN.
///
/// # Panics
/// If there are not as many numbers on both sides, or none at all.
#[track_caller]
pub fn worst<'g, 'w>(
    got: impl IntoIterator<Item = &'g (impl Copy + Into<f64> + 'g)>,
    want: impl IntoIterator<Item = &'w (impl Copy + Into<f64> + 'w)>,
) -> f64 {
    apart(&numbers(got), &numbers(want))
}

/// [`worst`], relative to the largest number of `want` or 1.
///
/// # Panics
/// As [`worst`] does.
#[track_caller]
pub fn worst_relative<'g, 'w>(
    got: impl IntoIterator<Item = &'g (impl Copy + Into<f64> + 'g)>,
    want: impl IntoIterator<Item = &'w (impl Copy + Into<f64> + 'w)>,
) -> f64 {
    let want = numbers(want);
    match apart(&numbers(got), &want) {
        // ∞ / ∞ would be NaN.
        f64::INFINITY => f64::INFINITY,
        worst => worst / largest(want.into_iter().chain([1.0])),
    }
}

fn numbers<'a>(values: impl IntoIterator<Item = &'a (impl Copy + Into<f64> + 'a)>) -> Vec<f64> {
    values.into_iter().map(|&value| value.into()).collect()
}

#[track_caller]
fn apart(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "worst: the numbers of `got` and of `want`");
    assert!(!want.is_empty(), "worst: there is nothing to compare");
    largest(got.iter().zip(want).map(|(got, want)| got - want))
}

/// The largest absolute number. `f64::max` alone would drop NaN.
fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |most, value| match value.is_nan() {
        true => f64::INFINITY,
        false => most.max(value.abs()),
    })
}

#[test]
fn the_worst_difference_is_taken_of_all_numbers() {
    assert_eq!(worst(&[1.0, -2.0, 4.0], &[1.0, 2.0, 3.5]), 4.0);
    assert_eq!(worst(&[1_f32], &[1.25_f64]), 0.25);
    assert_eq!(worst_relative(&[1.0, 8.0], &[0.0, -8.0]), 2.0);
    assert_eq!(worst_relative(&[0.5], &[0.25]), 0.25);
}

#[test]
fn numbers_that_are_not_finite_are_infinitely_far() {
    let (nan, infinite) = (f64::NAN, f64::INFINITY);
    for (got, want) in [(nan, nan), (nan, 1.0), (1.0, nan), (infinite, infinite), (infinite, 1.0)] {
        for (got, want) in [([got, 1.0], [want, 1.0]), ([1.0, got], [1.0, want])] {
            assert_eq!(worst(&got, &want), infinite, "{got:?} and {want:?}");
            assert_eq!(worst_relative(&got, &want), infinite, "{got:?} and {want:?}");
        }
    }
}

#[test]
#[should_panic(expected = "left: 1\n right: 2")]
fn a_number_that_is_missing_is_no_agreement() {
    worst(&[1.0], &[1.0, 2.0]);
}

#[test]
#[should_panic(expected = "nothing to compare")]
fn nothing_agrees_with_nothing() {
    let none: [f64; 0] = [];
    worst_relative(&none, &none);
}
