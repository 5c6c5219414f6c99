//! The spread of vectors in the few directions in which they vary most: an incremental, truncated
//! singular value decomposition, for vectors whose scatter matrix would not fit into memory.
//!
//! `rank` rows `B` stand for the scatter matrix `S ≈ BᵀB`. New rows are appended; once there are more
//! than `rank`, the rows are rotated onto their principal directions, from the Gram matrix `B Bᵀ`, and
//! the weakest are dropped, as in Ross, D. A., Lim, J., Lin, R.-S., Yang, M.-H. (2008), "Incremental
//! Learning for Robust Visual Tracking", International Journal of Computer Vision 77, 125-141, which
//! is what scikit-learn's `IncrementalPCA` does. Rows of two partial results merge as new rows do.
//!
//! What is dropped is known. Each truncation takes a positive semidefinite matrix from `S` whose
//! largest eigenvalue is the largest one dropped, so by Weyl's inequality no eigenvalue of `S` exceeds
//! that of `BᵀB` by more than the sum of those, nor by more than the variance that is lost in all.
//! Until `rank` rows have come nothing is lost.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::eigen;
use super::moments::Spread;

/// Columns that are rotated at a time: the rotated ones replace the old ones without a second copy.
const PANEL: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Subspace {
    rank: usize,
    /// At most `rank`, row-major.
    rows: Vec<f64>,
    /// The sum of all squared deviations.
    total: f64,
    /// The sum of the largest eigenvalues that each truncation dropped.
    dropped: f64,
}

impl Subspace {
    /// Rows whose outer products sum up to the scatter matrix, row-major.
    pub(super) fn rows(&self) -> &[f64] {
        &self.rows
    }

    /// How far the eigenvalues of the scatter matrix may lie above those of [`Self::rows`].
    pub(super) fn error(&self) -> f64 {
        let kept: f64 = self.rows.iter().map(|x| x * x).sum();
        self.dropped.min((self.total - kept).max(0.0))
    }

    /// Appends rows, and drops the weakest directions where there are too many.
    fn append(&mut self, rows: &[f64], features: usize) {
        // Numbers too large for their squares: the fit refuses them when it ends, by their total.
        if !self.total.is_finite() {
            return;
        }
        // Rows come in parts, so that the Gram matrix stays small whatever a merge brings.
        for part in rows.chunks(self.rank * features) {
            let (ours, theirs) = (self.rows.len() / features, part.len() / features);
            if ours + theirs > self.rank {
                self.truncate(ours, part, theirs, features);
            } else {
                self.rows.extend_from_slice(part);
            }
        }
    }

    /// Replaces our `ours` rows and `theirs` in `part` by the `rank` strongest directions of both.
    fn truncate(&mut self, ours: usize, part: &[f64], theirs: usize, features: usize) {
        let (old, new) = (
            MatRef::from_row_major_slice(&self.rows, ours, features),
            MatRef::from_row_major_slice(part, theirs, features),
        );
        let mut gram = Mat::<f64>::zeros(ours + theirs, ours + theirs);
        {
            let (top, bottom) = gram.as_mut().split_at_row_mut(ours);
            matmul(
                top.subcols_mut(0, ours),
                Accum::Replace,
                old,
                old.transpose(),
                1.0,
                Par::Seq,
            );
            let (left, right) = bottom.split_at_col_mut(ours);
            matmul(left, Accum::Replace, new, old.transpose(), 1.0, Par::Seq);
            matmul(right, Accum::Replace, new, new.transpose(), 1.0, Par::Seq);
        }
        let Some((values, vectors)) = eigen::of_symmetric(gram.as_ref()) else {
            self.total = f64::NAN; // as above
            return;
        };
        let kept = self.rank;
        self.dropped += values[ours + theirs - kept - 1].max(0.0);

        // Rows of the rotation: the strongest first.
        let rotation = Mat::from_fn(kept, ours + theirs, |i, j| vectors[(j, ours + theirs - 1 - i)]);
        self.rows.resize(kept * features, 0.0);
        let mut rows = MatMut::from_row_major_slice_mut(&mut self.rows, kept, features);
        let mut panel = Mat::<f64>::zeros(kept, PANEL.min(features));
        for start in (0..features).step_by(PANEL) {
            let width = PANEL.min(features - start);
            let mut panel = panel.as_mut().subcols_mut(0, width);
            let mut columns = rows.as_mut().subcols_mut(start, width);
            matmul(
                panel.as_mut(),
                Accum::Replace,
                rotation.as_ref().subcols(0, ours),
                columns.as_ref().subrows(0, ours),
                1.0,
                Par::Seq,
            );
            matmul(
                panel.as_mut(),
                Accum::Add,
                rotation.as_ref().subcols(ours, theirs),
                new.subcols(start, width),
                1.0,
                Par::Seq,
            );
            columns.copy_from(panel.as_ref());
        }
    }
}

