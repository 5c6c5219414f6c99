//! The optimum of multinomial logistic regression.
//!
//! With a score for each label, `W x + b`, whose softmax are the labels' probabilities, it minimizes
//!
//! ```text
//! Σ over rows of -ln(probability of the row's label) + l2/2 ‖W‖²
//! ```
//!
//! as scikit-learn's `LogisticRegression(C=1/l2)` does. Of two labels, that one fits the difference of
//! their scores, whose squared norm is twice that of the two: here, l2 counts twice then.
//!
//! The method is L-BFGS: Liu, D. C., Nocedal, J. (1989), "On the Limited Memory BFGS Method for Large
//! Scale Optimization", Mathematical Programming 45, 503-528, as `argmin` has it. `linfa-logistic`
//! 0.8.1 wraps the same solver and is not used: its `log_sum_exp` takes off the largest score of all
//! rows instead of each row's, so that a row whose scores lie 35 below has wrong probabilities; it
//! computes the scores again for the gradient, and does not say whether it converged.

use std::cell::{Cell, RefCell};

use argmin::core::{CostFunction, Executor, Gradient, IterState};
use argmin::solver::linesearch::MoreThuenteLineSearch;
use argmin::solver::quasinewton::LBFGS;
use datafusion::common::{exec_datafusion_err, internal_err};
use datafusion::error::Result;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::rows::{BLOCK_ROWS, Block, Rows};
use crate::ml::moments::{Moments, Squares};
use crate::ml::vectors::Vector;

/// The steps of which L-BFGS remembers how they changed the gradient.
const MEMORY: usize = 10;

/// Converged is where the gradient of the scaled parameters is shorter than this. Probabilities are
/// then those of the optimum within about 1e-6.
const TOLERANCE: f64 = 1e-7;

/// The most passes over the rows. Embeddings take 100 to 500.
const MAX_PASSES: usize = 1000;

/// How much of the loss's curvature is left at the optimum: `p (1 - p)` falls as labels part. Only the
/// path hangs on it, not the optimum.
const CURVATURE_LEFT: f64 = 0.01;

/// The vectors of parameters that are held at once beside the memory: in argmin's states of solver
/// and line search, and for the last evaluation and the next.
const STATE_VECTORS: usize = 24;

/// A score for each label: `coefficients · x + intercept`.
#[derive(Debug)]
pub(super) struct Fitted {
    /// labels x features, row-major
    pub(super) coefficients: Vec<f64>,
    /// By label.
    pub(super) intercepts: Vec<f64>,
    /// Is this the optimum, or how far the passes led?
    pub(super) converged: bool,
}

/// Fits rows of at least two labels; `counts` are the rows of each.
///
/// # Errors
/// Where numbers are too large for their squares.
pub(super) fn fit(rows: &Rows, counts: &[u64], l2: f64) -> Result<Fitted> {
    let objective = Objective::try_new(rows, counts, l2)?;
    let (parameters, converged) = minimize(&objective, objective.start(counts)).map_err(|error| {
        exec_datafusion_err!(
            "logistic_fit: {error}: the vectors or l2 hold numbers whose squares are too large for Float64"
        )
    })?;
    let (coefficients, intercepts) = objective.unscaled(&parameters);
    Ok(Fitted {
        coefficients,
        intercepts,
        converged,
    })
}

/// The bytes that [`fit`] allocates at most.
pub(super) fn workspace(rows: &Rows, labels: usize) -> usize {
    let (width, chunks) = (rows.features() + 1, rows.chunks());
    let vectors = 2 * MEMORY + STATE_VECTORS + chunks;
    let block = rows.len().min(BLOCK_ROWS) * (width + labels);
    let blocks = chunks.min(rayon::current_num_threads());
    (vectors * labels * width + blocks * block) * size_of::<f64>()
}

