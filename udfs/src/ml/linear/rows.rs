//! Labelled vectors, all of them: for a fit that goes over its rows again and again.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float64Array, UInt32Array};
use arrow::datatypes::DataType;
use datafusion::common::internal_err;
use datafusion::error::Result;
use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use crate::ml::fit::length_error;
use crate::ml::vectors::Vector;

/// Enough rows for a matrix product to run at the processor's speed instead of the memory's.
pub(super) const BLOCK_ROWS: usize = 256;

/// The most chunks that are worked on side by side. It is not the number of cores: the order in which
/// numbers are added decides their last digits, and these are to be the same on every machine.
const MAX_CHUNKS: usize = 16;

/// Vectors of one length and one element type, each with the number of its label. They are kept in
/// blocks, since one allocation of all of them would be copied whenever it grows.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    blocks: Blocks,
    labels: Vec<u32>,
    /// 0 before there is a row.
    features: usize,
}

/// All but the last have [`BLOCK_ROWS`] rows; row-major.
#[derive(Debug, Clone)]
enum Blocks {
    F32(Vec<Vec<f32>>),
    F64(Vec<Vec<f64>>),
}

/// Some of the rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    /// Row-major.
    pub(super) rows: Vector<'a>,
    /// The number of each row's label.
    pub(super) labels: &'a [u32],
}

impl Rows {
    /// No rows, of vectors with these elements.
    ///
    /// # Errors
    /// An internal error where vectors have no such elements.
    pub(super) fn try_new(element: &DataType) -> Result<Self> {
        let blocks = match element {
            DataType::Float32 => Blocks::F32(vec![]),
            DataType::Float64 => Blocks::F64(vec![]),
            other => return internal_err!("expected elements of Float32 or Float64, found {other}"),
        };
        Ok(Self {
            blocks,
            labels: vec![],
            features: 0,
        })
    }

    /// The number of rows.
    pub(super) fn len(&self) -> usize {
        self.labels.len()
    }

    /// The length of the vectors; 0 before there is one.
    pub(super) fn features(&self) -> usize {
        self.features
    }

    /// Adds a row; `function` is named in errors.
    ///
    /// # Errors
    /// Where it has another length than the others.
    pub(super) fn push(&mut self, function: &str, row: Vector<'_>, label: u32) -> Result<()> {
        match self.features {
            0 => self.features = row.len(),
            features if features == row.len() => {}
            features => return length_error(function, features, row.len()),
        }
        match (&mut self.blocks, row) {
            (Blocks::F32(blocks), Vector::F32(row)) => push_row(blocks, row),
            (Blocks::F64(blocks), Vector::F64(row)) => push_row(blocks, row),
            _ => return internal_err!("{function} got vectors of another type than those before"),
        }
        self.labels.push(label);
        Ok(())
    }

    /// Adds a row for each label, `rows` being row-major.
    ///
    /// # Errors
    /// Where they have another length than the others.
    pub(super) fn append(&mut self, function: &str, rows: Vector<'_>, labels: &[u32]) -> Result<()> {
        let features = match rows.len().checked_div(labels.len()) {
            Some(features @ 1..) if features * labels.len() == rows.len() => features,
            _ => return internal_err!("{} numbers are not {} vectors", rows.len(), labels.len()),
        };
        match rows {
            Vector::F32(rows) => {
                let mut rows = rows.chunks_exact(features).zip(labels);
                rows.try_for_each(|(row, label)| self.push(function, Vector::F32(row), *label))
            }
            Vector::F64(rows) => {
                let mut rows = rows.chunks_exact(features).zip(labels);
                rows.try_for_each(|(row, label)| self.push(function, Vector::F64(row), *label))
            }
        }
    }

    /// Hands over the elements of all rows, row-major, and their labels; none are left.
    pub(super) fn take(&mut self) -> (ArrayRef, ArrayRef) {
        let elements: ArrayRef = match &mut self.blocks {
            Blocks::F32(blocks) => Arc::new(Float32Array::from(joined(std::mem::take(blocks)))),
            Blocks::F64(blocks) => Arc::new(Float64Array::from(joined(std::mem::take(blocks)))),
        };
        self.features = 0;
        (elements, Arc::new(UInt32Array::from(std::mem::take(&mut self.labels))))
    }

    /// Gives label `i` the number `numbers[i]`.
    pub(super) fn renumber(&mut self, numbers: &[u32]) {
        for label in &mut self.labels {
            *label = numbers[*label as usize];
        }
    }

    /// How many rows each of `labels` labels has.
    pub(super) fn label_counts(&self, labels: usize) -> Vec<u64> {
        let mut counts = vec![0; labels];
        for label in &self.labels {
            counts[*label as usize] += 1;
        }
        counts
    }

