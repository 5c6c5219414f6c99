-- Step 5: the directions in which the vectors differ most, and how much each of them says.
--
-- Needs the embeddings of step 3 and the model of step 4.

\default k      25
\default target output/
\default embeddings :target/embeddings.parquet
\default standard   :target/standard.parquet
\default pca        :target/pca.parquet

COPY (SELECT pca_fit(standardize(embedding, (SELECT model FROM :'standard')), :k) AS model FROM :'embeddings')
TO :'pca' STORED AS PARQUET;

\echo The model
SELECT model FROM :'pca';

-- Is k a good number? Look where the cumulative share stops to grow.
\echo Explained variance
WITH components AS (
    SELECT unnest(range(1, 1 + array_length(model['explained_variance_ratio'])::BIGINT)) AS component,
           unnest(model['explained_variance_ratio']) AS ratio
    FROM :'pca'
)
SELECT component, round(ratio, 4) AS ratio, round(sum(ratio) OVER (ORDER BY component), 4) AS cumulative
FROM components
ORDER BY component;
