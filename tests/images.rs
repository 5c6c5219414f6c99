//! Real images against Pillow, onnxruntime and scikit-learn, whose results
//! `tests/references/make_images.py` has written down.
//!
//! What needs the real images or the model squeezenet1.1 is skipped without `POMONA_REAL_DATA`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use common::{integers, pomona, real_data, reference, rows, strings, success, vectors};
use datafusion::prelude::SessionContext;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use serde_json::Value;

fn session() -> SessionContext {
    pomona::session().unwrap()
}

/// A column of decoded images.
fn pictures(rows: &RecordBatch, name: &str) -> Vec<RgbImage> {
    let images = rows.column_by_name(name).unwrap().as_struct();
    assert_eq!(images.null_count(), 0);
    let size = |name| {
        images
            .column_by_name(name)
            .unwrap()
            .as_primitive::<Int32Type>()
            .values()
    };
    let (widths, heights) = (size("width"), size("height"));
    let pixels = images.column_by_name("data").unwrap().as_binary::<i32>();
    (0..rows.num_rows())
        .map(|i| {
            let (width, height) = (widths[i].cast_unsigned(), heights[i].cast_unsigned());
            RgbImage::from_raw(width, height, pixels.value(i).to_vec()).unwrap()
        })
        .collect()
}

/// The differences of two pictures of the same size, value by value.
fn differences(a: &RgbImage, b: &RgbImage) -> Vec<u8> {
    assert_eq!(a.dimensions(), b.dimensions());
    a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b)).collect()
}

