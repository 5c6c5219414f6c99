//! Eigenvalues and eigenvectors of scatter matrices, largest first, with signs that are always the same.

use datafusion::common::{exec_datafusion_err, exec_err};
use datafusion::error::{DataFusionError, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Scale};

use crate::ml::eigen;

/// Loadings that are this close to the largest one, relatively, are as large: which of them comes
/// out ahead is a matter of rounding, and the sign must not be.
const LOADING_TOLERANCE: f64 = 1e-8;

/// From this size on, a few eigenvectors are looked for before all are computed.
const MIN_PARTIAL_FEATURES: usize = 512;

/// The vectors that the matrix is applied to at once: eigenvalues that are there more often are overlooked.
const BLOCK: usize = 8;

/// The most dimensions to look in.
const MAX_DIMENSIONS: usize = 1024;

/// The dimensions after which it is seen whether they are enough.
const DIMENSIONS_BETWEEN_CHECKS: usize = 64;

/// Eigenvectors that are found so are right to this, relative to the matrix.
const RESIDUAL: f64 = 1e-13;

/// An eigenvalue that exceeds the last one found by less than this, relative to the largest and for each
/// feature, is as large: it is what rounding may add.
const MISSED: f64 = 1e-14;

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
        match Self::largest(matrix, k) {
            Some(eigen) => Ok(eigen),
            None => Self::all(matrix),
        }
    }

    fn all(matrix: MatRef<'_, f64>) -> Result<Self> {
        let (mut values, vectors) = eigen::of_symmetric(matrix).ok_or_else(no_convergence)?;
        // Rounding takes the zeros of a rank-deficient matrix to either side of zero.
        values.iter_mut().for_each(|value| *value = value.max(0.0));
        values.reverse();
        Ok(Self {
            values,
            vectors,
            ascending: true,
        })
    }

    /// The `k` largest, by the block Lanczos method: Golub, G. H., Underwood, R. (1977), "The Block Lanczos
    /// Method for Computing Eigenvalues", Mathematical Software III, 361-377, with every block made
    /// orthogonal to all before it. It takes a fraction of the time that all of them take, but may overlook
    /// an eigenvalue that is there many times: so its result is checked. `None` where it does not hold, is
    /// not found in a space that is small beside the matrix, or the matrix is small itself.
    fn largest(matrix: MatRef<'_, f64>, k: usize) -> Option<Self> {
        let features = matrix.ncols();
        let most = MAX_DIMENSIONS.min(features / 4);
        if features < MIN_PARTIAL_FEATURES || 2 * k > most {
            return None;
        }
        let full = Mat::from_fn(features, features, |i, j| matrix[(i.max(j), i.min(j))]);
        let size = full.norm_l2();
        // Any start will do that is not orthogonal to what is looked for; the same at all times.
        let mut state = 1_u32;
        let mut block = Mat::from_fn(features, BLOCK, |_, _| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        });

        // With narrow blocks, threads take longer to meet than to multiply.
        let product = |a: MatRef<'_, f64>, b: MatRef<'_, f64>| {
            let mut product = Mat::zeros(a.nrows(), b.ncols());
            matmul(product.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
            product
        };
        let mut basis = Mat::<f64>::zeros(features, most);
        // The matrix in the basis; its upper triangle.
        let mut small = Mat::<f64>::zeros(most, most);
        let (mut dimensions, mut unchecked) = (0, 0);
        while dimensions + BLOCK <= most {
            // Twice is enough: what is left of the overlap after once is rounding.
            for _ in 0..2 {
                let before = basis.as_ref().subcols(0, dimensions);
                let overlap = product(before.transpose(), block.as_ref());
                matmul(block.as_mut(), Accum::Add, before, &overlap, -1.0, Par::Seq);
                block = eigen::orthonormal(block);
            }
            basis.as_mut().subcols_mut(dimensions, BLOCK).copy_from(&block);
            block = product(full.as_ref(), basis.as_ref().subcols(dimensions, BLOCK));
            let overlap = product(
                basis.as_ref().subcols(0, dimensions + BLOCK).transpose(),
                block.as_ref(),
            );
            small
                .as_mut()
                .submatrix_mut(0, dimensions, dimensions + BLOCK, BLOCK)
                .copy_from(&overlap);
            dimensions += BLOCK;
            unchecked += BLOCK;
            if dimensions < 2 * k || unchecked < DIMENSIONS_BETWEEN_CHECKS {
                continue;
            }
            unchecked = 0;

            let small = small.as_ref().submatrix(0, 0, dimensions, dimensions);
            let (values, rotation) = eigen::of_symmetric(small.transpose())?;
            let best = Mat::from_fn(dimensions, k, |i, j| rotation[(i, dimensions - 1 - j)]);
            let values: Vec<f64> = values.into_iter().rev().take(k).collect();
            let vectors = product(basis.as_ref().subcols(0, dimensions), best.as_ref());
            let scaled = Mat::from_fn(features, k, |i, j| values[j] * vectors[(i, j)]);
            let residual = (product(full.as_ref(), vectors.as_ref()) - &scaled).norm_max();
            if residual <= RESIDUAL * size {
                return are_largest(full, &values, &vectors, &scaled).then(|| Self {
                    values: values.into_iter().map(|value| value.max(0.0)).collect(),
                    vectors,
                    ascending: false,
                });
            }
        }
        None
    }

    /// Of the sum of outer products of rows, row-major; as many as there are rows or columns. For few
    /// rows of many columns this is less work, and loses no digits to squares.
    ///
    /// # Errors
    /// Where the solver does not converge.
    pub(super) fn of_rows(rows: &[f64], features: usize) -> Result<Self> {
        let rows = MatRef::from_row_major_slice(rows, rows.len() / features, features);
        let (values, vectors) = eigen::left_singular(rows.transpose()).ok_or_else(no_convergence)?;
        Ok(Self {
            values: values.iter().map(|value| value * value).collect(),
            vectors,
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

/// Does a symmetric matrix have no eigenvalue beyond these (falling) that exceeds the last of them? λ I less
/// what is left of the matrix without them is positive definite then, and has a Cholesky decomposition.
/// `scaled` are the eigenvectors times their eigenvalues.
fn are_largest(mut matrix: Mat<f64>, values: &[f64], vectors: &Mat<f64>, scaled: &Mat<f64>) -> bool {
    let (Some(first), Some(last)) = (values.first(), values.last()) else {
        return false;
    };
    let bound = last + MISSED * matrix.ncols() as f64 * first;
    matmul(matrix.as_mut(), Accum::Add, vectors, scaled.transpose(), -1.0, Par::Seq);
    matrix *= Scale(-1.0);
    matrix
        .diagonal_mut()
        .column_vector_mut()
        .iter_mut()
        .for_each(|x| *x += bound);
    eigen::cholesky(matrix.as_mut())
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
    use faer::Col;

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
    fn a_search_without_an_answer_ends() {
        let ones = Mat::from_fn(512, 512, |_, _| 1.0);
        let alternating = Mat::from_fn(512, 512, |i, j| (i % 2 * (j % 2)) as f64);
        for matrix in [Mat::zeros(512, 512), ones, alternating, Mat::identity(512, 512)] {
            for k in [1, 5, 13] {
                let all = Eigen::all(matrix.as_ref()).unwrap();
                let few = Eigen::of_matrix(matrix.as_ref(), k).unwrap();
                for (few, all) in few.values().iter().zip(all.values()).take(k) {
                    assert!((few - all).abs() < 1e-11 * all.max(1.0), "{few} {all}");
                }
                assert!(few.vectors(k).unwrap().iter().all(|x| x.is_finite()));
            }
        }
    }

    #[test]
    fn the_few_largest_are_found_alone() {
        let matrix = turned(600, &(0..600).map(|i| 0.9_f64.powi(i)).collect::<Vec<_>>());
        assert_eq!(Eigen::largest(matrix.as_ref(), 12).unwrap().values().len(), 12);
        // None of them is missed: two eigenvalues of 5, and one vector of theirs is orthogonal to all others.
        let missed = turned(600, &[vec![5.0; 40], vec![1.0; 560]].concat());
        assert!(Eigen::largest(missed.as_ref(), 14).is_none_or(|few| few.values()[13] > 4.9));
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
