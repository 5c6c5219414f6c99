//! Plans as bytes, for all roles.
//!
//! Ballista's codec writes what Ballista adds to a plan. Ours writes our nodes and the version of our
//! functions, and hands all else on. (Ballista's `ComposedPhysicalExtensionCodec` cannot put the two together:
//! the first codec that says nothing of a function is taken for the one that knows it.) The scheduler reads
//! and writes plans again for each task, so nothing may be lost in between.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};

use arrow::datatypes::DataType;
use ballista_core::registry::BallistaFunctionRegistry;
use ballista_core::serde::BallistaPhysicalExtensionCodec;
use bytes::BufMut;
use datafusion::catalog::memory::DataSourceExec;
use datafusion::common::tree_node::TreeNode;
use datafusion::common::{exec_err, internal_datafusion_err, internal_err, plan_datafusion_err, plan_err};
use datafusion::config::ConfigOptions;
use datafusion::datasource::physical_plan::FileScanConfig;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::TaskContext;
use datafusion::functions::all_default_functions;
use datafusion::functions_nested::all_default_nested_functions;
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::physical_plan::{AsExecutionPlan, PhysicalExtensionCodec, PhysicalProtoConverterExtension};
use datafusion_proto::protobuf::PhysicalPlanNode;
use prost::Message;
use url::Url;

use super::VERSION;
use super::fence::{Fence, FenceExec};
use super::grant::{Grant, GrantExec};
use crate::stores::GivenOptions;
use crate::table::{FetchExec, FetchWire};

/// What our messages start with; no message of protobuf does.
const MAGIC: &[u8] = b"\xffpomona\xff";

/// What stands before the time zone of a function of DataFusion.
const ZONE: &[u8] = b"\xffzone\xff";

type Scalars = HashMap<String, Arc<ScalarUDF>>;
type Aggregates = HashMap<String, Arc<AggregateUDF>>;

static SCALARS: LazyLock<Scalars> = LazyLock::new(|| {
    let functions = pomona_udfs::scalar_functions().into_iter();
    functions
        .map(|function| (function.name().to_owned(), function))
        .collect()
});

static AGGREGATES: LazyLock<Aggregates> = LazyLock::new(|| {
    let functions = pomona_udfs::aggregate_functions().into_iter();
    functions
        .map(|function| (function.name().to_owned(), function))
        .collect()
});

/// The functions that executors and the scheduler know.
pub(crate) fn functions() -> BallistaFunctionRegistry {
    let mut known = BallistaFunctionRegistry::default();
    let nested = all_default_nested_functions().into_iter();
    known
        .scalar_functions
        .extend(nested.map(|function| (function.name().to_owned(), function)));
    for function in SCALARS.values() {
        let names = function.aliases().iter().map(String::as_str).chain([function.name()]);
        let named = names.map(|name| (name.to_owned(), Arc::clone(function)));
        known.scalar_functions.extend(named);
    }
    for function in AGGREGATES.values() {
        let names = function.aliases().iter().map(String::as_str).chain([function.name()]);
        let named = names.map(|name| (name.to_owned(), Arc::clone(function)));
        known.aggregate_functions.extend(named);
    }
    known
}

/// The codec of a process, which errors call `node`: `executor 'a'`.
pub(crate) fn physical_codec(node: impl Into<String>) -> Arc<dyn PhysicalExtensionCodec> {
    Arc::new(PomonaPhysicalCodec {
        node: node.into(),
        ballista: BallistaPhysicalExtensionCodec::default(),
    })
}

#[derive(Debug)]
struct PomonaPhysicalCodec {
    node: String,
    ballista: BallistaPhysicalExtensionCodec,
}

