//! Affine maps of columns of vectors, each row by its model.

use arrow::array::Array;
use datafusion::common::exec_err;
use datafusion::error::Result;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::model::Models;
use super::vectors::VectorColumn;

/// The most vectors that are projected together.
const BLOCK_ROWS: usize = 256;

/// The fewest: products of fewer rows take another path in faer, and add up in another order. What
/// becomes of a vector must not depend, in its last digits, on the batch that it comes in.
const MIN_ROWS: usize = 16;

/// `(x - before) · matrix + after`, from one model.
pub(super) struct Projection<'a> {
    /// As long as the vectors.
    pub(super) before: Option<&'a [f64]>,
    /// inputs x outputs
    pub(super) matrix: MatRef<'a, f64>,
    /// As long as the results.
    pub(super) after: Option<&'a [f64]>,
}

/// Calls `emit` for each row, in order: with the row whose model it is of, and its projected vector,
/// `None` where the vector or the model is NULL. Vectors are multiplied in blocks, one product each.
///
/// # Errors
/// Those of the vectors and the models, and where their lengths differ.
pub(super) fn project<'m>(
    vectors: &dyn Array,
    models: &'m Models<'_>,
    projection: impl Fn(usize) -> Result<Projection<'m>>,
    mut emit: impl FnMut(usize, Option<&[f64]>) -> Result<()>,
) -> Result<()> {
    let vectors = VectorColumn::try_new(models.function(), vectors)?;
    let mut present = Vec::with_capacity(BLOCK_ROWS);
    let mut inputs = vec![];
    let mut outputs: Vec<f64> = vec![];
    for run in models.runs() {
        let model = run.start;
        if models.is_null(model) {
            run.into_iter().try_for_each(|_| emit(model, None))?;
            continue;
        }
        let Projection { before, matrix, after } = projection(model)?;
        let (features, width) = (matrix.nrows(), matrix.ncols());
        for block in run.clone().step_by(BLOCK_ROWS) {
            present.clear();
            inputs.clear();
            for i in block..run.end.min(block + BLOCK_ROWS) {
                let vector = vectors.get(i)?;
                present.push(vector.is_some());
                let Some(vector) = vector else { continue };
                models.check_length(vector.len(), features)?;
                let start = inputs.len();
                vector.extend_into(&mut inputs);
                if let Some(before) = before {
                    inputs[start..].iter_mut().zip(before).for_each(|(x, y)| *x -= y);
                }
            }
            if !inputs.is_empty() {
                let rows = (inputs.len() / features).max(MIN_ROWS);
                inputs.resize(rows * features, 0.0);
                outputs.resize(rows * width, 0.0);
                matmul(
                    MatMut::from_row_major_slice_mut(&mut outputs, rows, width),
                    Accum::Replace,
                    MatRef::from_row_major_slice(&inputs, rows, features),
                    matrix,
                    1.0,
                    Par::Seq,
                );
            }
            let mut projected = outputs.chunks_exact_mut(width);
            for present in &present {
                let mut output = present.then(|| projected.next()).flatten();
                if let (Some(output), Some(after)) = (&mut output, after) {
                    output.iter_mut().zip(after).for_each(|(x, y)| *x += y);
                }
                if output
                    .as_ref()
                    .is_some_and(|output| output.iter().any(|x| !x.is_finite()))
                {
                    return exec_err!(
                        "{}: the product of a vector and its model is too large for Float64",
                        models.function()
                    );
                }
                emit(model, output.as_deref())?;
            }
        }
    }
    Ok(())
}
