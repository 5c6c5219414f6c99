//! [`FetchExec`] as bytes, for the executors of a cluster.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::Schema;
use datafusion::common::{DataFusionError, internal_datafusion_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::protobuf;
use prost::Message;

use super::{Base, FetchExec, FetchSpec};
use crate::stores::{GivenOptions, store_with_options};

/// A column that is the object's content, not one of the listing.
const CONTENT: i64 = -1;

/// What a [`FetchExec`] does, as a message. The credentials of a table are part of it.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(crate) struct FetchWire {
    #[prost(string, tag = "1")]
    store: String,
    #[prost(string, repeated, tag = "2")]
    locations: Vec<String>,
    #[prost(message, optional, tag = "3")]
    schema: Option<protobuf::Schema>,
    #[prost(int64, repeated, tag = "4")]
    columns: Vec<i64>,
    #[prost(uint64, tag = "5")]
    listed: u64,
    #[prost(uint64, tag = "6")]
    pruned: u64,
    #[prost(uint64, tag = "7")]
    to_fetch: u64,
    #[prost(uint64, tag = "8")]
    bytes: u64,
    #[prost(uint64, optional, tag = "9")]
    limit: Option<u64>,
    #[prost(map = "string, string", tag = "10")]
    given: HashMap<String, String>,
}

/// Without the credentials.
impl fmt::Debug for FetchWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchWire")
            .field("locations", &self.locations)
            .finish_non_exhaustive()
    }
}

impl FetchExec {
    /// Does it read objects, not just their listing?
    pub(crate) fn reads_content(&self) -> bool {
        self.spec.reads_content()
    }

    /// The store that it reads.
    pub(crate) fn store_url(&self) -> &ObjectStoreUrl {
        self.spec.base.store()
    }

    /// The table's locations.
    pub(crate) fn locations(&self) -> &[String] {
        &self.spec.locations
    }

    /// The node as a message.
    ///
    /// # Errors
    /// Where the table's store is an object of this process.
    pub(crate) fn to_wire(&self) -> Result<FetchWire> {
        let spec = &self.spec;
        if self.store.is_some() && spec.given.0.is_empty() {
            return plan_err!(
                "the images at {} are read through a store that the program made itself, which executors do not have: \
                 give its credentials as OPTIONS, or to the executors' environment",
                spec.locations.join(" ")
            );
        }
        let column = |column: &Option<usize>| match column {
            Some(index) => i64::try_from(*index).map_err(|e| DataFusionError::External(Box::new(e))),
            None => Ok(CONTENT),
        };
        Ok(FetchWire {
            store: spec.base.store().as_str().to_owned(),
            locations: spec.locations.clone(),
            schema: Some(spec.schema.as_ref().try_into()?),
            columns: spec.columns.iter().map(column).collect::<Result<_>>()?,
            listed: spec.listed as u64,
            pruned: spec.pruned as u64,
            to_fetch: spec.to_fetch as u64,
            bytes: spec.bytes,
            limit: self.limit.map(|limit| limit as u64),
            given: spec.given.0.clone(),
        })
    }

