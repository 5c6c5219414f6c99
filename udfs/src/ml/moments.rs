//! Moments of vectors: count, mean and the spread around it, in one pass, mergeable.
//!
//! Rows are collected into blocks; a block is centred on its own mean and added to the spread as one
//! matrix product; blocks and partial results are joined by the pairwise update of
//! Chan, T. F., Golub, G. H., LeVeque, R. J. (1979), "Updating Formulae and a Pairwise Algorithm for
//! Computing Sample Variances", Technical Report STAN-CS-79-773, Stanford University; (1983),
//! "Algorithms for Computing the Sample Variance: Analysis and Recommendations", The American
//! Statistician 37 (3), 242-247. With `S` the sum of outer products of the deviations from the mean:
//!
//! ```text
//! δ = mean_b - mean_a        S = S_a + S_b + δ δᵀ n_a n_b / (n_a + n_b)
//! ```

use std::fmt::Debug;
use std::ops::Deref;

use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::{Accum, Mat, MatRef, Par};

use super::vectors::Vector;

/// What is kept of the deviations from the mean.
pub(super) trait Spread: Debug + Sized + Send + Sync + 'static {
    /// What the fit says about it, the same for all partial results.
    type Plan: Debug + Copy + Send + Sync + 'static;

    /// Of no rows.
    fn zeros(plan: Self::Plan, features: usize) -> Self;

    /// How many rows make a block.
    fn block_rows(plan: Self::Plan, features: usize) -> usize;

    /// Adds rows of deviations, row-major.
    fn add_rows(&mut self, rows: &[f64], features: usize);

    /// Of rows of deviations that are fewer than a block, and all there are.
    fn of_few_rows(plan: Self::Plan, rows: &[f64], features: usize) -> Self {
        let mut spread = Self::zeros(plan, features);
        spread.add_rows(rows, features);
        spread
    }

    /// The most numbers that [`Self::pack`] gives.
    fn packed_len(plan: Self::Plan, features: usize) -> usize;

    /// All there is to know, as it travels between partitions.
    fn pack(&self) -> Vec<f64>;

    /// Adds what [`Self::pack`] gave.
    fn add_packed(&mut self, packed: &[f64], features: usize);

    /// The sum of all squared deviations.
    fn total(&self) -> f64;

    /// The most bytes held beside the value itself.
    fn bytes(plan: Self::Plan, features: usize) -> usize;
}

/// The sum of squared deviations of each feature.
#[derive(Debug)]
pub(super) struct Squares(Vec<f64>);

impl Squares {
    /// By feature.
    pub(super) fn values(&self) -> &[f64] {
        &self.0
    }
}

impl Spread for Squares {
    type Plan = ();

    fn zeros((): (), features: usize) -> Self {
        Self(vec![0.0; features])
    }

    // A block that stays in the cache: there is no product that would gain from more rows.
    fn block_rows((): (), features: usize) -> usize {
        (65_536 / features).clamp(1, 255)
    }

    fn add_rows(&mut self, rows: &[f64], features: usize) {
        for row in rows.chunks_exact(features) {
            self.0.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        }
    }

    fn packed_len((): (), features: usize) -> usize {
        features
    }

    fn pack(&self) -> Vec<f64> {
        self.0.clone()
    }

    fn add_packed(&mut self, packed: &[f64], _features: usize) {
        self.0.iter_mut().zip(packed).for_each(|(sum, x)| *sum += x);
    }

    fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    fn bytes((): (), features: usize) -> usize {
        features * size_of::<f64>()
    }
}

/// The scatter matrix, features x features: the sum of outer products of the deviations. Its lower
/// triangle is kept; packed, the triangle's columns follow one another.
#[derive(Debug)]
pub(super) struct Scatter(Mat<f64>);

impl Scatter {
    /// The matrix; only its lower triangle has a meaning.
    pub(super) fn lower(&self) -> MatRef<'_, f64> {
        self.0.as_ref()
    }
}

impl Spread for Scatter {
    type Plan = ();

    fn zeros((): (), features: usize) -> Self {
        Self(Mat::zeros(features, features))
    }

