//! Frames of a window that lose rows as well as gain them.

use std::collections::VecDeque;
use std::fmt;

use arrow::array::{Array, ArrayRef};
use datafusion::common::{ScalarValue, not_impl_err};
use datafusion::error::Result;
use datafusion::logical_expr::Accumulator;

/// An accumulator that keeps the rows of its frame and fits them anew for each result: taking rows
/// back out of sums of squares would cost the digits that this crate promises.
pub(super) struct Sliding {
    make: Box<dyn Fn() -> Box<dyn Accumulator> + Send + Sync>,
    batches: VecDeque<Vec<ArrayRef>>,
}

impl Sliding {
    /// One whose results are those of the accumulators that `make` gives.
    pub(super) fn boxed(make: impl Fn() -> Box<dyn Accumulator> + Send + Sync + 'static) -> Box<dyn Accumulator> {
        Box::new(Self {
            make: Box::new(make),
            batches: VecDeque::new(),
        })
    }
}

impl fmt::Debug for Sliding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sliding").field("batches", &self.batches.len()).finish()
    }
}

fn rows(batch: &[ArrayRef]) -> usize {
    batch.first().map_or(0, |column| column.len())
}

impl Accumulator for Sliding {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        if rows(values) > 0 {
            self.batches.push_back(values.to_vec());
        }
        Ok(())
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        // A frame moves forward: the rows that leave it are the oldest.
        let mut leaving = rows(values);
        while let Some(batch) = self.batches.front_mut().filter(|_| leaving > 0) {
            let held = rows(batch);
            if held > leaving {
                for column in batch.iter_mut() {
                    *column = column.slice(leaving, held - leaving);
                }
                break;
            }
            leaving -= held;
            self.batches.pop_front();
        }
        Ok(())
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let mut frame = (self.make)();
        for batch in &self.batches {
            frame.update_batch(batch)?;
        }
        frame.evaluate()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        not_impl_err!("a window's frame is not split between partitions")
    }

    fn merge_batch(&mut self, _states: &[ArrayRef]) -> Result<()> {
        not_impl_err!("a window's frame is not split between partitions")
    }

    fn size(&self) -> usize {
        // A batch may be a slice of a larger one, which others hold as well.
        let bytes = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(0);
        size_of_val(self) + self.batches.iter().flatten().map(bytes).sum::<usize>()
    }
}
