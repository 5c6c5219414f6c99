//! `pca_fit` of vectors far too long for a matrix of features x features: 660 rows x 100,352, the
//! size of the study's embeddings without pooling. Alone in its process, whose memory it measures.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use common::{Matrix, assert_close, field, model, number, word};
use datafusion::datasource::MemTable;
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, Volatility, create_udf};
use datafusion::prelude::SessionContext;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

const ROWS: usize = 660;
const FEATURES: usize = 100_352;
const K: usize = 25;
/// Directions in which the rows vary, beside noise.
const DIRECTIONS: usize = 120;
/// Columns that are generated and multiplied together.
const BLOCK: usize = 1024;

/// Vectors that are generated, not stored: rows x directions times directions x features, and noise.
/// Each direction is a little weaker than the one before, and rows of one label are alike.
struct Vectors {
    scores: Vec<f32>,
    loadings: Vec<f32>,
}

/// About normal, with a standard deviation of 1; always the same for `i`.
fn random(stream: u64, i: usize) -> f32 {
    // SplitMix64.
    let mut z = ((stream << 40) | i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    // The sum of four numbers that are uniform in [0, 1) has the mean 2 and the variance 1/3.
    let sum: u64 = (0..4).map(|k| (z >> (16 * k)) & 0xFFFF).sum();
    (sum as f32 / 65_536.0 - 2.0) * 3.0_f32.sqrt()
}

impl Vectors {
    fn new() -> Self {
        let score = |row: usize, direction: usize| {
            let label = row * 12 / ROWS;
            let alike = random(1, label * DIRECTIONS + direction) + random(2, row * DIRECTIONS + direction);
            0.97_f32.powi(direction as i32) * alike
        };
        Self {
            scores: (0..ROWS)
                .flat_map(|row| (0..DIRECTIONS).map(move |direction| score(row, direction)))
                .collect(),
            loadings: (0..DIRECTIONS * FEATURES).map(|i| random(3, i)).collect(),
        }
    }

    /// Some columns of some rows, row-major.
    fn generate(&self, rows: &[usize], columns: Range<usize>) -> Vec<f32> {
        let noise = |row: &usize| {
            let start = row * FEATURES;
            columns.clone().map(move |column| 2.0 * random(4, start + column))
        };
        let mut values: Vec<f32> = rows.iter().flat_map(noise).collect();
        let of_row = |row: &usize| &self.scores[row * DIRECTIONS..][..DIRECTIONS];
        let scores: Vec<f32> = rows.iter().flat_map(of_row).copied().collect();
        matmul(
            MatMut::from_row_major_slice_mut(&mut values, rows.len(), columns.len()),
            Accum::Add,
            MatRef::from_row_major_slice(&scores, rows.len(), DIRECTIONS),
            MatRef::from_row_major_slice(&self.loadings, DIRECTIONS, FEATURES).subcols(columns.start, columns.len()),
            1.0,
            Par::Seq,
        );
        values
    }

    fn column(&self, rows: &[usize]) -> ArrayRef {
        let values = Arc::new(Float32Array::from(self.generate(rows, 0..FEATURES)));
        let field = Arc::new(Field::new_list_field(DataType::Float32, true));
        Arc::new(FixedSizeListArray::new(field, FEATURES as i32, values, None))
    }

    /// A session whose table `t` has the rows dealt out to partitions, and makes them as they are read.
    fn session(self: &Arc<Self>, partitions: usize) -> SessionContext {
        let session = common::session(partitions, None);
        let vectors = Arc::clone(self);
        let element = Arc::new(Field::new_list_field(DataType::Float32, true));
        let generate = move |arguments: &[ColumnarValue]| -> Result<ColumnarValue> {
            let rows = arguments[0].to_array(1)?;
            let rows = rows.as_primitive::<Int64Type>().values().iter();
            let rows: Vec<usize> = rows.map(|row| *row as usize).collect();
            Ok(ColumnarValue::Array(vectors.column(&rows)))
        };
        session.register_udf(create_udf(
            "generate",
            vec![DataType::Int64],
            DataType::FixedSizeList(element, FEATURES as i32),
            Volatility::Immutable,
            Arc::new(generate),
        ));
        let schema = Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, true)]));
        let batches = |first: usize| -> Vec<RecordBatch> {
            let ids: Vec<i64> = (0..ROWS as i64).skip(first).step_by(partitions).collect();
            let batch = |ids: &[i64]| {
                let ids: ArrayRef = Arc::new(Int64Array::from(ids.to_vec()));
                RecordBatch::try_new(Arc::clone(&schema), vec![ids]).unwrap()
            };
            ids.chunks(32).map(batch).collect()
        };
        let table = MemTable::try_new(Arc::clone(&schema), (0..partitions).map(batches).collect()).unwrap();
        session.register_table("ids", Arc::new(table)).unwrap();
        session
    }

    /// The exact variances of all components from the largest down, their sum, and the variance along
    /// the axes of each basis (K x FEATURES).
    fn exact(&self, bases: &[Vec<f64>]) -> (Vec<f64>, f64, Vec<f64>) {
        let all: Vec<usize> = (0..ROWS).collect();
        let mut gram = Mat::<f64>::zeros(ROWS, ROWS);
        let mut scores: Vec<_> = bases.iter().map(|_| Mat::<f64>::zeros(ROWS, K)).collect();
        for start in (0..FEATURES).step_by(BLOCK) {
            let values = self.generate(&all, start..start + BLOCK);
            let values = MatRef::from_row_major_slice(&values, ROWS, BLOCK);
            let mut block = Mat::from_fn(ROWS, BLOCK, |i, j| f64::from(values[(i, j)]));
            for j in 0..BLOCK {
                let column = block.col_as_slice_mut(j);
                let mean = column.iter().sum::<f64>() / ROWS as f64;
                column.iter_mut().for_each(|x| *x -= mean);
            }
            matmul(&mut gram, Accum::Add, &block, block.transpose(), 1.0, Par::Seq);
            for (basis, scores) in bases.iter().zip(&mut scores) {
                let axes = MatRef::from_row_major_slice(basis, K, FEATURES).subcols(start, BLOCK);
                matmul(scores, Accum::Add, &block, axes.transpose(), 1.0, Par::Seq);
            }
        }
        let freedom = (ROWS - 1) as f64;
        let mut variances = gram.self_adjoint_eigenvalues(Side::Lower).unwrap();
        variances.reverse();
        variances.iter_mut().for_each(|x| *x /= freedom);
        let total = variances.iter().sum();
        let captured = scores
            .iter()
            .map(|scores| scores.as_ref().squared_norm_l2() / freedom)
            .collect();
        (variances, total, captured)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_studys_embeddings_without_pooling() {
    let vectors = Arc::new(Vectors::new());
    let mut models = vec![];
    for partitions in [1, 3] {
        let session = vectors.session(partitions);
        common::run(&session, "CREATE VIEW t AS SELECT generate(id) AS v FROM ids").await;
        models.push(model(&session, &format!("pca_fit(v, {K})")).await);
    }
    #[cfg(target_os = "linux")]
    {
        let peak = peak_memory();
        assert!(peak < 1 << 30, "{} MiB", peak >> 20);
    }

    let bases: Matrix = models.iter().map(|model| field(model, "components")).collect();
    let (exact, total, captured) = vectors.exact(&bases);
    let best: f64 = exact[..K].iter().sum();
    for (model, captured) in models.iter().zip(captured) {
        assert_eq!(word(model, "method"), "incremental");
        assert_eq!(number(model, "count"), ROWS as f64);
        assert_close(
            "total variance",
            &[number(model, "total_variance")],
            &[total],
            1e-9,
            0.0,
        );

        // What the components really capture, and what the model says of it.
        let told = field(model, "explained_variance");
        assert!((0.99..1.0 + 1e-9).contains(&(captured / best)), "{captured} of {best}");
        assert!(
            (0.99..1.0 + 1e-9).contains(&(told.iter().sum::<f64>() / best)),
            "{told:?}"
        );

        let bound = number(model, "explained_variance_error");
        let rounding = 1e-9 * total;
        for (told, exact) in told.iter().zip(&exact) {
            let error = exact - told;
            assert!(
                error > -rounding && error <= bound + rounding,
                "{error} is not within {bound}"
            );
        }
        assert!(bound < total, "{bound} says nothing of {total}");
    }
}

/// The most memory that this process has held, in bytes.
#[cfg(target_os = "linux")]
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}
