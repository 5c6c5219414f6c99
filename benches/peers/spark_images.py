"""The images in the study's chain: PySpark, Pillow, Keras's ResNet50 without its top, Spark MLlib.

    python spark_images.py images/ models/resnet50.keras output/ --cores 2

As the study has it, a Pandas function loads the network when it starts, inside of the query. To the chain's good,
there is one partition for each core, so that the network is loaded once there; each has one thread of TensorFlow;
the embeddings are cached. Prints one line of JSON: seconds by stage.
"""

import io
import os
import sys
from importlib.metadata import version
from typing import Iterator

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["PYSPARK_PYTHON"] = sys.executable

import numpy as np
import pandas as pd
import peer
from PIL import Image
from pyspark.ml.feature import PCA, StandardScaler
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.sql import SparkSession
from pyspark.sql.functions import element_at, pandas_udf, split

SIDE = 224


def featurizer(path, rows):
    """The function from encoded images to embeddings, with the network of a file."""

    def pixels(content):
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32)

    def featurize(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        from keras.applications.resnet50 import preprocess_input
        from keras.models import load_model

        model = load_model(path, compile=False)
        for contents in batches:
            batch = preprocess_input(np.stack(contents.map(pixels)))
            yield pd.Series(list(model.predict(batch, batch_size=rows, verbose=0)))

    return pandas_udf(featurize, "array<float>")


def main():
    parser = peer.arguments("Embeds images with Keras in Spark and reduces the embeddings.")
    parser.add_argument("--memory", default="4g", help="the most that the JVM's heap may have")
    args = parser.parse_args()
    spark = (
        SparkSession.builder.master(f"local[{args.cores}]")
        .config("spark.driver.memory", args.memory)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 4 * args.batch)
        .getOrCreate()
    )

    watch = peer.Stopwatch()
    images = (
        spark.read.format("binaryFile")
        .option("pathGlobFilter", "*.jpg")
        .option("recursiveFileLookup", "true")
        .load(str(args.images.resolve()))
    )
    featurize = featurizer(str(args.model), args.batch)
    label = element_at(split("path", "/"), -2)
    embedded = (
        images.repartition(args.cores)
        .select("path", label.alias("label"), array_to_vector(featurize("content")).alias("embedding"))
        .cache()
    )
    embedded.count()
    watch.lap("embed")
    scaler = StandardScaler(withMean=True, withStd=True, inputCol="embedding", outputCol="standardized").fit(embedded)
    standardized = scaler.transform(embedded)
    pca = PCA(k=args.components, inputCol="standardized", outputCol="components").fit(standardized)
    watch.lap("statistics")
    features = pca.transform(standardized).select("path", "label", vector_to_array("components").alias("features"))
    features.write.parquet(str(args.target / peer.FEATURES))
    watch.lap("write")
    embeddings = embedded.select("path", "label", vector_to_array("embedding", "float32").alias("features"))
    embeddings.write.parquet(str(args.target / peer.EMBEDDINGS))
    java = spark._jvm.System.getProperty("java.version")
    tensorflow = version("tensorflow_cpu")
    watch.report(f"Spark {spark.version}, Java {java}, Keras {version('keras')}, TensorFlow {tensorflow}")
    spark.stop()


if __name__ == "__main__":
    main()
