//! [`GrantExec`]: what a session was told of a store, on its way to the executors.
//!
//! `CREATE EXTERNAL TABLE … OPTIONS ('aws.access_key_id' …)` and COPY make stores of their options, which the
//! session then has. An executor makes the same when it reads this node, which hands rows on. They are in no
//! text of a plan.

use std::fmt;
use std::sync::Arc;

use datafusion::error::Result;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::physical_expr::Distribution;
use datafusion::physical_plan::{ExecutionPlan, PlanProperties};
use url::Url;

use super::hand_on::{HandOnExec, Purpose};
use crate::stores::{GivenOptions, store_with_options};

/// A store, and the options to make it of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) store: Url,
    pub(crate) given: GivenOptions,
}

impl Grant {
    /// Makes the store known.
    pub(crate) fn register(&self, runtime: &RuntimeEnv) -> Result<()> {
        if let Some(made) = store_with_options(&self.store, &self.given.0)? {
            runtime.register_object_store(&self.store, made);
        }
        Ok(())
    }
}

/// What makes a store known to the tasks that run it.
pub(crate) type GrantExec = HandOnExec<Grant>;

/// Without the options.
impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = &self.store;
        write!(f, ": {}://{}", store.scheme(), store.host_str().unwrap_or_default())
    }
}

impl Purpose for Grant {
    const NAME: &'static str = "GrantExec";
    const MAINTAINS_ORDER: bool = true;

    fn distribution(&self) -> Distribution {
        Distribution::UnspecifiedDistribution
    }

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> Arc<PlanProperties> {
        Arc::clone(input.properties())
    }
}
