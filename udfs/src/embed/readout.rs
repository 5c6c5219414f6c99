//! From a network's output to one vector per image.

use super::graph::{GraphError, Layout, Output};

/// How the output for one image becomes one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readout {
    /// As it is.
    Copy,
    /// The mean of every row of a matrix with so many columns: a map of `[channels, positions]`.
    RowMeans {
        /// Positions of the map.
        columns: usize,
    },
    /// The mean of every column of a matrix: a map of `[positions, channels]`.
    ColumnMeans {
        /// Channels of the map.
        columns: usize,
    },
    /// The matrix transposed: from `[channels, positions]` to the other order, or back.
    Transposed {
        /// Columns of the matrix as the network gives it.
        columns: usize,
    },
}

impl Readout {
    /// How to read `output` out of values of `shape` (one image, without the batch), whose axes are
    /// as `map` says, for a network that takes `input`; with the length of the vector.
    ///
    /// # Errors
    /// Where there are no values, or a pooled vector is wanted and they are neither a vector nor a map.
    pub fn new(output: Output, input: Layout, map: Layout, shape: &[usize]) -> Result<(Self, usize), GraphError> {
        let length: usize = shape.iter().product();
        if length == 0 {
            return Err(GraphError::Shape(shape.to_vec()));
        }
        let is_vector = shape.iter().filter(|side| **side != 1).count() <= 1;
        let ([first, .., last], 3, false) = (shape, shape.len(), is_vector) else {
            return match output {
                Output::Pooled if !is_vector => Err(GraphError::Shape(shape.to_vec())),
                _ => Ok((Self::Copy, length)),
            };
        };
        let (channels, columns) = match map {
            Layout::Nchw => (*first, length / first),
            Layout::Nhwc => (*last, *last),
        };
        Ok(match (output, map) {
            (Output::Pooled, Layout::Nchw) => (Self::RowMeans { columns }, channels),
            (Output::Pooled, Layout::Nhwc) => (Self::ColumnMeans { columns }, channels),
            (Output::Flatten, _) if map != input => (Self::Transposed { columns }, length),
            (Output::Flatten | Output::Logits, _) => (Self::Copy, length),
        })
    }

    /// Writes the vector of one image.
    pub fn apply(self, values: &[f32], vector: &mut [f32]) {
        match self {
            Self::Copy => vector.copy_from_slice(values),
            Self::RowMeans { columns } => {
                for (mean, row) in vector.iter_mut().zip(values.chunks_exact(columns)) {
                    *mean = (row.iter().copied().map(f64::from).sum::<f64>() / columns as f64) as f32;
                }
            }
            Self::ColumnMeans { columns } => {
                let rows = (values.len() / columns) as f64;
                for (column, mean) in vector.iter_mut().enumerate() {
                    let values = values.iter().skip(column).step_by(columns);
                    *mean = (values.copied().map(f64::from).sum::<f64>() / rows) as f32;
                }
            }
            Self::Transposed { columns } => {
                let rows = values.len() / columns;
                for (column, transposed) in vector.chunks_exact_mut(rows).enumerate() {
                    for (value, out) in values.iter().skip(column).step_by(columns).zip(transposed) {
                        *out = *value;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn maps_are_averaged_and_flattened_in_the_order_of_the_input() {
        // Two channels of three positions.
        let (channels_first, channels_last) = ([1., 2., 3., 10., 20., 30.], [1., 10., 2., 20., 3., 30.]);
        let read = |output, input, map, shape: &[usize], values: &[f32]| {
            let (readout, length) = Readout::new(output, input, map, shape).unwrap();
            let mut vector = vec![0.0; length];
            readout.apply(values, &mut vector);
            vector
        };
        use Layout::{Nchw, Nhwc};
        assert_eq!(read(Output::Pooled, Nhwc, Nchw, &[2, 1, 3], &channels_first), [2., 20.]);
        assert_eq!(read(Output::Pooled, Nhwc, Nhwc, &[1, 3, 2], &channels_last), [2., 20.]);
        assert_eq!(
            read(Output::Flatten, Nchw, Nchw, &[2, 1, 3], &channels_first),
            channels_first
        );
        assert_eq!(
            read(Output::Flatten, Nhwc, Nchw, &[2, 1, 3], &channels_first),
            channels_last
        );
        assert_eq!(
            read(Output::Flatten, Nchw, Nhwc, &[1, 3, 2], &channels_last),
            channels_first
        );
        assert_eq!(
            read(Output::Pooled, Nhwc, Nchw, &[6, 1, 1], &channels_first),
            channels_first
        );
        assert!(Readout::new(Output::Pooled, Nhwc, Nchw, &[197, 768]).is_err());
        assert!(Readout::new(Output::Pooled, Nhwc, Nchw, &[0, 7, 7]).is_err());
    }
}