/// What is minimized, divided by the number of rows, as a function of labels x (features + 1)
/// parameters, row-major, the last of a row being the intercept.
///
/// Features are centred, which the intercepts, free of penalty, make up for, and scaled, for which the
/// penalty is. The scale makes the second derivatives alike, at the start with [`CURVATURE_LEFT`]: a
/// search that starts with steps of one length in all directions then needs far fewer of them.
#[derive(Debug)]
struct Objective<'a> {
    rows: &'a Rows,
    labels: usize,
    /// By feature.
    mean: Vec<f64>,
    /// By feature; 0 where the feature can have no effect.
    scale: Vec<f64>,
    /// By feature.
    penalty: Vec<f64>,
    intercept_scale: f64,
}

impl<'a> Objective<'a> {
    fn try_new(rows: &'a Rows, counts: &[u64], l2: f64) -> Result<Self> {
        let mut moments = Moments::<Squares>::new(());
        let mut values = vec![];
        for block in rows.blocks() {
            values.clear();
            block.rows.extend_into(&mut values);
            let rows = values.chunks_exact(rows.features());
            rows.for_each(|row| moments.push(Vector::F64(row)));
        }
        let Some(summary) = moments.summary() else {
            return internal_err!("logistic_fit of no rows");
        };

        let (count, labels) = (rows.len() as f64, counts.len());
        let l2 = if labels == 2 { 2.0 * l2 } else { l2 };
        let l2 = l2 / count;
        // The mean over labels of p (1 - p), before anything is known of the vectors.
        let shares = counts.iter().map(|rows| *rows as f64 / count);
        let curvature = shares.map(|share| share * (1.0 - share)).sum::<f64>() / labels as f64;

        let squares = summary.spread.values();
        let second_derivatives = |left: f64| squares.iter().map(move |square| left * curvature * square / count + l2);
        let size = second_derivatives(CURVATURE_LEFT).sum::<f64>() / second_derivatives(1.0).sum::<f64>();
        let scale: Vec<f64> = second_derivatives(CURVATURE_LEFT)
            .map(|second| if second == 0.0 { 0.0 } else { (size / second).sqrt() })
            .collect();
        Ok(Self {
            rows,
            labels,
            penalty: scale.iter().map(|scale| l2 * scale * scale).collect(),
            scale,
            intercept_scale: curvature.sqrt().recip(),
            mean: summary.mean,
        })
    }

    /// The parameters of a row: those of its features and the intercept.
    fn width(&self) -> usize {
        self.mean.len() + 1
    }

    /// Where all vectors have the labels' shares as probabilities. These parameters add up to 0 over the
    /// labels, as each gradient does: what is found is the shortest of all that are as good.
    fn start(&self, counts: &[u64]) -> Vec<f64> {
        let logarithms = || counts.iter().map(|count| (*count as f64).ln());
        let mean = logarithms().sum::<f64>() / self.labels as f64;
        let mut parameters = vec![0.0; self.labels * self.width()];
        let intercepts = parameters.chunks_exact_mut(self.width()).filter_map(<[f64]>::last_mut);
        for (intercept, logarithm) in intercepts.zip(logarithms()) {
            *intercept = (logarithm - mean) / self.intercept_scale;
        }
        parameters
    }

    /// Coefficients and intercepts for vectors as they are.
    fn unscaled(&self, parameters: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut coefficients = Vec::with_capacity(self.labels * self.mean.len());
        let mut intercepts = Vec::with_capacity(self.labels);
        for (intercept, scaled) in parameters.chunks_exact(self.width()).filter_map(<[f64]>::split_last) {
            let start = coefficients.len();
            coefficients.extend(
                scaled
                    .iter()
                    .zip(&self.scale)
                    .map(|(parameter, scale)| parameter * scale),
            );
            let at_mean = coefficients[start..].iter().zip(&self.mean);
            let at_mean: f64 = at_mean.map(|(coefficient, mean)| coefficient * mean).sum();
            intercepts.push(intercept * self.intercept_scale - at_mean);
        }
        (coefficients, intercepts)
    }