    // Enough rows for the product to run at the processor's speed instead of the memory's; with the
    // row that joins the block, 256.
    fn block_rows((): (), _features: usize) -> usize {
        255
    }

    fn add_rows(&mut self, rows: &[f64], features: usize) {
        let rows = MatRef::from_row_major_slice(rows, rows.len() / features, features);
        // One thread: the engine runs one fit per core already.
        matmul(
            &mut self.0,
            BlockStructure::TriangularLower,
            Accum::Add,
            rows.transpose(),
            BlockStructure::Rectangular,
            rows,
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
    }

    fn packed_len((): (), features: usize) -> usize {
        features * (features + 1) / 2
    }

    fn pack(&self) -> Vec<f64> {
        let features = self.0.ncols();
        let mut packed = Vec::with_capacity(Self::packed_len((), features));
        for j in 0..features {
            packed.extend_from_slice(&self.0.col_as_slice(j)[j..]);
        }
        packed
    }

    fn add_packed(&mut self, mut packed: &[f64], _features: usize) {
        for j in 0..self.0.ncols() {
            let column = &mut self.0.col_as_slice_mut(j)[j..];
            let (theirs, rest) = packed.split_at(column.len());
            column.iter_mut().zip(theirs).for_each(|(sum, x)| *sum += x);
            packed = rest;
        }
    }

    fn total(&self) -> f64 {
        (0..self.0.ncols()).map(|j| self.0[(j, j)]).sum()
    }

    fn bytes((): (), features: usize) -> usize {
        features * features * size_of::<f64>()
    }
}

/// Count, mean and spread of the rows seen so far.
#[derive(Debug)]
pub(super) struct Moments<S: Spread> {
    plan: S::Plan,
    /// The rows that are in `shift` and `spread`.
    count: u64,
    /// The first row seen, empty before there is one. All else is relative to it, so that a large
    /// offset that all rows share costs no digits.
    origin: Vec<f64>,
    /// The mean, less `origin`.
    shift: Vec<f64>,
    /// Allocated for the first whole block: a group of few rows holds no features x features matrix.
    spread: Option<S>,
    /// Rows that wait for their block to be whole, row-major.
    pending: Vec<f64>,
}

/// The moments as they travel between partitions.
#[derive(Debug)]
pub(super) struct State {
    /// The rows that are in `shift` and `spread`.
    pub(super) count: u64,
    /// The row that `shift` is relative to; empty where there are no rows at all.
    pub(super) origin: Vec<f64>,
    /// The mean, less `origin`.
    pub(super) shift: Vec<f64>,
    /// [`Spread::pack`]; empty where `count` is 0.
    pub(super) spread: Vec<f64>,
    /// Rows that are not in `shift` and `spread`, row-major.
    pub(super) pending: Vec<f64>,
}

/// The moments of all rows.
#[derive(Debug)]
pub(super) struct Summary<'a, S> {
    /// The number of rows, at least 1.
    pub(super) count: u64,
    /// By feature.
    pub(super) mean: Vec<f64>,
    /// Around the mean.
    pub(super) spread: Held<'a, S>,
}

/// A spread that grows on, or one made for a summary alone.
#[derive(Debug)]
pub(super) enum Held<'a, S> {
    Borrowed(&'a S),
    Owned(S),
}

impl<S> Deref for Held<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        match self {
            Self::Borrowed(spread) => spread,
            Self::Owned(spread) => spread,
        }
    }
}

impl<S: Spread> Moments<S> {
    /// Of no rows.
    pub(super) fn new(plan: S::Plan) -> Self {
        Self {
            plan,
            count: 0,
            origin: vec![],
            shift: vec![],
            spread: None,
            pending: vec![],
        }
    }

    /// The length of the vectors; 0 before there is one.
    pub(super) fn features(&self) -> usize {
        self.origin.len()
    }

    /// Adds a row; all rows have the same length.
    pub(super) fn push(&mut self, row: Vector<'_>) {
        let start = self.pending.len();
        row.extend_into(&mut self.pending);
        if self.origin.is_empty() {
            self.set_origin(self.pending[start..].to_vec());
        }
        if self.pending.len() >= self.block() {
            self.absorb();
        }
    }

