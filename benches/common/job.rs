//! The main job, as `sql/fruits.sql` has it, without what that prints.

use std::path::Path;

use crate::common::Engine;

/// Embeds the images at `source`, and leaves their standardized principal components in `target`.
pub(crate) fn run(engine: &Engine, source: &str, model: &str, target: &Path) {
    let target = target.display();
    for sql in [
        format!("CREATE OR REPLACE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION '{source}'"),
        format!(
            "COPY (SELECT path, label, embed(content, '{model}') AS embedding FROM fruits)
             TO '{target}/embeddings.parquet' STORED AS PARQUET"
        ),
        format!("CREATE OR REPLACE EXTERNAL TABLE embeddings STORED AS PARQUET LOCATION '{target}/embeddings.parquet'"),
        "CREATE OR REPLACE TABLE standard AS SELECT standardize_fit(embedding) AS model FROM embeddings".to_owned(),
        "CREATE OR REPLACE TABLE pca AS
         SELECT pca_fit(standardize(embedding, (SELECT model FROM standard)), 25) AS model FROM embeddings"
            .to_owned(),
        format!(
            "COPY (
                SELECT path, label,
                       pca_transform(standardize(embedding, (SELECT model FROM standard)), (SELECT model FROM pca))
                       AS features
                FROM embeddings
                ORDER BY path
             ) TO '{target}/features.parquet' STORED AS PARQUET"
        ),
    ] {
        engine.run(&sql);
    }
}