/// One of our nodes.
#[derive(Clone, PartialEq, Message)]
struct NodeWire {
    /// Of the process that planned the query.
    #[prost(string, tag = "1")]
    version: String,
    #[prost(oneof = "Node", tags = "2, 3, 4")]
    node: Option<Node>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Node {
    #[prost(message, tag = "2")]
    Fetch(FetchWire),
    #[prost(message, tag = "3")]
    Grant(GrantWire),
    #[prost(message, tag = "4")]
    Fence(FenceWire),
}

#[derive(Clone, PartialEq, Message)]
struct FenceWire {
    #[prost(bool, tag = "1")]
    whole: bool,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct GrantWire {
    #[prost(string, tag = "1")]
    store: String,
    #[prost(map = "string, string", tag = "2")]
    given: HashMap<String, String>,
}

/// Without the credentials.
impl fmt::Debug for GrantWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantWire").finish_non_exhaustive()
    }
}

impl PomonaPhysicalCodec {
    fn check(&self, planned_by: &str) -> Result<()> {
        if planned_by == VERSION {
            return Ok(());
        }
        exec_err!(
            "{} runs Pomona {VERSION}, the query was planned by {planned_by}: run the same version everywhere",
            self.node
        )
    }

    /// One of `ours`, with the version that wrote it. A function comes without one where it is none of ours,
    /// and here where the registry has none of its name.
    fn function<F>(&self, ours: &HashMap<String, Arc<F>>, name: &str, planned_by: &[u8]) -> Result<Arc<F>> {
        if !planned_by.is_empty() {
            self.check(&String::from_utf8_lossy(planned_by))?;
            if let Some(function) = ours.get(name) {
                return Ok(Arc::clone(function));
            }
        }
        plan_err!(
            "{} has no function {name}, which the client has of its own: run the query without --cluster, or give the \
             function to the scheduler and the executors",
            self.node
        )
    }

    fn read(
        &self,
        message: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        ctx: &TaskContext,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let unreadable = || internal_datafusion_err!("{} cannot read a node of the plan", self.node);
        let NodeWire { version, node } = NodeWire::decode(message).map_err(|_| unreadable())?;
        self.check(&version)?;
        let (Some(node), [input]) = (node, inputs) else {
            return Err(unreadable());
        };
        let input = Arc::clone(input);
        Ok(match node {
            Node::Fetch(wire) => Arc::new(FetchExec::from_wire(wire, input)?),
            Node::Fence(FenceWire { whole }) => Arc::new(FenceExec::new(input, Fence { whole })),
            Node::Grant(GrantWire { store, given }) => {
                let store = Url::parse(&store).map_err(|_| unreadable())?;
                let given = GivenOptions(given);
                let grant = Grant { store, given };
                grant.register(&ctx.runtime_env())?;
                // A scan of Parquet files takes its store when it is read, and inputs are read first. (A
                // listing takes none, and may be of a million rows.)
                let is_scan = |node: &Arc<dyn ExecutionPlan>| {
                    let source = node.downcast_ref::<DataSourceExec>().map(DataSourceExec::data_source);
                    Ok(source.is_some_and(|source| source.is::<FileScanConfig>()))
                };
                let input = match input.exists(is_scan)? {
                    true => PhysicalPlanNode::try_from_physical_plan(input, self)?.try_into_physical_plan(ctx, self)?,
                    false => input,
                };
                Arc::new(GrantExec::new(input, grant))
            }
        })
    }
}

/// The time zone that a function of DataFusion has from the session's settings.
fn time_zone(function: &ScalarUDF) -> Option<Arc<str>> {
    if !function.name().starts_with("to_timestamp") {
        return None;
    }
    match function.return_type(&[DataType::Utf8]) {
        Ok(DataType::Timestamp(_, zone)) => zone,
        _ => None,
    }
}

/// The function of DataFusion in a session of this time zone.
fn in_time_zone(name: &str, zone: &str) -> Result<Arc<ScalarUDF>> {
    let mut settings = ConfigOptions::new();
    settings.execution.time_zone = Some(zone.to_owned());
    let function = all_default_functions()
        .into_iter()
        .find(|function| function.name() == name);
    let zoned = function.and_then(|function| function.inner().with_updated_config(&settings));
    match zoned {
        Some(function) => Ok(Arc::new(function)),
        None => internal_err!("{name} has no time zone"),
    }
}