    /// The cost and its gradient, in one pass over the rows.
    fn evaluate(&self, parameters: &[f64]) -> (f64, Vec<f64>) {
        let count = self.rows.len() as f64;
        let mut cost = 0.0;
        let mut gradient = vec![0.0; parameters.len()];
        for (loss, part) in self.rows.map_chunks(|blocks| self.losses(blocks, parameters)) {
            cost += loss / count;
            gradient.iter_mut().zip(&part).for_each(|(sum, x)| *sum += x / count);
        }
        let width = self.width();
        for (gradient, parameters) in gradient.chunks_exact_mut(width).zip(parameters.chunks_exact(width)) {
            for ((gradient, parameter), penalty) in gradient.iter_mut().zip(parameters).zip(&self.penalty) {
                cost += 0.5 * penalty * parameter * parameter;
                *gradient += penalty * parameter;
            }
        }
        (cost, gradient)
    }

    /// The sum of the losses of some rows, and its gradient.
    fn losses(&self, blocks: &[Block<'_>], parameters: &[f64]) -> (f64, Vec<f64>) {
        let (labels, width) = (self.labels, self.width());
        let (mut vectors, mut scores) = (vec![], vec![]);
        let mut loss = 0.0;
        let mut gradient = vec![0.0; parameters.len()];
        for block in blocks {
            let rows = block.labels.len();
            match block.rows {
                Vector::F32(values) => self.scaled(values, &mut vectors),
                Vector::F64(values) => self.scaled(values, &mut vectors),
            }
            let vectors = MatRef::from_row_major_slice(&vectors, rows, width);
            scores.resize(rows * labels, 0.0);
            // One thread for each product: the chunks have the others.
            matmul(
                MatMut::from_row_major_slice_mut(&mut scores, rows, labels),
                Accum::Replace,
                vectors,
                MatRef::from_row_major_slice(parameters, labels, width).transpose(),
                1.0,
                Par::Seq,
            );
            loss += residuals(&mut scores, block.labels, labels);
            matmul(
                MatMut::from_row_major_slice_mut(&mut gradient, labels, width),
                Accum::Add,
                MatRef::from_row_major_slice(&scores, rows, labels).transpose(),
                vectors,
                1.0,
                Par::Seq,
            );
        }
        (loss, gradient)
    }

    /// Centred and scaled vectors, each with the feature that the intercept belongs to.
    fn scaled<T: Copy + Into<f64>>(&self, values: &[T], vectors: &mut Vec<f64>) {
        vectors.clear();
        for row in values.chunks_exact(self.mean.len()) {
            let row = row.iter().zip(&self.mean).zip(&self.scale);
            vectors.extend(row.map(|((x, mean), scale)| {
                let x: f64 = (*x).into();
                (x - mean) * scale
            }));
            vectors.push(self.intercept_scale);
        }
    }
}

/// Turns scores (rows x labels, row-major) into the derivatives of the loss by them, which are the
/// probabilities, less 1 for the row's label. Returns the sum of the losses.
fn residuals(scores: &mut [f64], row_labels: &[u32], labels: usize) -> f64 {
    let mut loss = 0.0;
    for (scores, label) in scores.chunks_exact_mut(labels).zip(row_labels) {
        let label = *label as usize;
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let below = largest - scores[label];
        let mut sum = 0.0_f64;
        for score in scores.iter_mut() {
            *score = (*score - largest).exp();
            sum += *score;
        }
        scores.iter_mut().for_each(|score| *score /= sum);
        scores[label] -= 1.0;
        loss += below + sum.ln();
    }
    loss
}

/// Why a search stops short.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    #[error("the loss is no finite number")]
    NotFinite,
    #[error("the passes do not lead to an optimum")]
    TooManyPasses,
}

/// An objective as argmin asks for it: first the cost, then the gradient of the same parameters.
struct Problem<'a> {
    objective: &'a Objective<'a>,
    /// Counted here, since argmin's line search has no limit of its own.
    passes: Cell<usize>,
    last: RefCell<Evaluation>,
}

