//! Moments of labelled vectors: count and mean of each label, and one scatter matrix of the deviations
//! from these means, in one pass, mergeable.
//!
//! As in [`moments`](crate::ml::moments), rows are collected into blocks, and parts are joined by the
//! update of Chan, Golub and LeVeque: each step moves a mean on, and the scatter matrix grows by the
//! square of one row. Within a block a row joins those of its label before it; these then join the
//! label's rows of earlier blocks. A label's first row in a block has nothing to join there, and its
//! place is that of the second step. So a block of rows becomes as many rows of one matrix product,
//! however many labels it has.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::sample::{Sample, label_bytes};
use crate::ml::labels::Label;
use crate::ml::moments::{Scatter, Spread};
use crate::ml::vectors::Vector;

/// How many rows make a block: enough for the product to run at the processor's speed.
pub(super) const BLOCK_ROWS: usize = 256;

/// The rows of one label.
#[derive(Debug)]
struct Class {
    count: u64,
    /// The mean, less the origin.
    shift: Vec<f64>,
}

/// Counts, means and scatter of the rows seen so far, and a sample of them.
#[derive(Debug, Default)]
pub(super) struct ClassMoments {
    /// The first row seen, empty before there is one. All means are relative to it, so that a large
    /// offset that all rows share costs no digits.
    origin: Vec<f64>,
    classes: BTreeMap<Label, Class>,
    /// The sum of outer products of the deviations from each label's mean. Allocated for the first
    /// whole block: a group of few rows holds no features x features matrix.
    within: Option<Scatter>,
    /// Rows that wait for their block to be whole, row-major. They are in nothing of the above.
    pending: Vec<f64>,
    pending_labels: Vec<Label>,
    /// Of the rows that are not pending.
    sample: Sample,
}

/// The moments as they travel between partitions. Labels are sorted.
#[derive(Debug)]
pub(super) struct State<'a> {
    pub(super) labels: Vec<Label>,
    /// By label.
    pub(super) counts: Vec<u64>,
    /// The row that `shifts` are relative to; empty where there are no rows at all.
    pub(super) origin: Cow<'a, [f64]>,
    /// The means, less `origin`: labels x features, row-major.
    pub(super) shifts: Cow<'a, [f64]>,
    /// [`Spread::pack`]; empty where there are no labels.
    pub(super) within: Cow<'a, [f64]>,
    /// Rows that are in nothing of the above, row-major.
    pub(super) pending: Cow<'a, [f64]>,
    pub(super) pending_labels: Vec<Label>,
    /// A sample of the rows that are not pending, row-major.
    pub(super) sample: Cow<'a, [f64]>,
    pub(super) sample_labels: Vec<Label>,
}

/// The moments of all rows. Labels are sorted.
#[derive(Debug)]
pub(super) struct Summary<'a> {
    pub(super) labels: Vec<&'a Label>,
    /// By label, each at least 1.
    pub(super) counts: Vec<u64>,
    pub(super) origin: &'a [f64],
    /// By label: the mean, less `origin`.
    pub(super) shifts: Vec<&'a [f64]>,
    /// Around each label's mean.
    pub(super) within: &'a Scatter,
    pub(super) sample: &'a Sample,
}

impl ClassMoments {
    /// The length of the vectors; 0 before there is one.
    pub(super) fn features(&self) -> usize {
        self.origin.len()
    }

    /// How many labels there are, apart from those of pending rows.
    pub(super) fn label_count(&self) -> usize {
        self.classes.len()
    }

    /// Adds a row; all rows have the same length.
    pub(super) fn push(&mut self, row: Vector<'_>, label: Label) {
        let start = self.pending.len();
        row.extend_into(&mut self.pending);
        self.pending_labels.push(label);
        if self.origin.is_empty() {
            self.origin = self.pending[start..].to_vec();
        }
        if self.pending_labels.len() >= BLOCK_ROWS {
            self.absorb();
        }
    }

    /// Moves the pending rows into means, scatter and sample.
    fn absorb(&mut self) {
        if self.pending_labels.is_empty() {
            return;
        }
        let features = self.features();
        let mut rows = std::mem::take(&mut self.pending);
        // Where the block has the mean of a label's rows so far, and how many these are.
        let mut means: BTreeMap<Label, (usize, u64)> = BTreeMap::new();
        for (i, label) in std::mem::take(&mut self.pending_labels).into_iter().enumerate() {
            let (before, rest) = rows.split_at_mut(i * features);
            let row = &mut rest[..features];
            self.sample.offer(row, &label);
            row.iter_mut().zip(&self.origin).for_each(|(x, origin)| *x -= origin);
            match means.entry(label) {
                Entry::Vacant(first) => {
                    first.insert((i, 1));
                }
                Entry::Occupied(mut so_far) => {
                    let (at, count) = so_far.get_mut();
                    join(&mut before[*at * features..][..features], *count, row, 1);
                    *count += 1;
                }
            }
        }
        for (label, (at, count)) in means {
            self.join(label, &mut rows[at * features..][..features], count);
        }
        self.scatter().add_rows(&rows, features);
        rows.clear();
        self.pending = rows;
    }

