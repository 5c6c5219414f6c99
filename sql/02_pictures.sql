-- Step 2: look into pictures, cut them, change their size.

\default source sample://fruits/Training/

-- From the header alone: nothing is decoded.
\echo Formats and sizes
SELECT image_info(content)['format'] AS format,
       image_info(content)['width'] AS width,
       image_info(content)['height'] AS height,
       count(*) AS images
FROM images(:'source')
GROUP BY format, width, height
ORDER BY images DESC;

-- resize takes encoded bytes as well as images; encode_image goes back.
\echo Decoded, trimmed, resized
SELECT label,
       decode_image(content) AS picture,
       trim_background(decode_image(content)) AS trimmed,
       resize(content, 224, 224) AS resized,
       encode_image(resize(content, 32, 32), 'png') AS thumbnail
FROM images(:'source')
ORDER BY path
LIMIT 5;

-- What cannot be decoded is a row like any other.
\echo Broken images
SELECT path, image_error(content) AS error
FROM images(:'source')
WHERE image_error(content) IS NOT NULL;
