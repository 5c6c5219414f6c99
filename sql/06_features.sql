-- Step 6: each picture in a few numbers, its features.
--
-- Needs the embeddings of step 3 and the models of steps 4 and 5.

\default target output/
\default embeddings :target/embeddings.parquet
\default standard   :target/standard.parquet
\default pca        :target/pca.parquet
\default features   :target/features.parquet

COPY (
    SELECT path, label,
           pca_transform(standardize(embedding, (SELECT model FROM :'standard')), (SELECT model FROM :'pca')) AS features
    FROM :'embeddings'
    ORDER BY path
)
TO :'features' STORED AS PARQUET;

\echo The first rows
SELECT * FROM :'features' ORDER BY path LIMIT 5;

-- Labels that the first two components tell apart have different means here.
\echo Where the labels are
SELECT label,
       round(avg(features[1]), 2) AS first_component,
       round(avg(features[2]), 2) AS second_component
FROM :'features'
GROUP BY label
ORDER BY label;