    /// How many numbers make a block.
    fn block(&self) -> usize {
        S::block_rows(self.plan, self.features()) * self.features()
    }

    fn set_origin(&mut self, origin: Vec<f64>) {
        self.shift = vec![0.0; origin.len()];
        self.origin = origin;
    }

    /// Moves the pending rows into mean and spread.
    fn absorb(&mut self) {
        let features = self.features();
        if self.pending.is_empty() {
            return;
        }
        let rows = (self.pending.len() / features) as u64;
        let shift = centre(&mut self.pending, &self.origin);
        let join = self.join(rows, &shift);
        // The first block has nothing to be joined to, and its row of zeros would say nothing.
        if self.count > rows {
            self.pending.extend(join);
        }
        self.spread
            .get_or_insert_with(|| S::zeros(self.plan, features))
            .add_rows(&self.pending, features);
        self.pending.clear();
    }

    /// Moves count and mean on by `count` rows with the mean `origin + shift`. What the spread grows
    /// by, beyond the sum of the two, is the square of one row: the one returned.
    fn join(&mut self, count: u64, shift: &[f64]) -> Vec<f64> {
        let (ours, theirs) = (self.count as f64, count as f64);
        let (share, weight) = (theirs / (ours + theirs), (ours * theirs / (ours + theirs)).sqrt());
        self.count += count;
        let row = self.shift.iter_mut().zip(shift).map(|(mean, other)| {
            let delta = other - *mean;
            *mean += delta * share;
            delta * weight
        });
        row.collect()
    }

    /// Adds the rows of another partition: `count` of them with the mean `origin + shift` and a
    /// packed spread.
    pub(super) fn merge(&mut self, count: u64, origin: &[f64], shift: &[f64], spread: &[f64]) {
        if self.origin.is_empty() {
            self.set_origin(origin.to_vec());
        }
        let features = self.features();
        let shift: Vec<f64> = shift
            .iter()
            .zip(origin)
            .zip(&self.origin)
            .map(|((shift, theirs), ours)| shift + (theirs - ours))
            .collect();
        let join = self.join(count, &shift);
        let sum = self.spread.get_or_insert_with(|| S::zeros(self.plan, features));
        sum.add_packed(spread, features);
        sum.add_rows(&join, features);
    }

    /// Hands over what another partition needs to [`merge`](Self::merge) and [`push`](Self::push).
    pub(super) fn into_state(mut self) -> State {
        // A few rows are smaller than the triangle of their scatter matrix: they travel as they are.
        if self.spread.is_some() || self.pending.len() >= S::packed_len(self.plan, self.features()) {
            self.absorb();
        }
        State {
            count: self.count,
            origin: self.origin,
            shift: self.shift,
            spread: self.spread.map(|spread| spread.pack()).unwrap_or_default(),
            pending: self.pending,
        }
    }

    /// The moments of all rows so far; `None` where there are none. More rows may follow.
    pub(super) fn summary(&mut self) -> Option<Summary<'_, S>> {
        let features = self.features();
        if features == 0 {
            return None;
        }
        if self.spread.is_some() {
            self.absorb();
        }
        let sum = |shift: &[f64]| self.origin.iter().zip(shift).map(|(a, b)| a + b).collect();
        Some(match &self.spread {
            Some(spread) => Summary {
                count: self.count,
                mean: sum(&self.shift),
                spread: Held::Borrowed(spread),
            },
            None => {
                let mut rows = self.pending.clone();
                let shift = centre(&mut rows, &self.origin);
                Summary {
                    count: (rows.len() / features) as u64,
                    mean: sum(&shift),
                    spread: Held::Owned(S::of_few_rows(self.plan, &rows, features)),
                }
            }
        })
    }

    /// Is the spread there, or will it be soon? A memory pool is to know before it is allocated.
    pub(super) fn spreads(&self) -> bool {
        self.spread.is_some() || (!self.pending.is_empty() && self.pending.len() > self.block() / 2)
    }

    /// The bytes held beside the value itself, and those of a spread that is to come.
    pub(super) fn allocated(&self) -> usize {
        let numbers = self.origin.capacity() + self.shift.capacity() + self.pending.capacity();
        let spread = if self.spreads() {
            S::bytes(self.plan, self.features())
        } else {
            0
        };
        numbers * size_of::<f64>() + spread
    }
}