    /// Moves a label's mean on by `count` rows with the mean `origin + row`, which becomes what the
    /// scatter grows by the square of.
    fn join(&mut self, label: Label, row: &mut [f64], count: u64) {
        let class = self.classes.entry(label).or_insert_with(|| Class {
            count: 0,
            shift: vec![0.0; row.len()],
        });
        join(&mut class.shift, class.count, row, count);
        class.count += count;
    }

    fn scatter(&mut self) -> &mut Scatter {
        let features = self.features();
        self.within.get_or_insert_with(|| Scatter::zeros((), features))
    }

    /// Adds the rows of another partition.
    pub(super) fn merge(&mut self, part: &State<'_>) {
        if part.origin.is_empty() {
            return;
        }
        if self.origin.is_empty() {
            self.origin = part.origin.to_vec();
        }
        let features = self.features();
        let labels = part.labels.chunks(BLOCK_ROWS).zip(part.counts.chunks(BLOCK_ROWS));
        for ((labels, counts), shifts) in labels.zip(part.shifts.chunks(BLOCK_ROWS * features)) {
            let mut rows = shifts.to_vec();
            for ((label, count), row) in labels.iter().zip(counts).zip(rows.chunks_exact_mut(features)) {
                for ((x, theirs), ours) in row.iter_mut().zip(&*part.origin).zip(&self.origin) {
                    *x += theirs - ours;
                }
                self.join(label.clone(), row, *count);
            }
            self.scatter().add_rows(&rows, features);
        }
        if !part.labels.is_empty() {
            self.scatter().add_packed(&part.within, features);
        }
        for (row, label) in part.sample.chunks_exact(features).zip(&part.sample_labels) {
            self.sample.offer(row, label);
        }
        for (row, label) in part.pending.chunks_exact(features).zip(&part.pending_labels) {
            self.push(Vector::F64(row), label.clone());
        }
    }

    /// Hands over what another partition needs to [`merge`](Self::merge).
    pub(super) fn into_state(mut self) -> State<'static> {
        // A few rows are smaller than the triangle of their scatter matrix: they travel as they are.
        if self.within.is_some() || self.pending.len() >= Scatter::packed_len((), self.features()) {
            self.absorb();
        }
        let (labels, classes): (Vec<_>, Vec<_>) = self.classes.into_iter().unzip();
        State {
            labels,
            counts: classes.iter().map(|class| class.count).collect(),
            origin: self.origin.into(),
            shifts: classes.into_iter().flat_map(|class| class.shift).collect(),
            within: self.within.map(|within| within.pack()).unwrap_or_default().into(),
            pending: self.pending.into(),
            pending_labels: self.pending_labels,
            sample: self.sample.rows().into(),
            sample_labels: self.sample.labels().cloned().collect(),
        }
    }

    /// A copy where there are less rows than a block. Its summary allocates a matrix that goes with
    /// the copy: many groups of few rows, asked one after another, need only one at a time.
    pub(super) fn copy_of_few(&self) -> Option<Self> {
        let copy = || Self {
            origin: self.origin.clone(),
            pending: self.pending.clone(),
            pending_labels: self.pending_labels.clone(),
            ..Self::default()
        };
        self.within.is_none().then(copy)
    }

    /// The moments of all rows so far; `None` where there are none. More rows may follow.
    pub(super) fn summary(&mut self) -> Option<Summary<'_>> {
        self.absorb();
        let within = self.within.as_ref()?;
        Some(Summary {
            labels: self.classes.keys().collect(),
            counts: self.classes.values().map(|class| class.count).collect(),
            origin: &self.origin,
            shifts: self.classes.values().map(|class| class.shift.as_slice()).collect(),
            within,
            sample: &self.sample,
        })
    }

    /// Is the matrix there, or will it be soon? A memory pool is to know before it is allocated.
    pub(super) fn has_matrix(&self) -> bool {
        self.within.is_some() || self.pending_labels.len() > BLOCK_ROWS / 2
    }

    /// The bytes of the sample.
    pub(super) fn sample_bytes(&self) -> usize {
        self.sample.allocated()
    }

    /// The bytes held beside the value itself, and those of a matrix that is to come.
    pub(super) fn allocated(&self) -> usize {
        let features = self.features();
        let numbers = self.origin.capacity() + self.pending.capacity() + self.classes.len() * features;
        let classes = self.classes.len() * size_of::<(Label, Class)>();
        let pending_labels = self.pending_labels.capacity() * size_of::<Label>();
        let texts: usize = self.classes.keys().chain(&self.pending_labels).map(label_bytes).sum();
        let matrix = if self.has_matrix() {
            Scatter::bytes((), features)
        } else {
            0
        };
        numbers * size_of::<f64>() + classes + pending_labels + texts + matrix + self.sample.allocated()
    }
}

