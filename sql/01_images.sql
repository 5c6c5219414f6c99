-- Step 1: a folder of images is a table.
--
-- The steps run one after the other, from the same folder; each shows one part of fruits.sql.

\default source sample://fruits/Training/

-- path, content (the encoded bytes) and label (the folder that holds the image).
CREATE OR REPLACE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION :'source';

\echo Five images
SELECT * FROM fruits LIMIT 5;

-- The listing answers this one: no image is fetched.
\echo Images by label
SELECT label, count(*) AS images FROM fruits GROUP BY label ORDER BY label;

-- What a query would list, prune and fetch, before it does.
\echo The plan for one label
EXPLAIN FORMAT INDENT SELECT content FROM fruits WHERE label = 'Kiwi';

-- The same without a table, where no options are needed.
\echo Without CREATE
SELECT path FROM images(:'source') WHERE label = 'Kiwi' ORDER BY path LIMIT 3;
