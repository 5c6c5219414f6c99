-- A classifier of images: trained, tested, and written down for apply.sql.
--
--   pomona -f sql/classify.sql
--   pomona -f sql/classify.sql -v source=s3://bucket/fruits/ -v model=resnet50 -v target=s3://bucket/results/
--
-- source, pattern, model, target, embed: see embed.sql; together: see split.sql
-- test  the images that are tested on, an SQL condition as held_out in split.sql; the others are trained
--       on. By default what is in a folder Test, or, where there is none, a quarter of each label
-- k     the number of principal components (choose_k.sql names one), or a share of the variance: 0.95
-- fit   the classifier, lda_fit or logistic_fit

\default test   CASE WHEN bool_or(in_test) OVER () THEN in_test ELSE draw < 0.25 END
\default k      25
\default fit    lda_fit
\default model  resnet-mini
\default target output/

\default classifier  :target/classifier.parquet
\default predictions :target/predictions.parquet

\set only     true
\set held_out :test
\i split.sql

CREATE OR REPLACE TABLE standard AS
SELECT standardize_fit(embedding) AS model FROM labelled WHERE NOT held_out;

CREATE OR REPLACE TABLE pca AS
SELECT pca_fit(standardize(embedding, (SELECT model FROM standard)), :k) AS model
FROM labelled
WHERE NOT held_out;

CREATE OR REPLACE VIEW features AS
SELECT path, label, held_out,
       pca_transform(standardize(embedding, (SELECT model FROM standard)), (SELECT model FROM pca)) AS features
FROM labelled;

-- One row with all that an image goes through, so that no two files can be mixed up.
\echo The classifier
COPY (
    SELECT :'model' AS network, standard.model AS standard, pca.model AS pca, classifier.model AS classifier
    FROM standard CROSS JOIN pca CROSS JOIN (
        SELECT :fit(features, label) AS model FROM features WHERE NOT held_out
    ) AS classifier
)
TO :'classifier' STORED AS PARQUET;

\echo Predictions
COPY (
    SELECT path, label, classify_proba(features, (SELECT classifier FROM :'classifier'), 3) AS top3
    FROM features
    WHERE held_out
)
TO :'predictions' STORED AS PARQUET;

CREATE OR REPLACE VIEW predictions AS
SELECT path, label, top3,
       top3[1]['label'] AS predicted,
       top3[1]['probability'] AS probability
FROM :'predictions';

-- For each label: its images, those of them that are right, and all images that were taken for it.
CREATE OR REPLACE TABLE scores AS
SELECT label, images, hits,
       CASE WHEN predicted > 0 THEN hits / predicted ELSE 0.0 END AS precision,
       CASE WHEN images > 0 THEN hits / images ELSE 0.0 END AS recall,
       2 * hits / (images + predicted) AS f1
FROM (
    SELECT label, sum(image)::DOUBLE AS images, sum(hit)::DOUBLE AS hits, sum(prediction)::DOUBLE AS predicted
    FROM (
        SELECT label, 1 AS image, CASE WHEN predicted = label THEN 1 ELSE 0 END AS hit, 0 AS prediction FROM predictions
        UNION ALL
        SELECT predicted, 0, 0, 1 FROM predictions WHERE predicted IS NOT NULL
    )
    GROUP BY label
);

\echo Test
SELECT sum(images)::BIGINT AS images,
       sum(images - hits)::BIGINT AS wrong,
       round(sum(hits) / sum(images), 4) AS accuracy,
       round(avg(f1), 4) AS "macro F1",
       (SELECT round(count(*) FILTER (WHERE label IN (top3[1]['label'], top3[2]['label'], top3[3]['label']))
                     / count(*)::DOUBLE, 4)
        FROM predictions) AS "in top 3",
       (SELECT round(classifier['training_accuracy'], 4) FROM :'classifier') AS "in training"
FROM scores;

\echo By label, worst first
SELECT label,
       round(precision, 4) AS precision,
       round(recall, 4) AS recall,
       round(f1, 4) AS "F1",
       images::BIGINT AS support
FROM scores
ORDER BY f1, label;

\echo What the images of a label were taken for
SELECT label,
       sum(images) AS images,
       coalesce(sum(images) FILTER (WHERE predicted = label), 0) AS "right",
       coalesce(
           string_agg(concat(coalesce(predicted, 'nothing'), ' ', images), ', ' ORDER BY images DESC, predicted)
               FILTER (WHERE predicted IS DISTINCT FROM label),
           ''
       ) AS wrong
FROM (SELECT label, predicted, count(*) AS images FROM predictions GROUP BY label, predicted)
GROUP BY label
ORDER BY sum(images) FILTER (WHERE predicted IS DISTINCT FROM label) DESC NULLS LAST, label;

\echo The most confident mistakes
SELECT path, label, predicted,
       round(100 * probability, 1) AS "sure %",
       concat(top3[2]['label'], ' ', round(100 * top3[2]['probability'], 1)) AS next
FROM predictions
WHERE predicted IS DISTINCT FROM label
ORDER BY probability DESC NULLS LAST, path
LIMIT 10;
