-- Step 4: give every dimension the mean 0 and the variance 1.
--
-- Fitting is an aggregate; what it returns is a value, the model, that can be written down like any
-- other. Needs the embeddings of step 3.

\default target output/
\default embeddings :target/embeddings.parquet
\default standard   :target/standard.parquet

COPY (SELECT standardize_fit(embedding) AS model FROM :'embeddings')
TO :'standard' STORED AS PARQUET;

\echo The model
SELECT model FROM :'standard';

\echo Before and after
SELECT label, embedding,
       standardize(embedding, (SELECT model FROM :'standard')) AS standardized
FROM :'embeddings'
ORDER BY path
LIMIT 3;
