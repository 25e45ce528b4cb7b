//! The largest difference of two results. Tests, examples and benches compare results with it.

/// `max |got − want|`, and ∞ if any number is NaN or infinite.
///
/// # Panics
/// If the counts differ, or both are 0.
#[track_caller]
pub fn worst<'g, 'w>(
    got: impl IntoIterator<Item = &'g (impl Copy + Into<f64> + 'g)>,
    want: impl IntoIterator<Item = &'w (impl Copy + Into<f64> + 'w)>,
) -> f64 {
    largest_difference(&numbers(got), &numbers(want))
}

/// `max |got − want| / max(1, max |want|)`, and ∞ if any number is NaN or infinite.
///
/// ```
/// use shardwise::reference::worst_relative;
/// assert_eq!(worst_relative(&[1.0, 6.0], &[0.0, 8.0]), 0.25);
/// assert_eq!(worst_relative(&[f64::NAN], &[0.5]), f64::INFINITY);
/// ```
///
/// # Panics
/// As [`worst`].
#[track_caller]
pub fn worst_relative<'g, 'w>(
    got: impl IntoIterator<Item = &'g (impl Copy + Into<f64> + 'g)>,
    want: impl IntoIterator<Item = &'w (impl Copy + Into<f64> + 'w)>,
) -> f64 {
    let want = numbers(want);
    match largest_difference(&numbers(got), &want) {
        // ∞ / ∞ would be NaN.
        f64::INFINITY => f64::INFINITY,
        worst => worst / largest(want.into_iter().chain([1.0])),
    }
}

fn numbers<'a>(values: impl IntoIterator<Item = &'a (impl Copy + Into<f64> + 'a)>) -> Vec<f64> {
    values.into_iter().map(|&value| value.into()).collect()
}

#[track_caller]
fn largest_difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "worst: the lengths of `got` and of `want`");
    assert!(!want.is_empty(), "worst: there is nothing to compare");
    largest(got.iter().zip(want).map(|(got, want)| got - want))
}

/// Returns the largest absolute value, or ∞ if a value is NaN, because `f64::max` would drop NaN.
fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values
        .into_iter()
        .fold(0.0, |most, value| if value.is_nan() { f64::INFINITY } else { most.max(value.abs()) })
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