    /// The rows in order, at most [`BLOCK_ROWS`] in a block.
    pub(super) fn blocks(&self) -> Vec<Block<'_>> {
        let labels = self.labels.chunks(BLOCK_ROWS);
        match &self.blocks {
            Blocks::F32(blocks) => {
                let rows = blocks.iter().map(|rows| Vector::F32(rows));
                rows.zip(labels).map(|(rows, labels)| Block { rows, labels }).collect()
            }
            Blocks::F64(blocks) => {
                let rows = blocks.iter().map(|rows| Vector::F64(rows));
                rows.zip(labels).map(|(rows, labels)| Block { rows, labels }).collect()
            }
        }
    }

    /// How many chunks [`Self::map_chunks`] makes at most.
    pub(super) fn chunks(&self) -> usize {
        self.len().div_ceil(BLOCK_ROWS).min(MAX_CHUNKS)
    }

    /// What `work` gives for each chunk of the rows, in the order of the rows; on all cores.
    pub(super) fn map_chunks<T: Send>(&self, work: impl Fn(&[Block<'_>]) -> T + Send + Sync) -> Vec<T> {
        let blocks = self.blocks();
        let blocks_per_chunk = blocks.len().div_ceil(MAX_CHUNKS).max(1);
        blocks.par_chunks(blocks_per_chunk).map(work).collect()
    }

    /// The bytes held beside the value itself.
    pub(super) fn allocated(&self) -> usize {
        let elements = match &self.blocks {
            Blocks::F32(blocks) => bytes(blocks),
            Blocks::F64(blocks) => bytes(blocks),
        };
        elements + self.labels.capacity() * size_of::<u32>()
    }
}

// A block grows as a Vec does, so that a group of few rows holds little.
fn push_row<T: Copy>(blocks: &mut Vec<Vec<T>>, row: &[T]) {
    match blocks.last_mut() {
        Some(block) if block.len() < BLOCK_ROWS * row.len() => block.extend_from_slice(row),
        _ => blocks.push(row.to_vec()),
    }
}

// Gives back each block as soon as it is copied.
fn joined<T>(blocks: Vec<Vec<T>>) -> Vec<T> {
    let mut elements = Vec::with_capacity(blocks.iter().map(Vec::len).sum());
    blocks.into_iter().for_each(|block| elements.extend(block));
    elements
}

// The blocks before the last are alike: this is asked after every batch.
fn bytes<T>(blocks: &[Vec<T>]) -> usize {
    let whole = |first: &Vec<T>| (blocks.len() - 1) * first.capacity();
    let elements = blocks.first().map_or(0, whole) + blocks.last().map_or(0, Vec::capacity);
    elements * size_of::<T>() + size_of_val(blocks)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::AsArray;
    use arrow::datatypes::{Float32Type, UInt32Type};

    use super::*;

    #[test]
    fn rows_come_back_in_order() {
        let mut rows = Rows::try_new(&DataType::Float32).unwrap();
        for i in 0..10_000_u32 {
            rows.push("f", Vector::F32(&[i as f32, 0.5, -1.0]), i % 7).unwrap();
        }
        assert_eq!((rows.len(), rows.features(), rows.chunks()), (10_000, 3, 16));
        assert_eq!(rows.label_counts(7)[..2], [1429, 1429]);
        assert!(rows.allocated() >= 10_000 * 4 * 4);

        let labels = rows.map_chunks(|blocks| {
            blocks
                .iter()
                .flat_map(|block| block.labels.to_vec())
                .collect::<Vec<_>>()
        });
        assert!(labels.len() > 1 && labels.len() <= rows.chunks());
        assert_eq!(labels.concat(), (0..10_000).map(|i| i % 7).collect::<Vec<u32>>());

        let (elements, labels) = rows.take();
        assert_eq!((rows.len(), rows.features()), (0, 0));
        let elements = elements.as_primitive::<Float32Type>().values();
        rows.append("f", Vector::F32(elements), labels.as_primitive::<UInt32Type>().values())
            .unwrap();
        assert_eq!(rows.take().0.as_primitive::<Float32Type>().values(), elements);
    }

    #[test]
    fn vectors_have_one_length() {
        let mut rows = Rows::try_new(&DataType::Float64).unwrap();
        rows.push("f", Vector::F64(&[1.0, 2.0]), 0).unwrap();
        let error = rows.push("f", Vector::F64(&[1.0]), 0).unwrap_err().to_string();
        assert!(error.contains("f: vectors of different lengths, 2 and 1"), "{error}");
        assert!(rows.append("f", Vector::F64(&[1.0, 2.0, 3.0]), &[0, 0]).is_err());
        assert!(rows.append("f", Vector::F64(&[1.0]), &[]).is_err());
    }
}
