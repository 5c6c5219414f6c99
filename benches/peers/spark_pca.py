"""The statistics in Spark MLlib, as the study's chain has them: Parquet to Parquet.

Prints one line of JSON: seconds by stage, shares of the variance (MLlib gives no explained variances).

    python spark_pca.py vectors.parquet --cores 2
"""

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

STARTED = perf_counter()  # importing what follows is the start of the process, and told apart

from pyspark.ml.feature import PCA, StandardScaler
from pyspark.ml.functions import array_to_vector
from pyspark.sql import SparkSession


def main():
    parser = argparse.ArgumentParser(description="Standardizes vectors and reduces them, with Spark MLlib.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--components", type=int, default=25)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory", default="4g", help="the most that the JVM's heap may have")
    args = parser.parse_args()

    spark = (
        SparkSession.builder.master(f"local[{args.cores}]")
        .config("spark.driver.memory", args.memory)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    seconds = {}
    before = perf_counter()
    seconds["start"] = before - STARTED

    def lap(stage):
        nonlocal before
        now = perf_counter()
        seconds[stage] = now - before
        before = now

    rows = spark.read.parquet(str(args.path.resolve()))
    vectors = rows.select("id", array_to_vector("v").alias("v"))
    scaler = StandardScaler(withMean=True, withStd=True, inputCol="v", outputCol="standardized").fit(vectors)
    lap("standardize_fit")
    standardized = scaler.transform(vectors)
    pca = PCA(k=args.components, inputCol="standardized", outputCol="features").fit(standardized)
    lap("pca_fit")
    with tempfile.TemporaryDirectory() as folder:
        pca.transform(standardized).select("id", "features").write.parquet(f"{folder}/features")
        lap("pca_transform")
        count = spark.read.parquet(f"{folder}/features").count()

    # As MLlib chooses: JNIBLAS is a native library, VectorBLAS is Java's.
    blas = spark._jvm.dev.ludovic.netlib.blas.BLAS.getInstance().getClass().getSimpleName()
    result = {
        "version": f"Spark {spark.version}, Java {spark._jvm.System.getProperty('java.version')}, {blas}",
        "seconds": seconds,
        "count": count,
        "explained_variance_ratio": pca.explainedVariance.toArray().tolist(),
    }
    spark.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