fn wire(node: &dyn ExecutionPlan) -> Result<Option<Node>> {
    if let Some(fetch) = node.downcast_ref::<FetchExec>() {
        return Ok(Some(Node::Fetch(fetch.to_wire()?)));
    }
    if let Some(fence) = node.downcast_ref::<FenceExec>() {
        let whole = fence.purpose().whole;
        return Ok(Some(Node::Fence(FenceWire { whole })));
    }
    let grant = node.downcast_ref::<GrantExec>().map(GrantExec::purpose);
    Ok(grant.map(|Grant { store, given }| {
        Node::Grant(GrantWire {
            store: store.to_string(),
            given: given.0.clone(),
        })
    }))
}

impl PhysicalExtensionCodec for PomonaPhysicalCodec {
    fn try_decode(
        &self,
        buf: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        ctx: &TaskContext,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        match buf.strip_prefix(MAGIC) {
            Some(message) => self.read(message, inputs, ctx),
            None => self.ballista.try_decode(buf, inputs, ctx, converter),
        }
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        buf: &mut Vec<u8>,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<()> {
        let name = node.name().to_owned();
        match wire(node.as_ref())? {
            Some(node) => {
                let version = VERSION.to_owned();
                let message = NodeWire {
                    version,
                    node: Some(node),
                };
                buf.extend_from_slice(MAGIC);
                buf.extend(message.encode_to_vec());
                Ok(())
            }
            None => self
                .ballista
                .try_encode(node, buf, converter)
                .map_err(|_| plan_datafusion_err!("executors do not know {name}, a node of the plan")),
        }
    }

    fn try_decode_udf(&self, name: &str, buf: &[u8]) -> Result<Arc<ScalarUDF>> {
        if let Some(zone) = buf.strip_prefix(ZONE) {
            return in_time_zone(name, &String::from_utf8_lossy(zone));
        }
        self.function(&SCALARS, name, buf)
    }

    fn try_encode_udf(&self, node: &ScalarUDF, buf: &mut Vec<u8>) -> Result<()> {
        if let Some(zone) = time_zone(node) {
            buf.extend_from_slice(ZONE);
            buf.extend_from_slice(zone.as_bytes());
        }
        if SCALARS.contains_key(node.name()) {
            buf.extend_from_slice(VERSION.as_bytes());
        }
        Ok(())
    }

    fn try_decode_udaf(&self, name: &str, buf: &[u8]) -> Result<Arc<AggregateUDF>> {
        self.function(&AGGREGATES, name, buf)
    }

    fn try_encode_udaf(&self, node: &AggregateUDF, buf: &mut Vec<u8>) -> Result<()> {
        if AGGREGATES.contains_key(node.name()) {
            buf.extend_from_slice(VERSION.as_bytes());
        }
        Ok(())
    }
}

/// A physical plan as an executor reads it: what is wrong with it names the executor.
#[derive(Debug, Clone)]
pub(crate) struct TaskPlan(PhysicalPlanNode);

impl AsExecutionPlan for TaskPlan {
    fn try_decode(buf: &[u8]) -> Result<Self> {
        PhysicalPlanNode::try_decode(buf).map(Self)
    }

    fn try_encode<B>(&self, buf: &mut B) -> Result<()>
    where
        B: BufMut,
    {
        self.0.try_encode(buf)
    }

    fn try_into_physical_plan(
        &self,
        ctx: &TaskContext,
        codec: &dyn PhysicalExtensionCodec,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let plan = self.0.try_into_physical_plan(ctx, codec);
        let codec: &dyn Any = codec;
        plan.map_err(|error| match codec.downcast_ref::<PomonaPhysicalCodec>() {
            Some(codec) => DataFusionError::Execution(format!("{}: {}", codec.node, error.strip_backtrace())),
            None => error,
        })
    }

