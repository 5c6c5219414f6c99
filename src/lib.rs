//! Images in object stores as SQL tables: decode, resize, embed, standardize and reduce them with
//! [Apache DataFusion](datafusion), in one process.
//!
//! ```text
//! s3://bucket/prefix ─► listing ─► filter on path, label, size ─► fetch ─► decode ─► resize ─► embed ─► standardize ─► pca ─► COPY TO s3://…
//!                       (LIST only)   (no GET for pruned rows)    (GETs)   └────────── SQL functions (pomona_udfs) ─────────┘
//! ```
//!
//! Data goes one way. Nothing on the right knows anything on the left.
//!
//! ```
//! # fn main() -> datafusion::error::Result<()> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let ctx = pomona::session()?;
//! let vectors = ctx
//!     .sql("SELECT label, embed(content, 'resnet-mini') AS embedding FROM images('sample://fruits/Training/') LIMIT 3")
//!     .await?
//!     .collect()
//!     .await?;
//! assert_eq!(vectors.iter().map(|batch| batch.num_rows()).sum::<usize>(), 3);
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! | where | what |
//! |---|---|
//! | [`session`](session()), [`SessionBuilder`] | a ready session: functions, stores, tables, settings |
//! | [`table`] | `CREATE EXTERNAL TABLE … STORED AS IMAGES` and `images('s3://…')` |
//! | [`stores`] | object stores from a URL, the environment and table options |
//! | [`sample`] | the sample data set, `sample://fruits/` |
//! | [`udfs`] | the functions alone, for a session of your own: [`udfs::register_all`] |
//! | [`cluster`] | the same SQL on many nodes |
//! | [`cli`] | the command line |

pub mod cli;
#[cfg(feature = "cluster")]
pub mod cluster;
mod plan;
pub mod sample;
mod session;
mod sink;
pub mod stores;
pub mod table;

pub use pomona_udfs as udfs;
pub use session::{SessionBuilder, session};