    /// The node of a message, above its listing.
    ///
    /// # Errors
    /// Messages that none of ours writes.
    pub(crate) fn from_wire(wire: FetchWire, input: Arc<dyn ExecutionPlan>) -> Result<Self> {
        let FetchWire {
            store,
            locations,
            schema,
            columns,
            listed,
            pruned,
            to_fetch,
            bytes,
            limit,
            given,
        } = wire;
        let schema = schema.ok_or_else(|| internal_datafusion_err!("FetchExec came without a schema"))?;
        let schema = Arc::new(Schema::try_from(&schema)?);
        let columns: Vec<_> = columns.into_iter().map(|index| usize::try_from(index).ok()).collect();
        let width = input.schema().fields().len();
        if columns.len() != schema.fields().len() || columns.iter().flatten().any(|index| *index >= width) {
            return internal_err!("FetchExec came with columns that its listing does not have");
        }
        let base = Base::new(ObjectStoreUrl::parse(&store)?);
        let own = store_with_options(base.store().as_ref(), &given)?;
        let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let spec = FetchSpec {
            base,
            locations,
            schema,
            columns,
            listed: number(listed),
            pruned: number(pruned),
            to_fetch: number(to_fetch),
            bytes,
            given: GivenOptions(given),
        };
        Ok(Self::new(input, spec, own, limit.map(number)))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
    use arrow::datatypes::{DataType, Field};
    use datafusion::catalog::memory::{DataSourceExec, MemorySourceConfig};
    use datafusion::physical_plan::displayable;

    use super::*;

    fn listing() -> Arc<dyn ExecutionPlan> {
        let rows = RecordBatch::try_from_iter([
            (
                "path",
                Arc::new(StringArray::from(vec!["s3://bucket/a.jpg"])) as ArrayRef,
            ),
            ("split", Arc::new(StringArray::from(vec!["Training"]))),
            ("size", Arc::new(Int64Array::from(vec![1]))),
        ])
        .unwrap();
        let source = MemorySourceConfig::try_new(&[vec![rows.clone()]], rows.schema(), None).unwrap();
        DataSourceExec::from_data_source(source)
    }

    fn fetch(given: &[(&str, &str)]) -> FetchExec {
        let given: HashMap<_, _> = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let store = ObjectStoreUrl::parse("s3://bucket").unwrap();
        let own = store_with_options(store.as_ref(), &given).unwrap();
        let spec = FetchSpec {
            base: Base::new(store),
            locations: vec!["s3://bucket/".to_owned()],
            schema: Arc::new(Schema::new(vec![
                Field::new("content", DataType::Binary, true),
                Field::new("split", DataType::Utf8, false),
            ])),
            columns: vec![None, Some(1)],
            listed: 3,
            pruned: 2,
            to_fetch: 1,
            bytes: 1,
            given: GivenOptions(given),
        };
        FetchExec::new(listing(), spec, own, Some(7))
    }

    #[test]
    fn nothing_is_lost_on_the_way_and_nothing_secret_is_shown() {
        let sent = fetch(&[("aws.access_key_id", "key"), ("aws.secret_access_key", "s3cr3t")]);
        let bytes = sent.to_wire().unwrap().encode_to_vec();
        let came = FetchExec::from_wire(FetchWire::decode(bytes.as_slice()).unwrap(), listing()).unwrap();
        assert_eq!(came.to_wire().unwrap(), sent.to_wire().unwrap());
        assert!(came.store.is_some() && came.limit == Some(7) && came.reads_content());
        assert_eq!(came.schema(), sent.schema());
        let shown = format!("{came:?} {}", displayable(&came).indent(true));
        assert!(!shown.contains("s3cr3t"), "{shown}");
    }

    #[test]
    fn messages_that_do_not_fit_are_refused() {
        let sent = fetch(&[]).to_wire().unwrap();
        let broken = [
            FetchWire {
                schema: None,
                ..sent.clone()
            },
            FetchWire {
                columns: vec![CONTENT],
                ..sent.clone()
            },
            FetchWire {
                columns: vec![CONTENT, 3],
                ..sent.clone()
            },
            FetchWire {
                store: "nowhere".to_owned(),
                ..sent.clone()
            },
            FetchWire {
                given: HashMap::from([("aws.regoin".to_owned(), "x".to_owned())]),
                ..sent
            },
        ];
        for wire in broken {
            FetchExec::from_wire(wire, listing()).unwrap_err();
        }
        let mut own = fetch(&[]);
        own.store = Some(Arc::new(object_store::memory::InMemory::new()));
        let error = own.to_wire().unwrap_err().to_string();
        assert!(error.contains("OPTIONS"), "{error}");
    }
}
