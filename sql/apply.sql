-- Recognizes images with the classifier that classify.sql has written, on this day or another.
--
--   pomona -f sql/apply.sql
--   pomona -f sql/apply.sql -v source=s3://bucket/new/ -v model=resnet50 -v target=s3://bucket/classifier/
--
-- source      where the images are; they need no labels
-- classifier  what classify.sql has written
-- model       the network that it was trained with
-- recognized  where the result is written to: path, label, probability, and the three most likely labels

\default source sample://fruits/Test/
\default model  resnet-mini
\default target output/

\default classifier :target/classifier.parquet
\default recognized :target/recognized.parquet

\echo The classifier
SELECT network,
       network = :'model' AS "as model",
       classifier['kind'] AS kind,
       array_length(pca['mean']) AS features,
       array_length(pca['components']) AS k,
       array_length(classifier['labels']) AS labels,
       classifier['count'] AS images,
       round(classifier['training_accuracy'], 4) AS "accuracy in training"
FROM :'classifier';

CREATE OR REPLACE VIEW same_network AS SELECT network FROM :'classifier' WHERE network = :'model';
\require same_network classifier :classifier was trained with another network than model :model: pass -v model=… with the one shown above

\echo Recognized
COPY (
    SELECT path, top3[1]['label'] AS label, top3[1]['probability'] AS probability, top3
    FROM (
        SELECT path,
               classify_proba(
                   pca_transform(
                       standardize(embed(content, :'model'), (SELECT standard FROM :'classifier')),
                       (SELECT pca FROM :'classifier')
                   ),
                   (SELECT classifier FROM :'classifier'),
                   3
               ) AS top3
        FROM images(:'source')
    )
)
TO :'recognized' STORED AS PARQUET;

\echo By label
SELECT label,
       count(*) AS images,
       round(100 * avg(probability), 1) AS "sure %",
       count(*) FILTER (WHERE probability < 0.5) AS doubtful
FROM :'recognized'
GROUP BY label
ORDER BY label;

\echo The first images
SELECT path, label,
       round(100 * probability, 1) AS "sure %",
       concat(top3[2]['label'], ' ', round(100 * top3[2]['probability'], 1)) AS next
FROM :'recognized'
ORDER BY path
LIMIT 10;
