-- The statistics in Pomona, from a Parquet file of vectors to one of their principal components.
--
--   pomona -f benches/peers/pomona_pca.sql -v file=vectors.parquet -v target=output/
--
-- file        Parquet, with the columns id and v
-- k           the number of principal components
-- target      the folder that the results are written to: features.parquet and model.json

\default file   target/peers/vectors-67692x2048.parquet
\default k      25
\default target output/

\default features :target/features.parquet
\default model    :target/model.json

\echo standardize_fit
CREATE OR REPLACE TABLE standard AS SELECT standardize_fit(v) AS model FROM :'file';

\echo pca_fit
CREATE OR REPLACE TABLE pca AS SELECT pca_fit(standardize(v, (SELECT model FROM standard)), :k) AS model FROM :'file';

\echo pca_transform
COPY (
    SELECT id, pca_transform(standardize(v, (SELECT model FROM standard)), (SELECT model FROM pca)) AS features
    FROM :'file'
)
TO :'features' STORED AS PARQUET;

\echo model
COPY (
    SELECT model['count'] AS count,
           model['explained_variance'] AS explained_variance,
           model['explained_variance_ratio'] AS explained_variance_ratio
    FROM pca
)
TO :'model' STORED AS JSON;