fn mean(differences: &[u8]) -> f64 {
    differences.iter().map(|d| f64::from(*d)).sum::<f64>() / differences.len() as f64
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The files below a folder that are images by their names.
fn count_images(folder: &Path) -> i64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let count = |path: std::path::PathBuf| {
        if path.is_dir() {
            count_images(&path)
        } else {
            i64::from(path.extension().is_some())
        }
    };
    entries.map(count).sum()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(reference(name)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[tokio::test]
async fn resize_equals_pillow() {
    let session = session();
    let folder = reference("");
    let mut compared = 0;
    for file in fs::read_dir(folder.join("resize")).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_stem().unwrap().to_str().unwrap();
        let (filter, size) = name.split_once('_').unwrap();
        let (width, height) = size.split_once('x').unwrap();
        let sql = format!(
            "SELECT resize(content, {width}, {height}, '{filter}') AS image \
             FROM images('{}') WHERE ends_with(path, '/picture.png')",
            folder.display()
        );
        let resized = pictures(&rows(&session, &sql).await.unwrap(), "image").remove(0);
        let pillow = image::open(&file).unwrap().into_rgb8();
        let worst = differences(&resized, &pillow).into_iter().max().unwrap();
        assert!(worst <= 1, "{name}: {worst} levels off");
        compared += 1;
    }
    assert_eq!(compared, 36, "six filters, six sizes");
}

#[tokio::test]
async fn every_real_image_decodes() {
    let Some(real) = real_data() else { return };
    let session = session();
    for folder in ["fruits", "photos", "decoder/formats", "decoder/orientation"] {
        let folder = real.join("data").join(folder);
        let sql = format!(
            "SELECT count(decode_image(content)) AS decoded, count(image_error(content)) AS broken FROM images('{}')",
            folder.display()
        );
        let counts = rows(&session, &sql).await.unwrap();
        assert_eq!(
            integers(&counts, "decoded"),
            [count_images(&folder)],
            "{}",
            folder.display()
        );
        assert_eq!(integers(&counts, "broken"), [0], "{}", folder.display());
    }
}

#[tokio::test]
async fn decoding_equals_pillow() {
    let Some(real) = real_data() else { return };
    let session = session();
    for (path, facts) in json("decode.json").as_object().unwrap() {
        let (folder, file) = path.rsplit_once('/').unwrap();
        let sql = format!(
            "SELECT decode_image(content) AS image FROM images('{}') WHERE ends_with(path, '/{file}')",
            real.join("data").join(folder).display()
        );
        let picture = pictures(&rows(&session, &sql).await.unwrap(), "image").remove(0);
        let size = [f64::from(picture.width()), f64::from(picture.height())];
        assert_eq!(
            size,
            [&facts["width"], &facts["height"]].map(|v| v.as_f64().unwrap()),
            "{path}"
        );

        let pixels = f64::from(picture.width()) * f64::from(picture.height());
        for (channel, expected) in numbers(&facts["mean"]).into_iter().enumerate() {
            let mean = picture.pixels().map(|pixel| f64::from(pixel[channel])).sum::<f64>() / pixels;
            assert!(
                (mean - expected).abs() < 0.5,
                "{path}: channel {channel} is {mean} instead of {expected} on average"
            );
        }
        let mut off = Vec::new();
        for sample in facts["pixels"].as_array().unwrap() {
            let [x, y, r, g, b]: [f64; 5] = numbers(sample).try_into().unwrap();
            let pixel = picture.get_pixel(x as u32, y as u32);
            off.extend(
                [r, g, b]
                    .iter()
                    .zip(pixel.0)
                    .map(|(expected, value)| value.abs_diff(*expected as u8)),
            );
        }
        assert!(mean(&off) < 1.0, "{path}: {} levels off on average", mean(&off));
    }
}

#[tokio::test]
async fn eight_orientations_are_one_picture() {
    let Some(real) = real_data() else { return };
    let sql = format!(
        "SELECT decode_image(content) AS image FROM images('{}') ORDER BY path",
        real.join("data/decoder/orientation").display()
    );
    let pictures = pictures(&rows(&session(), &sql).await.unwrap(), "image");
    assert_eq!(pictures.len(), 8);
    for (i, picture) in pictures.iter().enumerate() {
        // Each file was compressed anew: Pillow's decoded pictures are up to 3.7 levels apart.
        let off = mean(&differences(picture, &pictures[0]));
        assert!(off < 5.0, "orientation {}: {off} levels off on average", i + 1);
    }
}

#[tokio::test]
async fn every_broken_image_has_an_error() {
    let Some(real) = real_data() else { return };
    let session = session();
    let folder = real.join("data/decoder/broken");
    let sql = format!(
        "SELECT image_error(content) AS error FROM images('{}')",
        folder.display()
    );
    let errors = strings(&rows(&session, &sql).await.unwrap(), "error");
    assert_eq!(errors.len(), 8);
    assert!(errors.iter().all(|error| !error.is_empty()), "{errors:?}");

    let sql = format!(
        "SELECT count(embed(content, 'resnet-mini')) AS embedded FROM images('{}')",
        folder.display()
    );
    let error = rows(&session, &sql).await.unwrap_err().to_string();
    assert!(error.contains("decode") && error.contains("image_error"), "{error}");
    rows(&session, "SET pomona.on_error = 'null'").await.unwrap();
    assert_eq!(integers(&rows(&session, &sql).await.unwrap(), "embedded"), [0]);
}

/// The embeddings of a reference, by label and file name.
async fn references(session: &SessionContext, name: &str) -> HashMap<(String, String), Vec<f64>> {
    let sql = format!("SELECT label, file, embedding FROM '{}'", reference(name).display());
    keyed(&rows(session, &sql).await.unwrap())
}

fn keyed(rows: &RecordBatch) -> HashMap<(String, String), Vec<f64>> {
    let keys = strings(rows, "label").into_iter().zip(strings(rows, "file"));
    keys.zip(vectors(rows, "embedding")).collect()
}

/// The embeddings of a folder's images, by label and file name.
async fn embeddings(session: &SessionContext, folder: &Path, model: &str) -> HashMap<(String, String), Vec<f64>> {
    let sql = format!(
        "SELECT label, split_part(path, '/', -1) AS file, embed(content, '{model}') AS embedding FROM images('{}')",
        folder.display()
    );
    keyed(&rows(session, &sql).await.unwrap())
}

#[tokio::test]
async fn the_bundled_model_equals_onnxruntime() {
    let session = session();
    let references = references(&session, "resnet-mini.parquet").await;
    let sql = format!(
        "SELECT embed(content, 'resnet-mini') AS embedding FROM images('{}') WHERE ends_with(path, '/picture.png')",
        reference("").display()
    );
    let embedding = vectors(&rows(&session, &sql).await.unwrap(), "embedding").remove(0);
    // A PNG: nothing but resizing and the network can differ.
    let similarity = cosine(
        &embedding,
        &references[&("references".to_owned(), "picture.png".to_owned())],
    );
    assert!(similarity > 0.99999, "{similarity}");

    let Some(real) = real_data() else { return };
    for folder in ["fruits/Training", "photos", "decoder/orientation"] {
        let embeddings = embeddings(&session, &real.join("data").join(folder), "resnet-mini").await;
        let common: Vec<_> = references.keys().filter(|key| embeddings.contains_key(*key)).collect();
        assert!(!common.is_empty(), "{folder}");
        for key in common {
            let similarity = cosine(&embeddings[key], &references[key]);
            assert!(similarity > 0.9999, "{key:?}: {similarity}");
        }
    }
}

/// A session that finds the real models.
async fn session_with_models(real: &Path) -> SessionContext {
    let session = session();
    rows(
        &session,
        &format!("SET pomona.models_dir = '{}'", real.join("models").display()),
    )
    .await
    .unwrap();
    session
}

#[tokio::test]
async fn squeezenet_equals_onnxruntime() {
    let Some(real) = real_data() else { return };
    let session = session_with_models(&real).await;
    let references = references(&session, "squeezenet1.1.parquet").await;
    let embeddings = embeddings(&session, &real.join("data/fruits/Training"), "squeezenet1.1").await;
    assert_eq!((embeddings.len(), references.len()), (480, 480));
    let similarities = embeddings
        .iter()
        .map(|(key, embedding)| (cosine(embedding, &references[key]), key));
    let (worst, key) = similarities.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert!(worst > 0.9999, "{key:?}: {worst}");
}

#[tokio::test]
async fn every_format_and_orientation_embeds() {
    let Some(real) = real_data() else { return };
    let session = session_with_models(&real).await;
    for folder in ["photos", "decoder/formats", "decoder/orientation"] {
        let folder = real.join("data").join(folder);
        let embeddings = embeddings(&session, &folder, "squeezenet1.1").await;
        assert_eq!(embeddings.len() as i64, count_images(&folder));
        for (key, embedding) in embeddings {
            assert_eq!(embedding.len(), 512, "{key:?}");
            assert!(
                embedding.iter().all(|v| v.is_finite()) && embedding.iter().any(|v| *v > 0.0),
                "{key:?}"
            );
        }
    }
}

/// A JPEG of 1600 x 1200 pixels with edges, gradients and noise. Where it is `turned`, the file holds
/// it lying on its side, and says so in its EXIF orientation.
fn photo(turned: bool) -> Vec<u8> {
    let picture = RgbImage::from_fn(1600, 1200, |x, y| {
        let noise = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(2_246_822_519)).wrapping_mul(3_266_489_917) >> 28;
        let inside = (x / 2).abs_diff(300).pow(2) + (y / 2).abs_diff(400).pow(2) < 150 * 150;
        let level = |value: u32| (value + noise) as u8;
        if inside {
            image::Rgb([level(200), level(40 + y / 20), level(x / 20)])
        } else {
            image::Rgb([level(x / 8), level(y / 8), level(x * y / 10_000 % 200)])
        }
    });
    let picture = if turned {
        image::imageops::rotate270(&picture)
    } else {
        picture
    };
    let mut file = Vec::new();
    picture
        .write_with_encoder(JpegEncoder::new_with_quality(&mut file, 90))
        .unwrap();
    if turned {
        // The only entry of the directory: tag 0x0112 (orientation), a SHORT, once, 6.
        let exif = b"\xff\xe1\0\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        file.splice(2..2, exif.iter().copied());
    }
    file
}

