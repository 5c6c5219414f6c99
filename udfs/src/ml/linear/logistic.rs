//! Multinomial logistic regression. All rows are held, since its optimum is found in many passes over
//! them: see [`multinomial`].

use std::collections::BTreeMap;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, FieldRef, UInt32Type};
use datafusion::common::{ScalarValue, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{Accumulator, AggregateUDFImpl, Documentation, Signature};
use datafusion_macros::user_doc;

use super::multinomial::{self, Fitted};
use super::rows::{BLOCK_ROWS, Rows};
use super::{
    LOGISTIC, LinearModel, check_label_count, check_labels, coerce_fit, correct, labelled_rows, model_type, no_model,
};
use crate::ml::arguments::{aggregate_constant, signature};
use crate::ml::fit::{if_large, refuse_distinct};
use crate::ml::labels::{Label, LabelColumn, LabelType, label_array};
use crate::ml::sliding::Sliding;
use crate::ml::state::{self, elements, list, list_type, total};
use crate::ml::vectors::{VectorColumn, element_type};

const NAME: &str = "logistic_fit";

/// As scikit-learn's `C=1.0`.
const DEFAULT_L2: f64 = 1.0;

/// `logistic_fit(v, label [, l2])`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Fits multinomial logistic regression: the coefficients under which the labels are most probable, \
                   less a penalty on their squares. Returns a linear model for `classify` and `classify_proba`, a \
                   struct {kind, count, labels, label_counts, coefficients, intercepts, regularization, \
                   training_accuracy, training_rows, converged}, in which regularization is l2, training_accuracy \
                   the share of all rows that the model classifies as they are labelled, and converged says whether \
                   the optimum was found in 1,000 passes. Holds all rows in memory. Features of very different \
                   sizes are penalized alike only after `standardize`. Rows without a vector or a label are \
                   ignored; of no rows the model is NULL.",
    syntax_example = "logistic_fit(vector, label [, l2])",
    sql_example = r#"```sql
SELECT model['labels'] AS labels, model['training_accuracy'] AS training_accuracy, model['converged'] AS converged
FROM (
    SELECT logistic_fit(v, label, l2 => 0.1) AS model
    FROM (VALUES ([1.0, 1.0], 'Kiwi'), ([1.0, 2.0], 'Kiwi'), ([2.0, 1.0], 'Kiwi'),
                 ([5.0, 5.0], 'Plum'), ([5.0, 6.0], 'Plum'), ([6.0, 5.0], 'Plum')) AS t(v, label)
);
```"#,
    argument(
        name = "vector",
        description = "A list of numbers; all of the same length, none NULL or NaN."
    ),
    argument(
        name = "label",
        description = "A string, a whole number or a boolean: at least two different ones, each of at least two \
                       vectors."
    ),
    argument(
        name = "l2",
        description = "The weight of the squared coefficients: a constant of at least 0, by default 1; the inverse of \
                       scikit-learn's C. More of it makes probabilities less extreme."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct LogisticFit {
    signature: Signature,
}

impl LogisticFit {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "label", "l2"]),
        }
    }
}

impl AggregateUDFImpl for LogisticFit {
    fn name(&self) -> &str {
        NAME
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let mut types = coerce_fit(NAME, arg_types)?;
        if let [_, _, l2] = types.as_mut_slice() {
            if !l2.is_numeric() && !l2.is_null() {
                return plan_err!("{NAME} takes l2 as a number, not {l2}");
            }
            *l2 = DataType::Float64;
        }
        Ok(types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        model_type(NAME, arg_types)
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(LogisticAccumulator::try_new(&args)?))
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        let empty = LogisticAccumulator::try_new(&args)?;
        Ok(Sliding::boxed(move || Box::new(empty.clone())))
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let (element, label_type) = input_types(args.input_fields)?;
        let fields = [
            ("labels", list_type(label_type.data_type())),
            ("rows", list_type(element.clone())),
            ("row_labels", list_type(DataType::UInt32)),
            ("ignored", DataType::UInt64),
        ];
        Ok(state::state_fields(&args, fields))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// The type of the vectors' elements and that of the labels of a call with these arguments.
fn input_types(arguments: &[FieldRef]) -> Result<(&DataType, LabelType)> {
    match arguments {
        [vector, label, ..] => Ok((
            element_type(vector.data_type())?,
            LabelType::of(NAME, label.data_type())?,
        )),
        _ => internal_err!("{NAME} got no vectors and labels"),
    }
}

fn check_l2(l2: Option<ScalarValue>) -> Result<f64> {
    match l2 {
        None => Ok(DEFAULT_L2),
        Some(ScalarValue::Float64(Some(l2))) if l2 >= 0.0 && l2.is_finite() => Ok(l2),
        Some(other) => plan_err!("{NAME} takes l2 as a finite number of at least 0, not {other}"),
    }
}

#[derive(Debug, Clone)]
struct LogisticAccumulator {
    label_type: LabelType,
    l2: f64,
    /// Each label's number in `rows`.
    labels: BTreeMap<Label, u32>,
    /// The bytes of the labels' text.
    text: usize,
    rows: Rows,
    /// Rows without a vector or a label.
    ignored: u64,
}

impl LogisticAccumulator {
    fn try_new(args: &AccumulatorArgs) -> Result<Self> {
        refuse_distinct(NAME, args)?;
        let (element, label_type) = input_types(args.expr_fields)?;
        Ok(Self {
            label_type,
            l2: check_l2(aggregate_constant(args, NAME, 2)?)?,
            labels: BTreeMap::new(),
            text: 0,
            rows: Rows::try_new(element)?,
            ignored: 0,
        })
    }

    /// The number of a label, a new one where it was not met before.
    fn number(&mut self, label: Label) -> Result<u32> {
        if let Some(number) = self.labels.get(&label) {
            return Ok(*number);
        }
        check_label_count(NAME, self.labels.len() + 1)?;
        if let Label::Text(text) = &label {
            self.text += text.len();
        }
        let number = self.labels.len() as u32;
        self.labels.insert(label, number);
        Ok(number)
    }

    /// Numbers the labels in their order.
    fn sort_labels(&mut self) {
        let mut sorted = vec![0; self.labels.len()];
        for (place, number) in self.labels.values_mut().enumerate() {
            sorted[*number as usize] = place as u32;
            *number = place as u32;
        }
        self.rows.renumber(&sorted);
    }

    /// How many rows have the label with the highest score.
    fn correct(&self, fitted: &Fitted) -> u64 {
        let parts = self.rows.map_chunks(|blocks| {
            let mut values = vec![];
            let mut sum = 0;
            for block in blocks {
                values.clear();
                block.rows.extend_into(&mut values);
                let labels: Vec<usize> = block.labels.iter().map(|label| *label as usize).collect();
                let features = self.rows.features();
                sum += correct(&fitted.coefficients, &fitted.intercepts, features, &values, &labels);
            }
            sum
        });
        parts.into_iter().sum()
    }
}

impl Accumulator for LogisticAccumulator {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.ignored += labelled_rows(NAME, values, |vector, label| {
            let label = self.number(label)?;
            self.rows.push(NAME, vector, label)
        })?;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        self.sort_labels();
        let labels = std::mem::take(&mut self.labels);
        self.text = 0;
        let (rows, row_labels) = self.rows.take();
        Ok(vec![
            list(label_array(self.label_type, labels.keys().map(Some))),
            list(rows),
            list(row_labels),
            ScalarValue::UInt64(Some(std::mem::take(&mut self.ignored))),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [labels, rows, row_labels, ignored] = states else {
            return internal_err!("expected 4 columns of state, found {}", states.len());
        };
        self.ignored += total(ignored)?;
        let vectors = VectorColumn::try_new(NAME, rows.as_ref())?;
        for i in 0..vectors.len() {
            let Some(rows) = vectors.get(i)? else { continue };

            let labels = elements(labels, i)?;
            let column = LabelColumn::try_new(labels.as_ref())?;
            let labels = (0..labels.len()).filter_map(|at| column.get(at));
            let numbers = labels.map(|label| self.number(label)).collect::<Result<Vec<_>>>()?;

            let row_labels = elements(row_labels, i)?;
            let Some(row_labels) = row_labels.as_primitive_opt::<UInt32Type>() else {
                return internal_err!("expected numbers of labels, found {}", row_labels.data_type());
            };
            let row_labels = row_labels.values().iter();
            let row_labels: Option<Vec<u32>> = row_labels.map(|at| numbers.get(*at as usize).copied()).collect();
            let Some(row_labels) = row_labels else {
                return internal_err!("{NAME} got rows of labels that are not in its state");
            };
            self.rows.append(NAME, rows, &row_labels)?;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        if self.rows.len() == 0 {
            return no_model(NAME, self.label_type, self.ignored);
        }
        self.sort_labels();
        let label_counts = self.rows.label_counts(self.labels.len());
        check_labels(NAME, self.labels.keys().zip(label_counts.iter().copied()))?;

        let fitted = multinomial::fit(&self.rows, &label_counts, self.l2)?;
        let training_accuracy = self.correct(&fitted) as f64 / self.rows.len() as f64;
        LinearModel {
            kind: LOGISTIC,
            label_type: self.label_type,
            labels: self.labels.keys().collect(),
            label_counts,
            coefficients: fitted.coefficients,
            intercepts: fitted.intercepts,
            regularization: self.l2,
            training_accuracy,
            training_rows: self.rows.len() as u64,
            converged: fitted.converged,
        }
        .build()
    }

    fn size(&self) -> usize {
        // The nodes of the map are at least half full.
        let labels = 2 * self.labels.len() * size_of::<(Label, u32)>() + self.text;
        // A pool is asked for what the model will take as well: when it is made, it is too late to ask.
        let workspace = multinomial::workspace(&self.rows, self.labels.len());
        let workspace = if self.rows.len() > BLOCK_ROWS {
            workspace
        } else {
            if_large(workspace)
        };
        size_of_val(self) + labels + self.rows.allocated() + workspace
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ListArray, StringArray};
    use arrow::datatypes::Float32Type;

    use super::*;

    fn accumulator() -> LogisticAccumulator {
        LogisticAccumulator {
            label_type: LabelType::Text,
            l2: 1.0,
            labels: BTreeMap::new(),
            text: 0,
            rows: Rows::try_new(&DataType::Float32).unwrap(),
            ignored: 0,
        }
    }

    /// Rows `i` of labels that overlap; deterministic.
    fn batch(rows: impl Iterator<Item = usize> + Clone) -> Vec<ArrayRef> {
        let labels = ["Plum", "Kiwi", "Äpfel"];
        let noise = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1009) as f32 / 500.0;
        let vector = |i: usize| Some((0..4).map(move |j| Some((i % 3 * j) as f32 / 2.0 + noise(i, j))));
        vec![
            Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
                rows.clone().map(vector),
            )),
            Arc::new(rows.map(|i| Some(labels[i % 3])).collect::<StringArray>()),
        ]
    }

    fn fitted(mut accumulator: LogisticAccumulator) -> Fitted {
        accumulator.sort_labels();
        let labels: Vec<_> = accumulator.labels.iter().collect();
        assert_eq!(labels[0], (&Label::Text("Kiwi".to_owned()), &0));
        assert_eq!(accumulator.rows.label_counts(3), [300; 3]);
        multinomial::fit(&accumulator.rows, &[300; 3], accumulator.l2).unwrap()
    }

    #[test]
    fn partitions_in_any_order_give_what_all_rows_give() {
        let mut whole = accumulator();
        whole.update_batch(&batch(0..900)).unwrap();
        let expected = fitted(whole.clone());
        assert!(expected.converged);
        assert_eq!(fitted(whole).coefficients, expected.coefficients);

        for partitions in [2, 7, 450] {
            let mut merged = accumulator();
            for partition in (0..partitions).rev() {
                let mut part = accumulator();
                part.update_batch(&batch((partition..900).step_by(partitions))).unwrap();
                let state = part.state().unwrap();
                let state: Vec<_> = state.iter().map(|column| column.to_array().unwrap()).collect();
                merged.merge_batch(&state).unwrap();
            }
            let found = fitted(merged);
            let numbers = found.coefficients.iter().chain(&found.intercepts);
            let expected = expected.coefficients.iter().chain(&expected.intercepts);
            for (found, expected) in numbers.zip(expected) {
                assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
            }
        }
    }

    #[test]
    fn later_rows_may_follow_a_result() {
        let mut growing = accumulator();
        growing.update_batch(&batch(0..60)).unwrap();
        growing.evaluate().unwrap();
        growing.update_batch(&batch(60..900)).unwrap();
        let mut whole = accumulator();
        whole.update_batch(&batch(0..900)).unwrap();
        assert_eq!(fitted(growing).coefficients, fitted(whole).coefficients);
    }

    #[test]
    fn l2_is_a_finite_number_of_at_least_0() {
        assert_eq!(check_l2(None).unwrap(), 1.0);
        assert_eq!(check_l2(Some(ScalarValue::Float64(Some(0.0)))).unwrap(), 0.0);
        for bad in [None, Some(f64::NAN), Some(f64::INFINITY), Some(-1.0)] {
            let error = check_l2(Some(ScalarValue::Float64(bad))).unwrap_err().to_string();
            assert!(error.contains("logistic_fit takes l2 as a finite number"), "{error}");
        }
    }
}
