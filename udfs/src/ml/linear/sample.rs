//! A sample of labelled rows that merges: those with the smallest hashes.
//!
//! Whatever the order of the rows and however they are split, the sample is the same. A row's hash is
//! that of its numbers and its label.

use std::collections::BinaryHeap;
use std::hash::{DefaultHasher, Hash, Hasher};

use arrow::datatypes::ToByteSlice;

use crate::ml::labels::Label;

/// The most rows of a sample.
const MAX_ROWS: usize = 1000;

/// The most numbers of a sample, 16 MiB of them.
const MAX_NUMBERS: usize = (16 << 20) / size_of::<f64>();

/// A row, in the order in which it is kept. Rows of one hash are ordered as well: the sample would
/// depend on which of them came first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    hash: u64,
    label: Label,
    bits: Vec<u64>,
}

/// All rows offered, or the sample of them.
#[derive(Debug, Default)]
pub(super) struct Sample {
    rows: BinaryHeap<Row>,
}

impl Sample {
    /// Takes a row, all of which have the same length, where it belongs to the sample.
    pub(super) fn offer(&mut self, row: &[f64], label: &Label) {
        // It has fixed keys: a process hashes as the others do.
        let mut hasher = DefaultHasher::new();
        hasher.write(row.to_byte_slice());
        label.hash(&mut hasher);
        let hash = hasher.finish();

        let full = self.rows.len() >= MAX_ROWS.min(MAX_NUMBERS / row.len());
        if full && self.rows.peek().is_some_and(|last| last.hash < hash) {
            return;
        }
        self.rows.push(Row {
            hash,
            label: label.clone(),
            bits: row.iter().map(|x| x.to_bits()).collect(),
        });
        if full {
            self.rows.pop();
        }
    }

    /// The rows, row-major.
    pub(super) fn rows(&self) -> Vec<f64> {
        let bits = self.rows.iter().flat_map(|row| &row.bits);
        bits.map(|bits| f64::from_bits(*bits)).collect()
    }

    /// The labels of [`Self::rows`].
    pub(super) fn labels(&self) -> impl Iterator<Item = &Label> {
        self.rows.iter().map(|row| &row.label)
    }

    /// The bytes held beside the value itself.
    pub(super) fn allocated(&self) -> usize {
        let held = |row: &Row| size_of_val(row.bits.as_slice()) + label_bytes(&row.label);
        self.rows.capacity() * size_of::<Row>() + self.rows.iter().map(held).sum::<usize>()
    }
}

/// The bytes that a label holds beside the value itself.
pub(super) fn label_bytes(label: &Label) -> usize {
    match label {
        Label::Text(text) => text.capacity(),
        Label::Integer(_) | Label::Boolean(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(sample: &Sample) -> Vec<(Vec<u64>, Label)> {
        let rows = sample.rows.iter().map(|row| (row.bits.clone(), row.label.clone()));
        let mut rows: Vec<_> = rows.collect();
        rows.sort();
        rows
    }

    fn offer(sample: &mut Sample, i: u32) {
        sample.offer(&[f64::from(i / 2), 0.5], &Label::Integer(i64::from(i % 3)));
    }

    #[test]
    fn a_sample_does_not_depend_on_the_order_or_the_parts() {
        let (mut forth, mut back) = (Sample::default(), Sample::default());
        (0..5000).for_each(|i| offer(&mut forth, i));
        (0..5000).rev().for_each(|i| offer(&mut back, i));
        assert_eq!(sorted(&forth).len(), MAX_ROWS);
        assert_eq!(sorted(&forth), sorted(&back));

        let mut merged = Sample::default();
        for part in 0..3 {
            let mut sample = Sample::default();
            (0..5000).filter(|i| i % 3 == part).for_each(|i| offer(&mut sample, i));
            let rows = sample.rows();
            rows.chunks_exact(2)
                .zip(sample.labels())
                .for_each(|(row, label)| merged.offer(row, label));
        }
        assert_eq!(sorted(&forth), sorted(&merged));
    }

    #[test]
    fn a_few_rows_are_all_kept() {
        let mut sample = Sample::default();
        (0..1000).for_each(|i| offer(&mut sample, i));
        assert_eq!(sample.labels().count(), 1000);
        assert_eq!(sample.rows().len(), 2000);
    }
}
