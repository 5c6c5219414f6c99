//! `classify(v, model)` and `classify_proba(v, model [, top_k])`

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Float64Builder, ListArray, StructArray, UInt64Array};
use arrow::compute::take;
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::common::{ScalarValue, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature};
use datafusion_macros::user_doc;
use faer::MatRef;

use super::{LDA, LOGISTIC, best, kind};
use crate::ml::arguments::{scalar_constant, signature};
use crate::ml::labels::LabelType;
use crate::ml::model::Models;
use crate::ml::projection::{Projection, project};
use crate::ml::vectors::{coerce_vector, list_of, offsets};

/// `classify(v, model)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "The label that a vector most probably has, with a model of `lda_fit` or `logistic_fit`. It has the \
                   type of the model's labels: Utf8, Int64 or Boolean.",
    syntax_example = "classify(vector, model)",
    sql_example = r#"```sql
SELECT classify([4.0, 4.0], (
    SELECT lda_fit(v, label) FROM (VALUES ([1.0, 1.0], 'Kiwi'), ([1.0, 2.0], 'Kiwi'), ([2.0, 1.0], 'Kiwi'),
                                          ([5.0, 5.0], 'Plum'), ([5.0, 6.0], 'Plum'), ([6.0, 5.0], 'Plum')
    ) AS t(v, label)
)) AS label;
```"#,
    argument(
        name = "vector",
        description = "A list of numbers, as long as those of the fit. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `lda_fit` or `logistic_fit` returned.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct Classify {
    signature: Signature,
}

impl Classify {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "model"]),
        }
    }
}

impl ScalarUDFImpl for Classify {
    fn name(&self) -> &str {
        "classify"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        match arg_types {
            [_, _] => coerce(self.name(), arg_types),
            _ => plan_err!("classify takes a vector and a model, not {} arguments", arg_types.len()),
        }
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        Ok(label_type(arg_types)?.data_type())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let (vectors, models) = read(self.name(), &args)?;
        let labels = models.list("labels")?;
        let mut indexes = Vec::with_capacity(args.number_rows);
        project(
            vectors.as_ref(),
            &models,
            |row| scores(&models, row),
            |row, scores| {
                indexes.push(scores.map(|scores| label_index(labels, row, best(scores))));
                Ok(())
            },
        )?;
        Ok(ColumnarValue::Array(take(
            labels.values(),
            &UInt64Array::from(indexes),
            None,
        )?))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `classify_proba(v, model [, top_k])`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "The labels that a vector may have, from the most probable down, with a model of `lda_fit` or \
                   `logistic_fit`: a list of {label, probability}. The probabilities of all labels together are 1.",
    syntax_example = "classify_proba(vector, model [, top_k])",
    sql_example = r#"```sql
