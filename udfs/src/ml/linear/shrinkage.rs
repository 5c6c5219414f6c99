//! Shrinkage: how far a covariance is moved towards one that is the same in all directions.
//!
//! The covariance of few rows of many features is singular, and its small eigenvalues are too small.
//! With `S` the covariance and `p` the features, the shrunk one is `(1 - s) S + s tr(S)/p I`, as in
//! scikit-learn. Where `s` is automatic, that is done for features scaled to unit variance, as
//! scikit-learn does then, or features in small units would not count: with `D` the diagonal of `S`, the
//! shrunk covariance is `(1 - s) S + s D`.
//!
//! The automatic `s` is that of Chen, Y., Wiesel, A., Eldar, Y. C., Hero, A. O. (2010), "Shrinkage
//! Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing 58 (10),
//! 5016-5029, equation 17: the estimate of Ledoit and Wolf (2004) given the sufficient statistic `S`
//! of normal data, which by the Rao-Blackwell theorem is never further off. It needs `S` alone; theirs
//! needs the fourth powers of the deviations from each label's final mean, which no single pass over
//! rows that merge can have.

use arrow::datatypes::DataType;
use datafusion::common::{ScalarValue, plan_err};
use datafusion::error::Result;
use faer::MatRef;

/// The option of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Shrinkage {
    /// Found from the data.
    Auto,
    /// In [0, 1].
    Fixed(f64),
}

impl Shrinkage {
    /// The type to which an argument is coerced.
    ///
    /// # Errors
    /// A plan error where it is neither a word nor a number.
    pub(super) fn coerce(function: &str, data_type: &DataType) -> Result<DataType> {
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(DataType::Utf8),
            t if t.is_numeric() || t.is_null() => Ok(DataType::Float64),
            other => plan_err!("{function} takes the shrinkage as 'auto' or a number from 0 to 1, not {other}"),
        }
    }

    /// Reads an argument of a type that [`Self::coerce`] gave; automatic where there is none.
    ///
    /// # Errors
    /// A plan error for another word, or a number that is not in [0, 1].
    pub(super) fn try_new(function: &str, argument: Option<ScalarValue>) -> Result<Self> {
        let found = match argument {
            None => return Ok(Self::Auto),
            Some(ScalarValue::Utf8(Some(word))) if word == "auto" => return Ok(Self::Auto),
            Some(ScalarValue::Float64(Some(s))) if (0.0..=1.0).contains(&s) => return Ok(Self::Fixed(s)),
            Some(ScalarValue::Utf8(Some(word))) => format!("'{word}'"),
            Some(other) => other.to_string(),
        };
        plan_err!("{function}: the shrinkage is 'auto' or a number from 0 to 1, not {found}")
    }

    /// The shrinkage of a covariance that was estimated from `rows` rows, and what is added to its
    /// diagonal when the rest is multiplied by 1 less that. Of the covariance, p x p, times `rows`, the
    /// lower triangle is read; `variance` is that of a feature on average.
    pub(super) fn of(self, scatter: MatRef<'_, f64>, rows: u64, variance: f64) -> (f64, Vec<f64>) {
        match self {
            Self::Fixed(s) => (s, vec![s * variance; scatter.ncols()]),
            Self::Auto => {
                // A feature that is constant within the labels has no unit of its own: it gets the others'.
                let of_feature = |j: usize| match scatter[(j, j)] / rows as f64 {
                    own if own > 0.0 => own,
                    _ => variance,
                };
                let variances: Vec<f64> = (0..scatter.ncols()).map(of_feature).collect();
                let deviations = variances.iter().map(|variance| (variance * rows as f64).sqrt());
                let s = rao_blackwell(scatter, &deviations.collect::<Vec<_>>(), rows as f64);
                (s, variances.into_iter().map(|variance| s * variance).collect())
            }
        }
    }
}

/// `min(1, ((n - 2)/n tr(R²) + tr(R)²) / ((n + 2) (tr(R²) - tr(R)²/p)))` of the correlations `R`: the
/// scatter, scaled by the features' deviations.
fn rao_blackwell(scatter: MatRef<'_, f64>, deviations: &[f64], n: f64) -> f64 {
    let p = deviations.len() as f64;
    let correlation = |i: usize, j: usize| scatter[(i, j)] / deviations[i] / deviations[j];
    let column = |j: usize| {
        let below: f64 = (j + 1..deviations.len()).map(|i| correlation(i, j).powi(2)).sum();
        correlation(j, j).powi(2) + 2.0 * below
    };
    let of_square: f64 = (0..deviations.len()).map(column).sum();
    let trace: f64 = (0..deviations.len()).map(|j| correlation(j, j)).sum();
    let spread = (n + 2.0) * (of_square - trace * trace / p);
    // Without any spread of the eigenvalues, or any variance, there is nothing to keep.
    if spread > 0.0 {
        (((n - 2.0) / n * of_square + trace * trace) / spread).min(1.0)
    } else {
        1.0
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use faer::Mat;

    use super::*;

    /// A matrix of which only the lower triangle has a meaning.
    fn lower(rows: &[&[f64]]) -> Mat<f64> {
        Mat::from_fn(rows.len(), rows.len(), |i, j| *rows[i].get(j).unwrap_or(&f64::NAN))
    }

    #[test]
    fn the_automatic_amount_is_the_formula_whatever_the_units() {
        for (rows, matrix, expected) in [
            (30, lower(&[&[2.0], &[1.0, 2.0]]), 19.0 / 48.0),
            (30, lower(&[&[2e200], &[1e100, 2.0]]), 19.0 / 48.0),
            (5, lower(&[&[2.0], &[1.0, 2.0]]), 1.0),
            (10, lower(&[&[4.0], &[0.0, 1.0]]), 1.0),
            (10, lower(&[&[3.0]]), 1.0),
            (10, lower(&[&[0.0], &[0.0, 0.0]]), 1.0),
        ] {
            let (found, ridge) = Shrinkage::Auto.of(matrix.as_ref(), rows, 0.5);
            assert!((found - expected).abs() < 1e-14, "{found} is not {expected}");
            for (j, ridge) in ridge.into_iter().enumerate() {
                let variance = matrix[(j, j)] / rows as f64;
                let variance = if variance > 0.0 { variance } else { 0.5 };
                assert!((ridge / (expected * variance) - 1.0).abs() < 1e-14, "{ridge}");
            }
        }
    }

    #[test]
    fn a_given_amount_is_of_the_mean_variance() {
        let matrix = lower(&[&[2.0], &[1.0, 2.0]]);
        assert_eq!(Shrinkage::Fixed(0.5).of(matrix.as_ref(), 4, 3.0), (0.5, vec![1.5, 1.5]));
    }

    #[test]
    fn arguments_are_auto_or_a_share() {
        let read = |argument| Shrinkage::try_new("f", Some(argument));
        assert_eq!(read(ScalarValue::from("auto")).unwrap(), Shrinkage::Auto);
        assert_eq!(read(ScalarValue::from(0.25)).unwrap(), Shrinkage::Fixed(0.25));
        for wrong in [
            ScalarValue::from("0.25"),
            ScalarValue::from(-0.1),
            ScalarValue::from(f64::NAN),
            ScalarValue::Float64(None),
        ] {
            read(wrong).unwrap_err();
        }
        Shrinkage::coerce("f", &DataType::Boolean).unwrap_err();
    }
}
