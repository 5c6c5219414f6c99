//! Pomona inside another program: a small service that tells what a picture looks like.
//!
//! `cargo run --release --example embed_in_service -- picture.jpg` embeds the sample data set once,
//! keeps the vectors in a table, and answers with the labels of the nearest pictures. Without a
//! picture it takes one of the test set.

use std::error::Error;

use datafusion::arrow::array::{Array, AsArray, RecordBatch};
use datafusion::arrow::util::pretty::pretty_format_batches;
use datafusion::common::ScalarValue;
use datafusion::prelude::SessionContext;
use pomona::SessionBuilder;
use pomona::udfs::settings::{OnError, PomonaOptions};

/// What the service keeps between requests.
struct Service {
    ctx: SessionContext,
}

impl Service {
    /// Embeds what is known, once.
    async fn start() -> Result<Self, Box<dyn Error>> {
        let options = PomonaOptions {
            on_error: OnError::Null,
            ..PomonaOptions::default()
        };
        let ctx = SessionBuilder::new()
            .with_memory_limit(1 << 30)
            .with_options(options)
            .build()?;
        let known = "CREATE TABLE known AS \
                     SELECT label, embed(content, 'resnet-mini') AS embedding \
                     FROM images('sample://fruits/Training/')";
        ctx.sql(known).await?.collect().await?;
        Ok(Self { ctx })
    }

    /// The labels of the pictures nearest to `upload`: the bytes of a file, from wherever they come.
    async fn nearest(&self, upload: Vec<u8>) -> Result<Vec<RecordBatch>, Box<dyn Error>> {
        let query = "SELECT label, cosine_distance(embedding, embed($1, 'resnet-mini')) AS distance \
                     FROM known ORDER BY distance LIMIT 5";
        let nearest = self
            .ctx
            .sql(query)
            .await?
            .with_param_values(vec![ScalarValue::Binary(Some(upload))])?;
        Ok(nearest.collect().await?)
    }
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "this is what the program is for")]
async fn main() -> Result<(), Box<dyn Error>> {
    let service = Service::start().await?;
    let upload = match std::env::args_os().nth(1) {
        Some(file) => std::fs::read(file)?,
        None => unseen_picture(&service.ctx).await?,
    };
    println!("{}", pretty_format_batches(&service.nearest(upload).await?)?);
    Ok(())
}

/// A picture that is not among the known.
async fn unseen_picture(ctx: &SessionContext) -> Result<Vec<u8>, Box<dyn Error>> {
    let query = "SELECT content FROM images('sample://fruits/Test/') WHERE label = 'Lemon' LIMIT 1";
    let batches = ctx.sql(query).await?.collect().await?;
    let content = batches.first().and_then(|batch| batch.columns().first());
    let content = content
        .and_then(|content| content.as_binary_opt::<i32>())
        .filter(|content| !content.is_empty());
    Ok(content.ok_or("there is no test picture")?.value(0).to_vec())
}