/// Moves the mean of `ours` rows on by `theirs` rows with the mean `row`. What the scatter of all of
/// them has beyond the sum of the two is the square of what `row` becomes.
fn join(mean: &mut [f64], ours: u64, row: &mut [f64], theirs: u64) {
    let (ours, theirs) = (ours as f64, theirs as f64);
    let (share, weight) = (theirs / (ours + theirs), (ours * theirs / (ours + theirs)).sqrt());
    for (mean, x) in mean.iter_mut().zip(row) {
        let delta = *x - *mean;
        *mean += delta * share;
        *x = delta * weight;
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const FEATURES: usize = 5;

    /// Rows with an offset that a sum of squares does not survive; deterministic.
    fn rows(count: usize) -> Vec<([f64; FEATURES], Label)> {
        let value = |i: usize, j: usize| 1e6 + ((i * 7919 + j * 104_729) % 1009) as f64 / 100.0 - (i * j % 13) as f64;
        // Labels of very different counts, of which some come late.
        let label = |i: usize| Label::Integer([1, 2, 1, 3, 1, 2, 1, 4 + (i / 300) as i64][i % 8]);
        let row = |i| (std::array::from_fn(|j| value(i, j)), label(i));
        (0..count).map(row).collect()
    }

    /// Count and mean by label.
    type Means = BTreeMap<Label, (u64, Vec<f64>)>;

    /// Means less 1e6, and the packed scatter, in two passes over all rows.
    fn reference(rows: &[([f64; FEATURES], Label)]) -> (Means, Vec<f64>) {
        let mut classes = BTreeMap::new();
        for (row, label) in rows {
            let (count, sum) = classes.entry(label.clone()).or_insert((0, vec![0.0; FEATURES]));
            *count += 1;
            sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x - 1e6);
        }
        for (count, sum) in classes.values_mut() {
            sum.iter_mut().for_each(|sum| *sum /= *count as f64);
        }
        let deviation = |row: &([f64; FEATURES], Label), j: usize| row.0[j] - 1e6 - classes[&row.1].1[j];
        let product = |(i, j)| -> f64 { rows.iter().map(|row| deviation(row, i) * deviation(row, j)).sum() };
        let triangle = (0..FEATURES).flat_map(|j| (j..FEATURES).map(move |i| (i, j)));
        let packed = triangle.map(product).collect();
        (classes, packed)
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(1.0_f64, |max, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-11 * scale, "{found} is not {expected}");
        }
    }

    fn moments<'a>(rows: impl IntoIterator<Item = &'a ([f64; FEATURES], Label)>) -> ClassMoments {
        let mut moments = ClassMoments::default();
        for (row, label) in rows {
            moments.push(Vector::F64(row), label.clone());
        }
        moments
    }

    #[test]
    fn blocks_and_partitions_give_what_all_rows_give() {
        let rows = rows(1500);
        let (classes, packed) = reference(&rows);
        for partitions in [1, 2, 7, 600] {
            for reversed in [false, true] {
                let part = |k: usize| moments(rows.iter().skip(k).step_by(partitions)).into_state();
                let mut parts: Vec<_> = (0..partitions).map(part).collect();
                if reversed {
                    parts.reverse();
                }
                let mut merged = ClassMoments::default();
                parts.iter().for_each(|part| merged.merge(part));
                // A window asks again and again: the answer must stay the same.
                for _ in 0..2 {
                    let summary = merged.summary().unwrap();
                    assert!(summary.labels.iter().copied().eq(classes.keys()));
                    for ((count, shift), expected) in summary.counts.iter().zip(&summary.shifts).zip(classes.values()) {
                        let mean: Vec<f64> = shift.iter().zip(summary.origin).map(|(a, b)| a + (b - 1e6)).collect();
                        assert_eq!(*count, expected.0);
                        assert_close(&mean, &expected.1);
                    }
                    assert_close(&summary.within.pack(), &packed);
                    assert_eq!(summary.sample.labels().count(), 1000);
                }
            }
        }
    }

    #[test]
    fn equal_rows_have_no_scatter() {
        let rows: Vec<_> = (0..600)
            .map(|i| ([0.1 + f64::from(i % 2); FEATURES], Label::Boolean(i % 2 == 0)))
            .collect();
        assert_eq!(moments(&rows).summary().unwrap().within.total(), 0.0);
    }

    #[test]
    fn a_few_rows_travel_as_they_are() {
        let mut moments = ClassMoments::default();
        for i in 0..3 {
            moments.push(Vector::F64(&[f64::from(i); 64]), Label::Integer(0));
        }
        assert!(moments.allocated() < Scatter::bytes((), 64));
        let few = moments.copy_of_few().unwrap().summary().unwrap().counts[0];
        assert_eq!(few, 3);
        let state = moments.into_state();
        assert_eq!((state.labels.len(), state.within.len(), state.sample.len()), (0, 0, 0));
        assert_eq!((state.pending.len(), state.pending_labels.len()), (3 * 64, 3));
    }
}