/// Takes `origin` and then their mean from rows, row-major; the mean, less `origin`.
fn centre(rows: &mut [f64], origin: &[f64]) -> Vec<f64> {
    let features = origin.len();
    let count = rows.len() / features;
    let mut shift = vec![0.0; features];
    for row in rows.chunks_exact_mut(features) {
        for ((x, origin), sum) in row.iter_mut().zip(origin).zip(&mut shift) {
            *x -= origin;
            *sum += *x;
        }
    }
    shift.iter_mut().for_each(|sum| *sum /= count as f64);
    for row in rows.chunks_exact_mut(features) {
        row.iter_mut().zip(&shift).for_each(|(x, mean)| *x -= mean);
    }
    shift
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// Rows with an offset that a sum of squares does not survive; deterministic.
    fn rows(count: usize, features: usize) -> Vec<Vec<f64>> {
        let value = |i: usize, j: usize| 1e6 + ((i * 7919 + j * 104_729) % 1009) as f64 / 100.0 - (i * j % 13) as f64;
        (0..count)
            .map(|i| (0..features).map(|j| value(i, j)).collect())
            .collect()
    }

    /// Scatter in two passes over all rows.
    fn reference(rows: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
        let (count, features) = (rows.len() as f64, rows[0].len());
        let mean: Vec<f64> = (0..features)
            .map(|j| 1e6 + rows.iter().map(|row| row[j] - 1e6).sum::<f64>() / count)
            .collect();
        let product =
            |i: usize, j: usize| -> f64 { rows.iter().map(|row| (row[i] - mean[i]) * (row[j] - mean[j])).sum() };
        let columns = (0..features).flat_map(|j| (j..features).map(move |i| (i, j)));
        let packed = columns.map(|(i, j)| product(i, j)).collect();
        (mean, packed)
    }

    fn assert_close(found: &[f64], expected: &[f64], relative: f64) {
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= relative * scale,
                "{found} is not {expected}"
            );
        }
    }

    #[test]
    fn blocks_and_partitions_give_what_all_rows_give() {
        let rows = rows(700, 5);
        let (mean, packed) = reference(&rows);
        for partitions in [1, 2, 7, 300] {
            let mut merged = Moments::<Scatter>::new(());
            for partition in 0..partitions {
                let mut part = Moments::<Scatter>::new(());
                rows.iter()
                    .skip(partition)
                    .step_by(partitions)
                    .for_each(|row| part.push(Vector::F64(row)));
                let state = part.into_state();
                if state.count > 0 {
                    merged.merge(state.count, &state.origin, &state.shift, &state.spread);
                }
                state
                    .pending
                    .chunks_exact(5)
                    .for_each(|row| merged.push(Vector::F64(row)));
            }
            // A window asks again and again: the answer must stay the same.
            for _ in 0..2 {
                let summary = merged.summary().unwrap();
                assert_eq!(summary.count, 700);
                assert_close(&summary.mean, &mean, 1e-15);
                assert_close(&summary.spread.pack(), &packed, 1e-11);
            }
        }
    }

    #[test]
    fn squares_are_the_diagonal_of_the_scatter() {
        let (mut squares, mut scatter) = (Moments::<Squares>::new(()), Moments::<Scatter>::new(()));
        for row in rows(300, 4) {
            squares.push(Vector::F64(&row));
            scatter.push(Vector::F64(&row));
        }
        let summary = scatter.summary().unwrap();
        let diagonal: Vec<f64> = (0..4).map(|j| summary.spread.lower()[(j, j)]).collect();
        assert_close(squares.summary().unwrap().spread.values(), &diagonal, 1e-13);
    }

    #[test]
    fn a_few_rows_travel_as_they_are() {
        let mut moments = Moments::<Scatter>::new(());
        for row in rows(3, 64) {
            moments.push(Vector::F64(&row));
        }
        assert!(moments.allocated() < 64 * 64 * size_of::<f64>());
        let state = moments.into_state();
        assert_eq!((state.count, state.spread.len(), state.pending.len()), (0, 0, 3 * 64));
    }
}