impl Spread for Subspace {
    /// The number of rows to keep.
    type Plan = usize;

    fn zeros(rank: usize, _features: usize) -> Self {
        Self {
            rank,
            rows: vec![],
            total: 0.0,
            dropped: 0.0,
        }
    }

    // As many as are kept: the cost of a truncation is shared by as many rows as it has to carry along.
    fn block_rows(rank: usize, _features: usize) -> usize {
        rank
    }

    fn add_rows(&mut self, rows: &[f64], features: usize) {
        self.total += rows.iter().map(|x| x * x).sum::<f64>();
        self.append(rows, features);
    }

    fn packed_len(rank: usize, features: usize) -> usize {
        2 + rank * features
    }

    fn pack(&self) -> Vec<f64> {
        [&[self.total, self.dropped], self.rows.as_slice()].concat()
    }

    fn add_packed(&mut self, packed: &[f64], features: usize) {
        if let [total, dropped, rows @ ..] = packed {
            self.total += total;
            self.dropped += dropped;
            self.append(rows, features);
        }
    }

    fn total(&self) -> f64 {
        self.total
    }

    fn bytes(rank: usize, features: usize) -> usize {
        (rank * features + (2 * rank) * (2 * rank) * 3) * size_of::<f64>()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// `count` rows, whose k-th direction has the weight `1 / (k + 1)`; deterministic.
    fn rows(count: usize, features: usize) -> Vec<f64> {
        let value = |i: usize, j: usize| {
            (0..features.min(count))
                .map(|k| ((i * (k + 3)) as f64 * 0.7).sin() * ((j * (k + 1)) as f64 * 0.37).cos() / (k + 1) as f64)
                .sum::<f64>()
        };
        (0..count)
            .flat_map(|i| (0..features).map(move |j| value(i, j)))
            .collect()
    }

    fn eigenvalues(rows: &[f64], features: usize) -> Vec<f64> {
        let rows = MatRef::from_row_major_slice(rows, rows.len() / features, features);
        let mut values = (rows.transpose() * rows)
            .self_adjoint_eigenvalues(faer::Side::Lower)
            .unwrap();
        values.reverse();
        values
    }

    #[test]
    fn the_error_is_within_its_bound() {
        let (count, features, rank) = (97, 40, 12);
        let rows = rows(count, features);
        let exact = eigenvalues(&rows, features);
        for partitions in [1, 3] {
            let mut merged = Subspace::zeros(rank, features);
            for part in rows.chunks(rows.len().div_ceil(features * partitions) * features) {
                let mut subspace = Subspace::zeros(rank, features);
                part.chunks(5 * features)
                    .for_each(|part| subspace.add_rows(part, features));
                merged.add_packed(&subspace.pack(), features);
            }
            let found = eigenvalues(merged.rows(), features);
            assert!((merged.total() / exact.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(merged.error() > 0.0);
            for (found, exact) in found.iter().zip(&exact).take(rank) {
                let below = exact - found;
                assert!(below > -1e-10 && below <= merged.error() + 1e-10, "{found} {exact}");
            }
            assert!((found[0] / exact[0] - 1.0).abs() < 1e-2);
        }
    }

    #[test]
    fn as_many_rows_as_are_kept_lose_nothing() {
        let rows = rows(12, 40);
        let mut subspace = Subspace::zeros(12, 40);
        subspace.add_rows(&rows, 40);
        assert_eq!((subspace.rows(), subspace.error()), (rows.as_slice(), 0.0));
    }
}
