-- How many principal components? What each explains, how well a classifier does with k of them on
-- images that it has not seen, and the k to take.
--
--   pomona -f sql/choose_k.sql
--   pomona -f sql/choose_k.sql -v source=s3://bucket/fruits/ -v model=resnet50 -v target=s3://bucket/results/
--
-- source, pattern, model, target, embed: see embed.sql; together: see split.sql
-- among       the images that take part, an SQL condition; what is in a folder Test waits for classify.sql
-- validation  those of them that are held out, an SQL condition as held_out in split.sql
-- components  how many are fitted: a number, or a share of the variance to explain; 1.0 is all
-- ks          the numbers of components to try; beyond those that there are, all of them
-- fit         the classifier, lda_fit or logistic_fit

\default among      NOT in_test
\default validation draw < 0.25
\default components 1.0
\default ks         2, 5, 10, 15, 25, 40, 60, 100
\default fit        lda_fit
\default target     output/

\default scores     :target/scores.parquet

\set only     :among
\set held_out :validation
\i split.sql

CREATE OR REPLACE TABLE standard AS
SELECT standardize_fit(embedding) AS model FROM labelled WHERE NOT held_out;

-- Once; every k below is a part of it.
CREATE OR REPLACE TABLE pca AS
SELECT pca_fit(standardize(embedding, (SELECT model FROM standard)), :components) AS model
FROM labelled
WHERE NOT held_out;

CREATE OR REPLACE TABLE components AS
SELECT component, eigenvalue, share, sum(share) OVER (ORDER BY component) AS cumulative
FROM (
    SELECT unnest(range(1, 1 + array_length(model['explained_variance'])::BIGINT)) AS component,
           unnest(model['explained_variance']) AS eigenvalue,
           unnest(model['explained_variance_ratio']) AS share
    FROM pca
);

\echo The first components
SELECT component,
       round(eigenvalue, 3) AS eigenvalue,
       round(100 * share, 2) AS "share %",
       round(100 * cumulative, 2) AS "cumulative %"
FROM components
ORDER BY component
LIMIT 30;

\echo Components that explain this much of the variance
SELECT min(component) FILTER (WHERE cumulative >= 0.80) AS "80 %",
       min(component) FILTER (WHERE cumulative >= 0.90) AS "90 %",
       min(component) FILTER (WHERE cumulative >= 0.95) AS "95 %",
       min(component) FILTER (WHERE cumulative >= 0.99) AS "99 %",
       max(component) AS fitted
FROM components;

CREATE OR REPLACE TABLE ks AS
SELECT component AS k, cumulative
FROM components
WHERE component IN (
    SELECT least(k, fitted)
    FROM (SELECT unnest([:ks]) AS k) CROSS JOIN (SELECT max(component) AS fitted FROM components)
);

-- The first k scores are those of pca_truncate(model, k): one projection serves them all.
\echo Scores
COPY (
    SELECT path, label, held_out,
           pca_transform(
               standardize(embedding, (SELECT model FROM standard)),
               (SELECT pca_truncate(model, (SELECT max(k) FROM ks)) FROM pca)
           ) AS scores
    FROM labelled
)
TO :'scores' STORED AS PARQUET;

CREATE OR REPLACE TABLE classifiers AS
SELECT k, cumulative, :fit(array_slice(scores, 1, k), label) AS model
FROM ks CROSS JOIN :'scores'
WHERE NOT held_out
GROUP BY k, cumulative;

CREATE OR REPLACE TABLE accuracies AS
SELECT k, cumulative,
       model['training_accuracy'] AS training,
       count(*) AS images,
       count(*) FILTER (WHERE predicted IS DISTINCT FROM label) AS wrong,
       avg(CASE WHEN predicted = label THEN 1.0 ELSE 0.0 END) AS accuracy
FROM (
    SELECT k, cumulative, model, label, classify(array_slice(scores, 1, k), model) AS predicted
    FROM classifiers CROSS JOIN :'scores'
    WHERE held_out
)
GROUP BY k, cumulative, training;

\echo Right labels with k components
SELECT k,
       round(100 * cumulative, 1) AS "variance %",
       round(100 * training, 1) AS "training %",
       round(100 * accuracy, 1) AS "held out %",
       wrong
FROM accuracies
ORDER BY k;

-- The smallest that is as good as the best, as far as so many images can tell: the images that it has
-- wrong besides are no more than one standard error, than half a point or than one image, whichever is
-- most. Half an image is added to the right ones and to the wrong ones, or the error would be 0 where all
-- are right.
WITH best AS (
    SELECT k, wrong, accuracy,
           greatest(images * sqrt(share * (1 - share) / (images + 1)), 0.005 * images, 1.0) AS margin
    FROM (SELECT *, (images - wrong + 0.5) / (images + 1) AS share FROM accuracies)
    ORDER BY wrong, k
    LIMIT 1
)
SELECT concat(
           'Take k = ', accuracies.k, ': ', round(100 * accuracies.accuracy, 1), ' % of ', images,
           ' held-out images are right (the best: ', round(100 * best.accuracy, 1), ' % with k = ', best.k, '; ',
           CASE WHEN margin < 2 THEN '1 image' ELSE concat(margin::BIGINT, ' images') END, ' less may be chance)',
           CASE WHEN images < 30 THEN '. These are too few images to choose well: hold out 30 or more' ELSE '' END
       ) AS choice
FROM accuracies CROSS JOIN best
WHERE accuracies.wrong <= best.wrong + margin
ORDER BY accuracies.k
LIMIT 1;