#[derive(Default)]
struct Evaluation {
    parameters: Vec<f64>,
    cost: f64,
    gradient: Vec<f64>,
}

impl Problem<'_> {
    fn evaluate<T>(&self, parameters: &[f64], answer: impl FnOnce(&Evaluation) -> T) -> T {
        let mut last = self.last.borrow_mut();
        if last.parameters != parameters {
            let (cost, gradient) = self.objective.evaluate(parameters);
            *last = Evaluation {
                parameters: parameters.to_vec(),
                cost,
                gradient,
            };
        }
        answer(&last)
    }
}

impl CostFunction for Problem<'_> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, parameters: &Vec<f64>) -> std::result::Result<f64, argmin::core::Error> {
        self.passes.set(self.passes.get() + 1);
        if self.passes.get() > MAX_PASSES {
            return Err(Stopped::TooManyPasses.into());
        }
        let cost = self.evaluate(parameters, |evaluation| evaluation.cost);
        if !cost.is_finite() {
            return Err(Stopped::NotFinite.into());
        }
        Ok(cost)
    }
}

impl Gradient for Problem<'_> {
    type Param = Vec<f64>;
    type Gradient = Vec<f64>;

    fn gradient(&self, parameters: &Vec<f64>) -> std::result::Result<Vec<f64>, argmin::core::Error> {
        Ok(self.evaluate(parameters, |evaluation| evaluation.gradient.clone()))
    }
}

