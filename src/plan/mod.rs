//! A network runs once per image, whatever the query looks like.
//!
//! ```text
//! optimizer         hoist: equal calls of a query, or a call that a node would repeat (a join's filter runs
//!                   per pair), become one column, computed below
//! query planner     share: copies of a subplan that compute the same calls over the same rows (a CTE or a
//!                   view that is used twice) read one computation
//! execution         SharedExec: each reader takes the batches of one input, which runs once
//! ```
//!
//! The functions are declared volatile, so that DataFusion neither evaluates them again in a filter that it
//! pushes down nor merges projections so that a call stands twice.
//!
//! | module | what is in it |
//! |---|---|
//! | `calls` | which calls run a network, and where an expression makes them |
//! | `hoist` | the optimizer rule |
//! | `share` | the query planner, and what its plans may share |
//! | `merge` | one plan that gives the rows of two |
//! | `exec` | `SharedExec`, and the physical optimizer rule that shows its input |
//! | `buffer` | the batches that one reader has taken and another has not |

mod buffer;
mod calls;
mod exec;
mod hoist;
mod merge;
mod share;

pub(crate) use exec::ShowShared;
pub(crate) use hoist::HoistNetworks;
pub(crate) use share::SharingPlanner;
