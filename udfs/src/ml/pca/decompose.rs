//! Eigenvalues and eigenvectors of scatter matrices, largest first, with signs that are always the same.

use datafusion::common::{exec_datafusion_err, exec_err};
use datafusion::error::Result;
use faer::{Mat, MatRef, Side};

/// Loadings that are this close to the largest one, relatively, are as large: which of them comes
/// out ahead is a matter of rounding, and the sign must not be.
const LOADING_TOLERANCE: f64 = 1e-8;

/// The eigenvalues of a positive semidefinite matrix, from the largest down, and the eigenvectors.
#[derive(Debug)]
pub(super) struct Eigen {
    values: Vec<f64>,
    /// In columns, in the order that the solver gave them.
    vectors: Mat<f64>,
    ascending: bool,
}

impl Eigen {
    /// Of a symmetric matrix, d x d; its lower triangle is read.
    ///
    /// # Errors
    /// Where the solver does not converge.
    pub(super) fn of_matrix(matrix: MatRef<'_, f64>) -> Result<Self> {
        let eigen = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| no_convergence())?;
        // Rounding takes the zeros of a rank-deficient matrix to either side of zero.
        let values = eigen.S().column_vector().iter().rev().map(|value| value.max(0.0));
        Ok(Self {
            values: values.collect(),
            vectors: eigen.U().to_owned(),
            ascending: true,
        })
    }

    /// Of the sum of outer products of rows, row-major; as many as there are rows or columns. For few
    /// rows of many columns this is less work, and loses no digits to squares.
    ///
    /// # Errors
    /// Where the solver does not converge.
    pub(super) fn of_rows(rows: &[f64], features: usize) -> Result<Self> {
        let rows = MatRef::from_row_major_slice(rows, rows.len() / features, features);
        let svd = rows.transpose().thin_svd().map_err(|_| no_convergence())?;
        Ok(Self {
            values: svd.S().column_vector().iter().map(|value| value * value).collect(),
            vectors: svd.U().to_owned(),
            ascending: false,
        })
    }

    /// The eigenvalues, from the largest down.
    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }

    /// The eigenvectors of the `k` largest eigenvalues: k x d, row-major, of length 1.
    ///
    /// # Errors
    /// Where numbers were too large to be squared.
    pub(super) fn vectors(&self, k: usize) -> Result<Vec<f64>> {
        let mut vectors = Vec::with_capacity(k * self.vectors.nrows());
        for i in 0..k.min(self.values.len()) {
            let column = if self.ascending { self.values.len() - 1 - i } else { i };
            let start = vectors.len();
            vectors.extend(self.vectors.col(column).iter());
            fix_sign(&mut vectors[start..]);
        }
        if vectors.iter().chain(&self.values).any(|x| !x.is_finite()) {
            return exec_err!("pca_fit: the vectors hold numbers whose squares are too large for Float64");
        }
        Ok(vectors)
    }
}

fn no_convergence() -> datafusion::error::DataFusionError {
    exec_datafusion_err!("pca_fit: the eigenvalues of the scatter matrix do not converge")
}

/// Makes the largest loading positive, the first of them where several are as large.
fn fix_sign(loadings: &mut [f64]) {
    let largest = loadings.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
    let first = loadings.iter().find(|x| x.abs() >= largest * (1.0 - LOADING_TOLERANCE));
    if first.is_some_and(|x| *x < 0.0) {
        loadings.iter_mut().for_each(|x| *x = -*x);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-14, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn eigenvalues_fall_and_eigenvectors_are_rows() {
        let matrix = Mat::from_fn(3, 3, |i, j| if i == j { [1.0, 9.0, 4.0][i] } else { 0.0 });
        let eigen = Eigen::of_matrix(matrix.as_ref()).unwrap();
        assert_close(eigen.values(), &[9.0, 4.0, 1.0]);
        assert_close(&eigen.vectors(2).unwrap(), &[0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        let eigen = Eigen::of_rows(&[0.0, -3.0, 0.0, 0.0, 0.0, 2.0], 3).unwrap();
        assert_close(eigen.values(), &[9.0, 4.0]);
        assert_close(&eigen.vectors(2).unwrap(), &[0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn a_matrix_without_variance_still_has_directions() {
        for features in [1, 2, 3, 200] {
            for eigen in [
                Eigen::of_matrix(Mat::zeros(features, features).as_ref()),
                Eigen::of_rows(&vec![0.0; features * features], features),
            ] {
                let eigen = eigen.unwrap();
                assert!(eigen.values().iter().all(|value| *value == 0.0));
                let length: f64 = eigen.vectors(features).unwrap().iter().map(|x| x * x).sum();
                assert!((length - features as f64).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn the_sign_does_not_hang_on_rounding() {
        for tiny in [-1e-15, 0.0, 1e-15] {
            let mut loadings = [-0.5, 0.5 + tiny, 0.1];
            fix_sign(&mut loadings);
            assert_eq!(loadings[0], 0.5);
        }
        let mut loadings = [0.1, -0.9, 0.2];
        fix_sign(&mut loadings);
        assert_eq!(loadings, [-0.1, 0.9, -0.2]);
    }
}
