//! Eigenvalues and eigenvectors of scatter matrices, largest first, with signs that are always the same.

use datafusion::common::{exec_datafusion_err, exec_err};
use datafusion::error::{DataFusionError, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::matrix_free::eigen::{PartialEigenParams, partial_self_adjoint_eigen, partial_self_adjoint_eigen_scratch};
use faer::{Accum, Col, Mat, MatRef, Scale, Side, get_global_parallelism};

/// Loadings that are this close to the largest one, relatively, are as large: which of them comes
/// out ahead is a matter of rounding, and the sign must not be.
const LOADING_TOLERANCE: f64 = 1e-8;

/// From this size on, a few eigenvectors are looked for before all are computed.
const MIN_PARTIAL_FEATURES: usize = 512;

/// A few: one of so many.
const PARTIAL_SHARE: usize = 16;

/// Eigenvectors that are found one by one are right to this, relative to the matrix.
const RESIDUAL: f64 = 1e-13;

/// An eigenvalue that exceeds the last one found by less than this, relative to the largest, is as large.
const MISSED: f64 = 1e-10;

/// The eigenvalues of a positive semidefinite matrix, from the largest down, and the eigenvectors.
#[derive(Debug)]
pub(super) struct Eigen {
    values: Vec<f64>,
    /// In columns, in the order that the solver gave them.
    vectors: Mat<f64>,
    ascending: bool,
}

impl Eigen {
    /// Of a symmetric matrix, d x d; its lower triangle is read. At least the `k` largest.
    ///
    /// # Errors
    /// Where the solver does not converge.
    pub(super) fn of_matrix(matrix: MatRef<'_, f64>, k: usize) -> Result<Self> {
        let features = matrix.ncols();
        let few = features >= MIN_PARTIAL_FEATURES && k <= features / PARTIAL_SHARE;
        match few.then(|| Self::largest(matrix, k)).flatten() {
            Some(eigen) => Ok(eigen),
            None => Self::all(matrix),
        }
    }

    fn all(matrix: MatRef<'_, f64>) -> Result<Self> {
        let eigen = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| no_convergence())?;
        // Rounding takes the zeros of a rank-deficient matrix to either side of zero.
        let values = eigen.S().column_vector().iter().rev().map(|value| value.max(0.0));
        Ok(Self {
            values: values.collect(),
            vectors: eigen.U().to_owned(),
            ascending: true,
        })
    }

    /// The `k` largest, by Lanczos's method with restarts: a fifth of the time that all of them take.
    /// The method may overlook an eigenvalue that is there several times, or not converge where many are
    /// close. So its result is checked, and `None` if it does not hold.
    fn largest(matrix: MatRef<'_, f64>, k: usize) -> Option<Self> {
        let features = matrix.ncols();
        let mut full = Mat::from_fn(features, features, |i, j| matrix[(i.max(j), i.min(j))]);
        let size = full.norm_l2();
        // Any start will do that is not orthogonal to what is looked for; the same at all times.
        let mut state = 1_u32;
        let start = Col::from_fn(features, |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        });

        let par = get_global_parallelism();
        let params = PartialEigenParams {
            max_dim: 4 * k,
            max_restarts: 50,
            ..PartialEigenParams::default()
        };
        let mut vectors = Mat::zeros(features, k);
        let mut values = vec![0.0; k];
        let scratch = partial_self_adjoint_eigen_scratch(&full, k, par, params);
        let found = partial_self_adjoint_eigen(
            vectors.as_mut(),
            &mut values,
            &full,
            start.as_ref(),
            RESIDUAL * size,
            par,
            MemStack::new(&mut MemBuffer::new(scratch)),
            params,
        );
        let falls = values.is_sorted_by(|a, b| a >= b);
        if found.n_converged_eigen < k || !falls {
            return None;
        }

        // Are they eigenvectors, and of length 1?
        let scaled = Mat::from_fn(features, k, |i, j| values[j] * vectors[(i, j)]);
        let residual = &full * &vectors - &scaled;
        let lengths = vectors.transpose() * &vectors - Mat::<f64>::identity(k, k);
        if residual.norm_max() > 10.0 * RESIDUAL * size || lengths.norm_max() > 1e-10 {
            return None;
        }

        // Are they the largest? Without them, no eigenvalue may exceed the last of them: λ I less what
        // is left of the matrix is positive definite, and has a Cholesky decomposition.
        matmul(
            full.as_mut(),
            Accum::Add,
            vectors.as_ref(),
            scaled.transpose(),
            -1.0,
            par,
        );
        full *= Scale(-1.0);
        let bound = values[k - 1] + MISSED * values[0];
        full.diagonal_mut()
            .column_vector_mut()
            .iter_mut()
            .for_each(|x| *x += bound);
        full.llt(Side::Lower).is_ok().then(|| Self {
            values: values.into_iter().map(|value| value.max(0.0)).collect(),
            vectors,
            ascending: false,
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

fn no_convergence() -> DataFusionError {
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
        let eigen = Eigen::of_matrix(matrix.as_ref(), 3).unwrap();
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
                Eigen::of_matrix(Mat::zeros(features, features).as_ref(), features),
                Eigen::of_rows(&vec![0.0; features * features], features),
            ] {
                let eigen = eigen.unwrap();
                assert!(eigen.values().iter().all(|value| *value == 0.0));
                let length: f64 = eigen.vectors(features).unwrap().iter().map(|x| x * x).sum();
                assert!((length - features as f64).abs() < 1e-9);
            }
        }
    }

    /// A matrix with the given eigenvalues, all others 0, turned out of the axes by two reflections.
    fn turned(features: usize, values: &[f64]) -> Mat<f64> {
        let axis = |step: usize| {
            let axis = Col::from_fn(features, |i| ((i * step + 1) as f64).sin());
            &axis / Scale(axis.norm_l2())
        };
        let reflection =
            |axis: &Col<f64>| Mat::<f64>::identity(features, features) - Scale(2.0) * axis * axis.transpose();
        let turn = reflection(&axis(3)) * reflection(&axis(7));
        let diagonal = Mat::from_fn(features, features, |i, j| {
            if i == j && i < values.len() { values[i] } else { 0.0 }
        });
        &turn * diagonal * turn.transpose()
    }

    #[test]
    fn a_few_eigenvalues_are_those_of_all() {
        let separated: Vec<f64> = (0..600).map(|i| 0.97_f64.powi(i)).collect();
        // Many times the same, and the last one wanted is one of several: Lanczos's method overlooks some.
        let repeated = [vec![5.0; 40], vec![1.0; 500]].concat();
        let flat: Vec<f64> = (0..600).map(|i| 1.0 + f64::from(i) * 1e-13).collect();
        for (values, k) in [
            (separated, 20),
            (repeated.clone(), 20),
            (repeated, 37),
            (vec![3.0, 2.0], 20),
            (flat, 5),
        ] {
            let matrix = turned(600, &values);
            let all = Eigen::all(matrix.as_ref()).unwrap();
            let few = Eigen::of_matrix(matrix.as_ref(), k).unwrap();
            for (few, all) in few.values().iter().zip(all.values()).take(k) {
                assert!((few - all).abs() < 1e-11 * all.max(1.0), "{few} {all}");
            }
            let few = Mat::from_fn(k, 600, |i, j| few.vectors(k).unwrap()[i * 600 + j]);
            let variance = (&few * &matrix * few.transpose())
                .diagonal()
                .column_vector()
                .iter()
                .sum::<f64>();
            assert!((variance - all.values()[..k].iter().sum::<f64>()).abs() < 1e-10);
        }
    }

    #[test]
    fn the_few_largest_are_found_alone() {
        let matrix = turned(600, &(0..600).map(|i| 0.9_f64.powi(i)).collect::<Vec<_>>());
        assert_eq!(Eigen::largest(matrix.as_ref(), 20).unwrap().values().len(), 20);
        // None of them is missed: two eigenvalues of 5, and one vector of theirs is orthogonal to all others.
        let missed = turned(600, &[vec![5.0; 40], vec![1.0; 560]].concat());
        assert!(Eigen::largest(missed.as_ref(), 30).is_none_or(|few| few.values()[29] > 4.9));
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
