//! Shrinkage: how far a covariance is moved towards one that is the same in all directions.
//!
//! The covariance of few rows of many features is singular, and its small eigenvalues are too small.
//! With `S` the covariance and `p` the features, the shrunk one is `(1 - s) S + s tr(S)/p I`.
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

    /// The shrinkage of a covariance that was estimated from `rows` rows; of the matrix, p x p and
    /// known up to a factor, the lower triangle is read.
    pub(super) fn amount(self, covariance: MatRef<'_, f64>, rows: u64) -> f64 {
        match self {
            Self::Auto => rao_blackwell(covariance, rows as f64),
            Self::Fixed(s) => s,
        }
    }
}

/// `min(1, ((n - 2)/n tr(S²) + tr(S)²) / ((n + 2) (tr(S²) - tr(S)²/p)))`, for `S` scaled to the trace
/// `p`: no square can be too large.
fn rao_blackwell(covariance: MatRef<'_, f64>, n: f64) -> f64 {
    let features = covariance.ncols();
    let p = features as f64;
    let mean = (0..features).map(|j| covariance[(j, j)]).sum::<f64>() / p;
    let square = |x: &f64| (x / mean).powi(2);
    let column = |j: usize| {
        let below: f64 = covariance.col(j).iter().skip(j + 1).map(square).sum();
        square(&covariance[(j, j)]) + 2.0 * below
    };
    let of_square: f64 = (0..features).map(column).sum();
    let spread = (n + 2.0) * (of_square - p);
    // Without any spread of the eigenvalues, or any variance, there is nothing to keep.
    if spread > 0.0 {
        (((n - 2.0) / n * of_square + p * p) / spread).min(1.0)
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
    fn the_automatic_amount_is_the_formula() {
        for (rows, matrix, expected) in [
            (10, lower(&[&[4e200], &[0.0, 1e200], &[0.0, 0.0, 1e200]]), 0.7),
            (30, lower(&[&[2.0], &[1.0, 2.0]]), 19.0 / 48.0),
            (5, lower(&[&[2.0], &[1.0, 2.0]]), 1.0),
            (10, lower(&[&[3.0]]), 1.0),
            (10, lower(&[&[0.0], &[0.0, 0.0]]), 1.0),
        ] {
            let found = Shrinkage::Auto.amount(matrix.as_ref(), rows);
            assert!((found - expected).abs() < 1e-14, "{found} is not {expected}");
        }
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