    fn try_from_physical_plan(plan: Arc<dyn ExecutionPlan>, codec: &dyn PhysicalExtensionCodec) -> Result<Self> {
        PhysicalPlanNode::try_from_physical_plan(plan, codec).map(Self)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{Array, ArrayRef, FixedSizeListArray, Float64Array, RecordBatch, StructArray};
    use arrow::datatypes::Field;
    use datafusion::catalog::memory::MemorySourceConfig;
    use datafusion::logical_expr::{ident, lit};
    use datafusion::physical_expr::ScalarFunctionExpr;
    use datafusion::physical_expr::expressions::{Literal, col};
    use datafusion::physical_plan::projection::ProjectionExec;
    use datafusion::physical_plan::{collect, displayable};
    use datafusion::prelude::SessionContext;
    use datafusion::scalar::ScalarValue;
    use datafusion_proto::physical_plan::DefaultPhysicalProtoConverter;

    use super::*;

    fn rows() -> Arc<dyn ExecutionPlan> {
        let vectors = vectors();
        let batch = RecordBatch::try_from_iter([("v", Arc::new(vectors) as ArrayRef)]).unwrap();
        let source = MemorySourceConfig::try_new(&[vec![batch.clone()]], batch.schema(), None).unwrap();
        DataSourceExec::from_data_source(source)
    }

    fn vectors() -> FixedSizeListArray {
        let field = Arc::new(Field::new_list_field(DataType::Float64, true));
        FixedSizeListArray::new(field, 3, Arc::new(Float64Array::from(vec![1.0, -0.0, 1e-300])), None)
    }

    fn grant() -> Arc<dyn ExecutionPlan> {
        let given = HashMap::from([
            ("aws.access_key_id".to_owned(), "key".to_owned()),
            ("aws.secret_access_key".to_owned(), "s3cr3t".to_owned()),
        ]);
        let store = Url::parse("s3://bucket").unwrap();
        let given = GivenOptions(given);
        Arc::new(GrantExec::new(rows(), Grant { store, given }))
    }

    fn there_and_back(plan: &Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
        let codec = physical_codec("the test");
        let sent = PhysicalPlanNode::try_from_physical_plan(Arc::clone(plan), codec.as_ref()).unwrap();
        let context = SessionContext::new().task_ctx();
        let read = TaskPlan::try_decode(&sent.encode_to_vec()).unwrap();
        read.try_into_physical_plan(&context, codec.as_ref()).unwrap()
    }

    #[test]
    fn a_grant_arrives_and_is_not_shown() {
        let plan = grant();
        let came = there_and_back(&plan);
        let grants = [&plan, &came].map(|plan| plan.downcast_ref::<GrantExec>().unwrap().purpose().clone());
        assert_eq!(grants[0], grants[1]);
        let shown = format!("{came:?} {}", displayable(came.as_ref()).indent(true));
        assert!(shown.contains("s3://bucket") && !shown.contains("s3cr3t"), "{shown}");
    }

    #[test]
    fn functions_and_models_arrive() {
        let config = Arc::new(ConfigOptions::new());
        let vector = col("v", &rows().schema()).unwrap();
        let model = StructArray::from(vec![(
            Arc::new(Field::new("mean", vectors().data_type().clone(), true)),
            Arc::new(vectors()) as ArrayRef,
        )]);
        let model = ScalarValue::Struct(Arc::new(model));
        let standardize = SCALARS.get("standardize").unwrap();
        let returns = Arc::new(Field::new("x", rows().schema().field(0).data_type().clone(), true));
        let args = vec![vector, Arc::new(Literal::new(model.clone())) as _];
        let call = ScalarFunctionExpr::new(standardize.name(), Arc::clone(standardize), args, returns, config);
        let plan: Arc<dyn ExecutionPlan> =
            Arc::new(ProjectionExec::try_new([(Arc::new(call) as _, "x".to_owned())], rows()).unwrap());
        let came = there_and_back(&plan);
        let shown = |plan: &Arc<dyn ExecutionPlan>| displayable(plan.as_ref()).indent(true).to_string();
        assert_eq!(shown(&came), shown(&plan));
        let call = &came.downcast_ref::<ProjectionExec>().unwrap().expr()[0].expr;
        let args = call.downcast_ref::<ScalarFunctionExpr>().unwrap().args();
        assert_eq!(args[1].downcast_ref::<Literal>().unwrap().value(), &model);
    }

    #[tokio::test]
    async fn what_arrives_computes_the_same() {
        async fn here_and_there(context: &SessionContext, plan: Arc<dyn ExecutionPlan>) -> Vec<Vec<ArrayRef>> {
            let came = there_and_back(&plan);
            let here = collect(plan, context.task_ctx()).await.unwrap();
            let there = collect(came, context.task_ctx()).await.unwrap();
            let columns = |batches: Vec<RecordBatch>| batches.iter().flat_map(|b| b.columns().to_vec()).collect();
            vec![columns(here), columns(there)]
        }

        let mut context = SessionContext::new();
        pomona_udfs::register_all(&mut context).unwrap();
        let vectors = "(VALUES ([1.0, 10.0]), ([2.0, -5e-300]), ([3.0, 0.1])) AS t(v)";
        let fit = format!("SELECT standardize_fit(v) FROM {vectors}");
        let plan = context.sql(&fit).await.unwrap().create_physical_plan().await.unwrap();
        let models = here_and_there(&context, plan).await;
        assert_eq!((models[0].len(), &models[0]), (1, &models[1]));

        let model = ScalarValue::try_from_array(&models[0][0], 0).unwrap();
        let call = SCALARS.get("standardize").unwrap().call(vec![ident("v"), lit(model)]);
        let table = context.sql(&format!("SELECT v FROM {vectors}")).await.unwrap();
        let plan = table.select([call]).unwrap().create_physical_plan().await.unwrap();
        let rows = here_and_there(&context, plan).await;
        assert_eq!((rows[0].is_empty(), &rows[0]), (false, &rows[1]));
    }

    #[test]
    fn another_version_and_broken_messages_are_refused() {
        let codec = PomonaPhysicalCodec {
            node: "executor 'a'".to_owned(),
            ballista: BallistaPhysicalExtensionCodec::default(),
        };
        let function = SCALARS.keys().next().unwrap();
        let error = codec.try_decode_udf(function, b"9.9.9").unwrap_err().to_string();
        for part in ["executor 'a'", VERSION, "9.9.9", "same version"] {
            assert!(error.contains(part), "{error}");
        }
        let function = AGGREGATES.keys().next().unwrap();
        let error = codec.try_decode_udaf(function, b"9.9.9").unwrap_err().to_string();
        assert!(error.contains("same version"), "{error}");
        // As functions of a client's own come, by their names alone.
        for version in [VERSION.as_bytes(), b""] {
            let error = codec.try_decode_udf("my_function", version).unwrap_err().to_string();
            assert!(error.contains("executor 'a' has no function my_function"), "{error}");
        }

        let context = SessionContext::new().task_ctx();
        let converter = DefaultPhysicalProtoConverter {};
        for foreign in [b"".as_slice(), b"foreign", MAGIC, b"\xffpomona\xff\xff"] {
            codec.try_decode(foreign, &[rows()], &context, &converter).unwrap_err();
        }
        let mut other = NodeWire {
            version: "9.9.9".to_owned(),
            node: None,
        };
        let error = codec
            .read(&other.encode_to_vec(), &[rows()], &context)
            .unwrap_err()
            .to_string();
        assert!(error.contains("9.9.9"), "{error}");
        other.version = VERSION.to_owned();
        codec.read(&other.encode_to_vec(), &[rows()], &context).unwrap_err();
        other.node = wire(grant().as_ref()).unwrap();
        let message = other.encode_to_vec();
        codec.read(&message, &[rows()], &context).unwrap();
        codec.read(&message, &[], &context).unwrap_err();
        codec
            .read(&message[..message.len() - 3], &[rows()], &context)
            .unwrap_err();
    }

    #[test]
    fn every_function_is_known() {
        let known = functions();
        for name in ["array_length", "abs", "embed", "resize", "pca_transform"] {
            assert!(known.scalar_functions.contains_key(name), "{name}");
        }
        for name in ["sum", "pca_fit", "standardize_fit", "lda_fit", "logistic_fit"] {
            assert!(known.aggregate_functions.contains_key(name), "{name}");
        }
    }
}
