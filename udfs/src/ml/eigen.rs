//! Decompositions by faer, on one thread: with more, its last digits depend on how many there are, and two
//! machines would not agree.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor as llt;
use faer::linalg::evd::{self, ComputeEigenvectors};
use faer::linalg::householder;
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::linalg::svd::{self, ComputeSvdVectors};
use faer::{Conj, Mat, MatMut, MatRef, Par};

/// The eigenvalues of a symmetric matrix, of which the lower triangle is read, from the smallest up,
/// and the eigenvectors in columns. `None` where they do not converge.
pub(super) fn of_symmetric(matrix: MatRef<'_, f64>) -> Option<(Vec<f64>, Mat<f64>)> {
    let size = matrix.ncols();
    let (mut values, mut vectors) = (Diag::<f64>::zeros(size), Mat::<f64>::zeros(size, size));
    let scratch = evd::self_adjoint_evd_scratch::<f64>(size, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    evd::self_adjoint_evd(
        matrix,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .ok()?;
    Some((values.column_vector().iter().copied().collect(), vectors))
}

/// The singular values of a matrix, from the largest down, and the left singular vectors in columns, as
/// many. `None` where they do not converge.
pub(super) fn left_singular(matrix: MatRef<'_, f64>) -> Option<(Vec<f64>, Mat<f64>)> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let size = rows.min(columns);
    let (mut values, mut vectors) = (Diag::<f64>::zeros(size), Mat::<f64>::zeros(rows, size));
    let (left, right) = (ComputeSvdVectors::Thin, ComputeSvdVectors::No);
    let scratch = svd::svd_scratch::<f64>(rows, columns, left, right, Par::Seq, Default::default());
    svd::svd(
        matrix,
        values.as_mut(),
        Some(vectors.as_mut()),
        None,
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .ok()?;
    Some((values.column_vector().iter().copied().collect(), vectors))
}

/// An orthonormal basis of a matrix's columns, which are fewer than its rows.
pub(super) fn orthonormal(mut matrix: Mat<f64>) -> Mat<f64> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let block = qr::recommended_block_size::<f64>(rows, columns);
    let mut factors = Mat::zeros(block, columns);
    let scratch = qr::qr_in_place_scratch::<f64>(rows, columns, block, Par::Seq, Default::default());
    qr::qr_in_place(
        matrix.as_mut(),
        factors.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    let mut basis = Mat::identity(rows, columns);
    let scratch =
        householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(rows, block, columns);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        matrix.as_ref(),
        factors.as_ref(),
        Conj::No,
        basis.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    basis
}

/// Puts Cholesky's factor in the place of the lower triangle of a symmetric matrix; `false` where the matrix
/// is not positive definite to rounding.
pub(super) fn cholesky(matrix: MatMut<'_, f64>) -> bool {
    let scratch = llt::cholesky_in_place_scratch::<f64>(matrix.ncols(), Par::Seq, Default::default());
    let memory = &mut MemBuffer::new(scratch);
    let stack = MemStack::new(memory);
    llt::cholesky_in_place(matrix, Default::default(), Par::Seq, stack, Default::default()).is_ok()
}
