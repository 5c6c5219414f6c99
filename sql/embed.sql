-- Embeds a labelled set of images, once. Part of choose_k.sql, classify.sql and similar.sql, which
-- skip it with -v embed=/dev/null where an earlier run has written the file.
--
-- source   where the images are
-- pattern  what their paths say: each brace is a column, {label} is what is to be recognized
-- model    the network (SELECT * FROM models() lists those that there are)
-- target   the folder that the results are written to

\default source  sample://fruits/
\default pattern **/{label}/*
\default model   resnet-mini
\default target  output/

\default labelled :target/labelled.parquet

CREATE OR REPLACE EXTERNAL TABLE labelled_images STORED AS IMAGES
LOCATION :'source' OPTIONS (images.path_pattern :'pattern');

\require labelled_images no images: is :source the folder above the labels' folders, and does pattern :pattern match?

-- Path, label, the pattern's other columns, embedding.
\echo Embeddings
COPY (SELECT * EXCLUDE (content), embed(content, :'model') AS embedding FROM labelled_images)
TO :'labelled' STORED AS PARQUET;