/// The parameters of the least cost found, and whether the gradient vanishes there.
fn minimize(objective: &Objective<'_>, start: Vec<f64>) -> std::result::Result<(Vec<f64>, bool), argmin::core::Error> {
    type State = IterState<Vec<f64>, Vec<f64>, (), (), (), f64>;
    type Search = MoreThuenteLineSearch<Vec<f64>, Vec<f64>, f64>;

    let problem = Problem {
        objective,
        passes: Cell::new(0),
        last: RefCell::default(),
    };
    // The cost stops falling, digit for digit, before its gradient vanishes: only the latter counts.
    let solver: LBFGS<Search, Vec<f64>, Vec<f64>, f64> = LBFGS::new(Search::new(), MEMORY)
        .with_tolerance_grad(TOLERANCE)?
        .with_tolerance_cost(0.0)?;
    let mut state = Executor::new(problem, solver)
        .configure(|state: State| state.param(start))
        .ctrlc(false)
        .run()?
        .state;

    // A search that stopped short has no gradient any more, but the best that it came by.
    let gradient = state.get_gradient();
    let converged = gradient.is_some_and(|gradient| gradient.iter().map(|x| x * x).sum::<f64>().sqrt() < TOLERANCE);
    let parameters = if converged {
        state.take_param()
    } else {
        state.take_best_param()
    };
    Ok((parameters.ok_or(Stopped::NotFinite)?, converged))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::datatypes::DataType;

    use super::*;

    /// Labels around centres of their own, with features of very different sizes; deterministic.
    fn rows(count: usize, labels: usize, spread: f64) -> Rows {
        let noise = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1009) as f64 / 1009.0 - 0.5;
        let mut rows = Rows::try_new(&DataType::Float64).unwrap();
        for i in 0..count {
            let label = i % labels;
            let row = [
                label as f64 + spread * noise(i, 1),
                1e4 + 1e3 * (label as f64 - spread * noise(i, 2)),
                1e-3 * spread * noise(i, 3),
                7.0,
            ];
            rows.push("f", Vector::F64(&row), label as u32).unwrap();
        }
        rows
    }

    fn fitted(rows: &Rows, labels: usize, l2: f64) -> Fitted {
        fit(rows, &rows.label_counts(labels), l2).unwrap()
    }

    #[test]
    fn the_gradient_is_that_of_the_cost() {
        let rows = rows(300, 3, 2.0);
        let objective = Objective::try_new(&rows, &rows.label_counts(3), 0.7).unwrap();
        let parameters: Vec<f64> = (0..15).map(|i| f64::from(i).sin()).collect();
        let (_, gradient) = objective.evaluate(&parameters);
        for (i, derivative) in gradient.iter().enumerate() {
            let cost = |step: f64| {
                let mut parameters = parameters.clone();
                parameters[i] += step;
                objective.evaluate(&parameters).0
            };
            let difference = (cost(1e-5) - cost(-1e-5)) / 2e-5;
            assert!(
                (derivative - difference).abs() < 1e-8,
                "{i}: {derivative} is not {difference}"
            );
        }
    }

    #[test]
    fn scores_far_apart_have_their_probabilities() {
        let mut scores = [0.0, -1000.0, 1000.0, -1e4, -1e4 - 1.0, -1e5];
        let loss = residuals(&mut scores, &[1, 0], 3);
        let of_second = 1.0 / (1.0 + 1.0_f64.exp());
        assert!((loss - 2000.0 + (1.0 - of_second).ln()).abs() < 1e-12, "{loss}");
        let expected = [0.0, -1.0, 1.0, -of_second, of_second, 0.0];
        for (score, expected) in scores.iter().zip(expected) {
            assert!((score - expected).abs() < 1e-15, "{scores:?}");
        }
    }

    #[test]
    fn two_labels_have_the_optimum_of_binomial_regression() {
        let rows = rows(80, 2, 3.0);
        let l2 = 0.3;
        let found = fitted(&rows, 2, l2);
        assert!(found.converged);
        let (first, second) = found.coefficients.split_at(4);
        let weights: Vec<f64> = second.iter().zip(first).map(|(b, a)| b - a).collect();
        let intercept = found.intercepts[1] - found.intercepts[0];

        let mut gradient: Vec<f64> = weights.iter().map(|weight| l2 * weight).collect();
        let mut of_intercept = 0.0;
        let mut values = vec![];
        let blocks = rows.blocks();
        blocks[0].rows.extend_into(&mut values);
        for (row, label) in values.chunks_exact(4).zip(blocks[0].labels) {
            let score: f64 = row.iter().zip(&weights).map(|(x, weight)| x * weight).sum::<f64>() + intercept;
            let off = 1.0 / (1.0 + (-score).exp()) - f64::from(*label);
            of_intercept += off;
            // Around the offset of the second feature: it multiplies what is left of the intercept's.
            let centred = [row[0], row[1] - 1e4, row[2], row[3]];
            gradient.iter_mut().zip(centred).for_each(|(sum, x)| *sum += off * x);
        }
        assert!(of_intercept.abs() < 1e-4, "{of_intercept}");
        assert!(weights[0].abs() > 0.1 && gradient[0].abs() < 1e-4, "{gradient:?}");
        assert!(gradient[1].abs() < 1e-1 && gradient[2].abs() < 1e-4, "{gradient:?}");
    }

    #[test]
    fn labels_apart_without_penalty_still_end() {
        let rows = rows(90, 3, 0.1);
        let found = fitted(&rows, 3, 0.0);
        assert!(
            found
                .coefficients
                .iter()
                .chain(&found.intercepts)
                .all(|x| x.is_finite())
        );
        for block in rows.blocks() {
            let mut values = vec![];
            block.rows.extend_into(&mut values);
            let labels: Vec<usize> = block.labels.iter().map(|label| *label as usize).collect();
            let correct = super::super::correct(&found.coefficients, &found.intercepts, 4, &values, &labels);
            assert_eq!(correct, 90);
        }
    }

    #[test]
    fn a_constant_feature_has_no_effect() {
        let found = fitted(&rows(300, 3, 2.0), 3, 0.0);
        assert!(found.converged);
        assert!(found.coefficients.iter().skip(3).step_by(4).all(|x| *x == 0.0));
    }
}