SELECT best['label'] AS label, round(best['probability'], 3) AS probability FROM (
    SELECT classify_proba([3.0, 4.0], (
        SELECT lda_fit(v, label) FROM (VALUES ([1.0, 1.0], 'Kiwi'), ([1.0, 2.0], 'Kiwi'), ([2.0, 1.0], 'Kiwi'),
                                              ([5.0, 5.0], 'Plum'), ([5.0, 6.0], 'Plum'), ([6.0, 5.0], 'Plum')
        ) AS t(v, label)
    ), top_k => 1)[1] AS best
);
```"#,
    argument(
        name = "vector",
        description = "A list of numbers, as long as those of the fit. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `lda_fit` or `logistic_fit` returned."),
    argument(
        name = "top_k",
        description = "How many labels, a constant of at least 1; all, if it is not given."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct ClassifyProba {
    signature: Signature,
}

impl ClassifyProba {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "model", "top_k"]),
        }
    }
}

impl ScalarUDFImpl for ClassifyProba {
    fn name(&self) -> &str {
        "classify_proba"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        match arg_types {
            [_, _] => coerce(self.name(), arg_types),
            [_, _, top_k] if top_k.is_integer() => {
                let mut types = coerce(self.name(), arg_types)?;
                types.push(DataType::Int64);
                Ok(types)
            }
            [_, _, top_k] => plan_err!("classify_proba takes top_k as a whole number, not {top_k}"),
            _ => plan_err!(
                "classify_proba takes a vector, a model and top_k, not {} arguments",
                arg_types.len()
            ),
        }
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        Ok(list_of(DataType::Struct(probability_fields(label_type(arg_types)?))))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let top_k = match scalar_constant(&args.args, self.name(), 2)? {
            None => usize::MAX,
            Some(ScalarValue::Int64(Some(k))) if *k >= 1 => usize::try_from(*k).unwrap_or(usize::MAX),
            Some(other) => return plan_err!("classify_proba: top_k is at least 1, not {other}"),
        };
        let (vectors, models) = read(self.name(), &args)?;
        let labels = models.list("labels")?;
        let mut indexes = vec![];
        let mut probabilities = Float64Builder::new();
        let mut lengths = Vec::with_capacity(args.number_rows);
        let mut valid = Vec::with_capacity(args.number_rows);
        project(
            vectors.as_ref(),
            &models,
            |row| scores(&models, row),
            |row, scores| {
                valid.push(scores.is_some());
                let ranked = scores.map_or_else(Vec::new, |scores| ranked(scores, top_k));
                lengths.push(ranked.len());
                for (label, probability) in ranked {
                    indexes.push(label_index(labels, row, label));
                    probabilities.append_value(probability);
                }
                Ok(())
            },
        )?;
        let DataType::List(field) = args.return_type() else {
            return internal_err!("classify_proba returns a list");
        };
        let DataType::Struct(fields) = field.data_type() else {
            return internal_err!("classify_proba returns a list of structs");
        };
        let labels = take(labels.values(), &UInt64Array::from(indexes), None)?;
        let pairs = StructArray::try_new(fields.clone(), vec![labels, Arc::new(probabilities.finish())], None)?;
        Ok(ColumnarValue::Array(Arc::new(ListArray::try_new(
            Arc::clone(field),
            offsets(lengths)?,
            Arc::new(pairs),
            Some(valid.into()),
        )?)))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

fn probability_fields(label_type: LabelType) -> Fields {
    Fields::from(vec![
        Field::new("label", label_type.data_type(), true),
        Field::new("probability", DataType::Float64, true),
    ])
}

/// The types of a vector and a model, whatever labels it has.
fn coerce(function: &str, arg_types: &[DataType]) -> Result<Vec<DataType>> {
    let [vector, model, ..] = arg_types else {
        return plan_err!("{function} takes a vector and a model");
    };
    Ok(vec![
        coerce_vector(function, vector)?,
        kind(label_type(arg_types)?).coerce(function, model)?,
    ])
}

/// The type of the labels of the model argument; that of strings where it does not say.
fn label_type(arg_types: &[DataType]) -> Result<LabelType> {
    let labels = match arg_types.get(1) {
        Some(DataType::Struct(fields)) => fields.find("labels").map(|(_, field)| field.data_type()),
        _ => None,
    };
    match labels {
        Some(
            DataType::List(field)
            | DataType::LargeList(field)
            | DataType::ListView(field)
            | DataType::LargeListView(field)
            | DataType::FixedSizeList(field, _),
        ) => LabelType::of("a classifier", field.data_type()),
        _ => Ok(LabelType::Text),
    }
}

/// The vectors and the models of a call.
fn read<'a>(function: &'a str, args: &ScalarFunctionArgs) -> Result<(ArrayRef, Models<'a>)> {
    let [vectors, model, ..] = args.args.as_slice() else {
        return internal_err!("{function} got no vector and model");
    };
    let labels = label_type(&[DataType::Null, model.data_type()])?;
    Ok((
        vectors.to_array(args.number_rows)?,
        kind(labels).read(function, model, args.number_rows)?,
    ))
}

/// The projection onto the scores of the labels.
fn scores<'m>(models: &'m Models<'_>, row: usize) -> Result<Projection<'m>> {
    models.word(row, "kind", &[LDA, LOGISTIC])?;
    let intercepts = models.vector(row, "intercepts")?;
    let features = models.width(row, "coefficients")?;
    let coefficients = models.matrix(row, "coefficients", features)?;
    let labels = models.list("labels")?;
    let labels = (labels.is_valid(row)).then(|| labels.value(row));
    if labels.is_none_or(|labels| labels.len() != intercepts.len() || labels.null_count() > 0) {
        return Err(models.broken("labels"));
    }
    if coefficients.len() != intercepts.len() * features {
        return Err(models.broken("coefficients"));
    }
    Ok(Projection {
        before: None,
        matrix: MatRef::from_row_major_slice(coefficients, intercepts.len(), features).transpose(),
        after: Some(intercepts),
    })
}

/// Where label `label` of the model in `row` is in the values of all labels.
fn label_index(labels: &ListArray, row: usize, label: usize) -> u64 {
    labels.value_offsets()[row] as u64 + label as u64
}

/// The `top_k` labels of the highest scores, with their probabilities: the softmax of all scores.
fn ranked(scores: &[f64], top_k: usize) -> Vec<(usize, f64)> {
    let highest = scores[best(scores)];
    let weights = scores.iter().map(|score| (score - highest).exp());
    let sum: f64 = weights.clone().sum();
    let mut ranked: Vec<_> = weights.map(|weight| weight / sum).enumerate().collect();
    // Stable: equals stay in the order of the labels. By score, of which small ones have no probability left.
    ranked.sort_by(|(a, _), (b, _)| scores[*b].total_cmp(&scores[*a]));
    ranked.truncate(top_k);
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_scores_have_probabilities() {
        assert_eq!(ranked(&[-1e6, 1e6, 1e6 - 800.0], 5), [(1, 1.0), (2, 0.0), (0, 0.0)]);
        assert_eq!(ranked(&[0.0, 0.0], 1), [(0, 0.5)]);
    }
}
