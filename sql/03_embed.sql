-- Step 3: a network turns each picture into a vector, an embedding.

\default source sample://fruits/Training/
\default model  resnet-mini
\default target output/
\default embeddings :target/embeddings.parquet

\echo Networks
SELECT name, input_width, input_height, dimensions, engine FROM models() ORDER BY name;

-- A file, so that the steps after this one do not run the network again.
\echo Embeddings
COPY (SELECT path, label, embed(content, :'model') AS embedding FROM images(:'source'))
TO :'embeddings' STORED AS PARQUET;

-- A file is a table. Pictures that look alike have vectors of nearly one direction.
\echo The pictures most like the first one
WITH pictures AS (SELECT * FROM :'embeddings'),
     chosen AS (SELECT * FROM pictures ORDER BY path LIMIT 1)
SELECT pictures.path, pictures.label,
       abs(round(cosine_distance(pictures.embedding, chosen.embedding), 4)) AS distance
FROM pictures CROSS JOIN chosen
ORDER BY distance, pictures.path
LIMIT 6;