/// What a query gives in both of `pomona.decode`'s modes, exact and fast.
async fn in_both_modes<T>(session: &SessionContext, sql: &str, read: impl Fn(&RecordBatch) -> T) -> [T; 2] {
    rows(session, "SET pomona.decode = 'exact'").await.unwrap();
    let exact = read(&rows(session, sql).await.unwrap());
    rows(session, "SET pomona.decode = 'fast'").await.unwrap();
    [exact, read(&rows(session, sql).await.unwrap())]
}

#[tokio::test]
async fn fast_decoding_is_nearly_exact() {
    let session = session();
    let folder = tempfile::tempdir().unwrap();
    for (name, turned) in [("turned.jpg", true), ("upright.jpg", false)] {
        fs::write(folder.path().join(name), photo(turned)).unwrap();
    }
    let images = format!("FROM images('{}') ORDER BY path", folder.path().display());
    // To 2 of 8 parts, before the filter shrinks by 2.5 what is left.
    let sql = format!("SELECT resize(content, 160, 120) AS image {images}");
    let [exact, fast] = in_both_modes(&session, &sql, |rows| pictures(rows, "image")).await;
    for (exact, fast) in exact.iter().zip(&fast) {
        let off = differences(exact, fast);
        assert!(off.iter().any(|off| *off > 0), "decoded in full");
        assert!(mean(&off) < 1.0, "{} levels off on average", mean(&off));
    }
    let off = mean(&differences(&fast[0], &fast[1]));
    assert!(off < 1.5, "turned upright: {off} levels off on average");

    let sql = format!("SELECT embed(content, 'resnet-mini') AS embedding {images}");
    let [exact, fast] = in_both_modes(&session, &sql, |rows| vectors(rows, "embedding")).await;
    assert_ne!(exact, fast);
    for (exact, fast) in exact.iter().zip(&fast) {
        let similarity = cosine(exact, fast);
        assert!(similarity > 0.999, "{similarity}");
    }

    // Half the pixels allowed: the file's size counts, not that of what would be made of it.
    rows(&session, "SET pomona.max_image_pixels = 960000").await.unwrap();
    let error = rows(&session, &format!("SELECT resize(content, 160, 120) {images}"))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than pomona.max_image_pixels"), "{error}");
}

