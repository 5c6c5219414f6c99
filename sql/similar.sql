-- Images that look alike: those most like a given one, and near-duplicates.
--
--   pomona -f sql/similar.sql
--   pomona -f sql/similar.sql -v source=s3://bucket/fruits/ -v model=resnet50 -v like=Kiwi/17.jpg
--
-- source, pattern, model, target, embed as in embed.sql, and
-- like    the image to compare with: the end of its path. Without it, the first
-- pairs   which images a and b are compared in search of near-duplicates, an SQL condition; true is all.
--         Half the square of a label's images (of all images) are compared, half a million a second
--         on two cores where embeddings have 512 numbers: twelve days for a million images in one set
-- nearer  near-duplicates are at a smaller distance than this: 0 is the same direction, 1 a right
--         angle. How near is near is up to the network

\default like
\default pairs  a.label = b.label
\default nearer 0.01
\default target output/

\default labelled   :target/labelled.parquet
\default duplicates :target/duplicates.parquet
\default embed      embed.sql

\i :embed

CREATE OR REPLACE VIEW chosen AS SELECT path FROM :'labelled' WHERE ends_with(path, :'like');
\require chosen no path in :labelled ends with :like (-v like=…)

\echo The images most like
SELECT path, label FROM :'labelled' WHERE ends_with(path, :'like') ORDER BY path LIMIT 1;

WITH images AS (SELECT path, label, embedding FROM :'labelled'),
     chosen AS (SELECT * FROM images WHERE ends_with(path, :'like') ORDER BY path LIMIT 1)
SELECT images.path, images.label,
       abs(round(cosine_distance(images.embedding, chosen.embedding), 4)) AS distance
FROM images CROSS JOIN chosen
WHERE images.path <> chosen.path
ORDER BY distance, images.path
LIMIT 10;

\echo Pairs
SELECT sum(images * (images - 1) / 2) AS "of one label",
       sum(images) * (sum(images) - 1) / 2 AS "all"
FROM (SELECT label, count(*) AS images FROM :'labelled' GROUP BY label);

\echo Near-duplicates
COPY (
    SELECT a.path AS path, b.path AS other, a.label AS label, b.label AS other_label,
           abs(cosine_distance(a.embedding, b.embedding)) AS distance
    FROM :'labelled' AS a JOIN :'labelled' AS b
         ON (:pairs) AND a.path < b.path AND cosine_distance(a.embedding, b.embedding) < :nearer
)
TO :'duplicates' STORED AS PARQUET;

SELECT label, count(*) AS pairs, round(min(distance), 5) AS nearest
FROM :'duplicates'
GROUP BY label
ORDER BY label;

SELECT path, other, round(distance, 5) AS distance
FROM :'duplicates'
ORDER BY distance, path, other
LIMIT 10;
