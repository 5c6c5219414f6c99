-- The main job: images in an object store become principal components in a Parquet file.
--
--   pomona -f sql/fruits.sql
--   pomona -f sql/fruits.sql -v source=s3://bucket/Training/ -v model=resnet50 -v target=s3://bucket/features/
--
-- source  where the images are; the folder that holds an image is its label
-- model   the network (SELECT * FROM models() lists those that there are)
-- k       the number of principal components, or a share of the variance: 0.95
-- target  the folder that the results are written to

\default source sample://fruits/Training/
\default model  resnet-mini
\default k      25
\default target output/

\default embeddings :target/embeddings.parquet
\default features   :target/features.parquet

CREATE OR REPLACE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION :'source';

\echo Images by label
SELECT label, count(*) AS images FROM fruits GROUP BY label ORDER BY label;

-- Written down, so that memory stays flat and nothing below runs the network again.
\echo Embeddings
COPY (SELECT path, label, embed(content, :'model') AS embedding FROM fruits)
TO :'embeddings' STORED AS PARQUET;

CREATE OR REPLACE EXTERNAL TABLE embeddings STORED AS PARQUET LOCATION :'embeddings';

CREATE OR REPLACE TABLE standard AS
SELECT standardize_fit(embedding) AS model FROM embeddings;

CREATE OR REPLACE TABLE pca AS
SELECT pca_fit(standardize(embedding, (SELECT model FROM standard)), :k) AS model FROM embeddings;

\echo Explained variance
WITH components AS (
    SELECT unnest(range(1, 1 + array_length(model['explained_variance'])::BIGINT)) AS component,
           unnest(model['explained_variance']) AS explained_variance,
           unnest(model['explained_variance_ratio']) AS ratio
    FROM pca
)
SELECT component,
       round(explained_variance, 3) AS explained_variance,
       round(ratio, 4) AS ratio,
       round(sum(ratio) OVER (ORDER BY component), 4) AS cumulative
FROM components
ORDER BY component;

\echo Features
COPY (
    SELECT path, label,
           pca_transform(standardize(embedding, (SELECT model FROM standard)), (SELECT model FROM pca)) AS features
    FROM embeddings
    ORDER BY path
)
TO :'features' STORED AS PARQUET;

\echo The first rows
SELECT * FROM :'features' ORDER BY path LIMIT 5;