#[tokio::test]
async fn fast_decoding_leaves_small_images_alone() {
    let session = session();
    let images = "FROM images('sample://fruits/Training/') ORDER BY path LIMIT 16";
    // Fruits-360 has 100 x 100 pixels: to 60 x 60 they shrink by less than 2, to 120 x 20 on one axis.
    for size in ["224, 224", "60, 60", "120, 20"] {
        let sql = format!("SELECT resize(content, {size}) AS image {images}");
        let [exact, fast] = in_both_modes(&session, &sql, |rows| pictures(rows, "image")).await;
        assert_eq!(exact, fast, "{size}");
    }
    let sql = format!("SELECT embed(content, 'resnet-mini') AS embedding {images}");
    let [exact, fast] = in_both_modes(&session, &sql, |rows| vectors(rows, "embedding")).await;
    assert_eq!(exact, fast);
}

#[tokio::test]
async fn fast_embeddings_of_real_photos() {
    let Some(real) = real_data() else { return };
    let session = session();
    // 350 to 850 pixels wide, for a network that takes 96.
    let sql = format!(
        "SELECT embed(content, 'resnet-mini') AS embedding FROM images('{}') ORDER BY path",
        real.join("data/photos").display()
    );
    let [exact, fast] = in_both_modes(&session, &sql, |rows| vectors(rows, "embedding")).await;
    assert_ne!(exact, fast);
    for (exact, fast) in exact.iter().zip(&fast) {
        let similarity = cosine(exact, fast);
        assert!(similarity > 0.999, "{similarity}");
    }
}

