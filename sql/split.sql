-- Which labelled images are fitted on, and which are held out. Part of choose_k.sql and classify.sql,
-- which read the view labelled (path, label, embedding, held_out).
--
-- only      the images that take part, an SQL condition
-- held_out  those of them that are held out, an SQL condition. It may name the columns of the pattern;
--           in_test, true for what is in a folder Test (or test) that holds the labels' folders or the
--           images themselves; and draw, a number between 0 and 1 that a hash
--           draws for the image, the same in every run: draw < 0.25 holds out a quarter of each label
-- together  images with one value of this are drawn as one, so that no fruit, tray or day is on both
--           sides: -v 'pattern={label}/{fruit}_*' -v 'together=concat(label, fruit)'. The path: each
--           image by itself

\default only     true
\default held_out draw < 0.25
\default together path

\default target   output/
\default labelled :target/labelled.parquet
\default sides    :target/sides.parquet
\default embed    embed.sql

\i :embed

-- In the order of their hashes, the groups of a label fill the line from 0 to 1: each is drawn the
-- middle of its part. So the share that is held out is right for each label, not only on average.
CREATE OR REPLACE TABLE sides AS (
    WITH images AS (
        SELECT * EXCLUDE (embedding), arrow_cast(:together, 'Utf8') AS together
        FROM (
            SELECT *,
                   lower(split_part(path, '/', -2)) = 'test'
                   OR lower(split_part(path, '/', -3)) = 'test'
                   OR strpos(lower(path), concat('/test/', lower(label), '/')) > 0 AS in_test
            FROM :'labelled'
        )
        WHERE (:only) AND label IS NOT NULL AND embedding IS NOT NULL
    ),
    groups AS (
        SELECT together, min(label) AS label, count(*) AS images FROM images GROUP BY together
    ),
    drawn AS (
        SELECT together,
               (sum(images) OVER (PARTITION BY label ORDER BY md5(together)) - 0.5 * images)
                   / sum(images) OVER (PARTITION BY label) AS draw
        FROM groups
    )
    SELECT path, (:held_out) AS held_out FROM images JOIN drawn USING (together)
);

-- Before anything is written over what an earlier run has found.
CREATE OR REPLACE VIEW training_side AS SELECT path FROM sides WHERE NOT held_out;
CREATE OR REPLACE VIEW held_out_side AS SELECT path FROM sides WHERE held_out;
\require training_side no images to train on: :labelled has none where :only, or all of them are held out (:held_out). Is there another folder than Test?
\require held_out_side no images to hold out (:held_out): has each label fewer than three images, or values of :together?

COPY sides TO :'sides' STORED AS PARQUET;

CREATE OR REPLACE VIEW labelled AS
SELECT path, label, embedding, held_out FROM :'sides' JOIN :'labelled' USING (path);

\echo Images by label
SELECT label,
       count(*) FILTER (WHERE NOT held_out) AS training,
       count(*) FILTER (WHERE held_out) AS held_out
FROM labelled
GROUP BY label
ORDER BY label;