#[tokio::test]
async fn standardized_components_equal_scikit_learn() {
    let session = session();
    let sql = format!(
        "CREATE TABLE embeddings AS SELECT * FROM '{}'",
        reference("squeezenet1.1.parquet").display()
    );
    rows(&session, &sql).await.unwrap();
    let sql = "CREATE TABLE standardized AS SELECT label, file, \
               standardize(embedding, (SELECT standardize_fit(embedding) FROM embeddings)) AS embedding FROM embeddings";
    rows(&session, sql).await.unwrap();
    rows(
        &session,
        "CREATE TABLE pca AS SELECT pca_fit(embedding, 25) AS model FROM standardized",
    )
    .await
    .unwrap();

    let expected = json("components.json");
    let sql = "SELECT model['explained_variance'] AS explained_variance, \
               model['explained_variance_ratio'] AS explained_variance_ratio FROM pca";
    let model = rows(&session, sql).await.unwrap();
    for name in ["explained_variance", "explained_variance_ratio"] {
        let (ours, theirs) = (vectors(&model, name).remove(0), numbers(&expected[name]));
        assert_eq!(ours.len(), 25);
        for (k, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert!(
                (ours / theirs - 1.0).abs() < 1e-5,
                "{name} of component {k}: {ours} instead of {theirs}"
            );
        }
    }

    let sql = "SELECT label, file, pca_transform(embedding, (SELECT model FROM pca)) AS embedding FROM standardized";
    let ours = keyed(&rows(&session, sql).await.unwrap());
    let sql = format!(
        "SELECT label, file, features AS embedding FROM '{}'",
        reference("components.parquet").display()
    );
    let theirs = keyed(&rows(&session, &sql).await.unwrap());
    assert_eq!(ours.len(), 480);
    for (key, features) in ours {
        let off = features
            .iter()
            .zip(&theirs[&key])
            .map(|(ours, theirs)| (ours - theirs).abs());
        // The first component's standard deviation is 8; the references are Float32.
        assert!(off.fold(0.0, f64::max) < 1e-4, "{key:?}");
    }
}

#[tokio::test]
async fn the_main_job_on_real_fruits() {
    let Some(real) = real_data() else { return };
    let target = tempfile::tempdir().unwrap();
    success(
        pomona()
            .env("POMONA_MODELS", real.join("models"))
            .args(["-q", "-f", "sql/fruits.sql", "-v", "model=squeezenet1.1", "-v"])
            .arg(format!("source={}/", real.join("data/fruits/Training").display()))
            .arg("-v")
            .arg(format!("target={}/", target.path().display())),
    );

    let session = session();
    let sql = format!(
        "SELECT label, features FROM '{}/features.parquet'",
        target.path().display()
    );
    let written = rows(&session, &sql).await.unwrap();
    let features = vectors(&written, "features");
    assert_eq!(features.len(), 480);
    assert!(features.iter().all(|features| features.len() == 25));
    let mut labels = strings(&written, "label");
    labels.sort();
    labels.dedup();
    assert_eq!(labels.len(), 12);

    // The features' variances are what the components explain. The embeddings are Pomona's own here:
    // where a JPEG decodes one level apart, the variances move by up to a percent.
    for (k, expected) in numbers(&json("components.json")["explained_variance"])
        .into_iter()
        .enumerate()
    {
        let values: Vec<f64> = features.iter().map(|features| features[k]).collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0);
        assert!(
            (variance / expected - 1.0).abs() < 0.02,
            "component {k}: {variance} instead of {expected}"
        );
    }
}
