"""Writes a Parquet file of vectors: what the statistics are compared on.

The columns are `id` (Int64) and `v` (FixedSizeList<Float32>). Vectors look like the pooled features
of a network that ends in a ReLU: not negative, correlated, some exactly zero. They are a few hundred
factors whose strength falls with their rank, a level for each feature, and noise. The first rows of a
file are those of any longer one with the same seed. One row group is in memory at a time.

    python make_vectors.py vectors.parquet --rows 67692 --features 2048
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FACTORS = 256
ROW_GROUP_BYTES = 16 << 20  # as Pomona writes them


def blocks(rows, features, seed):
    """Yields arrays of rows x features, a row group each."""
    rng = np.random.default_rng(seed)
    factors = min(FACTORS, features)
    strength = np.arange(1, factors + 1, dtype=np.float32) ** -0.75
    loadings = strength[:, None] * rng.standard_normal((factors, features), dtype=np.float32)
    level = rng.gamma(2.0, 1.0, features).astype(np.float32)
    group = max(1, ROW_GROUP_BYTES // (4 * features))
    for start in range(0, rows, group):
        # Always whole: what is drawn must not depend on how many rows are wanted.
        block = rng.standard_normal((group, factors), dtype=np.float32) @ loadings
        block += level
        block += rng.standard_normal((group, features), dtype=np.float32)
        np.maximum(block, 0.0, out=block)
        yield block[: rows - start]


def write(path, rows, features, seed, compression):
    schema = pa.schema({"id": pa.int64(), "v": pa.list_(pa.float32(), features)})
    written = 0
    # Under its name only when it is whole.
    partial = path.with_name(path.name + ".partial")
    # Hardly any value comes twice: a dictionary would be built to be thrown away.
    with pq.ParquetWriter(partial, schema, compression=compression, use_dictionary=False) as writer:
        for block in blocks(rows, features, seed):
            ids = pa.array(np.arange(written, written + len(block)))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), features)
            writer.write_table(pa.table([ids, vectors], schema=schema), row_group_size=len(block))
            written += len(block)
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description="Writes a Parquet file of vectors.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=67_692)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--seed", type=int, default=20_240_607)
    parser.add_argument("--compression", default="zstd", help="none, snappy, zstd")
    args = parser.parse_args()
    write(args.path, args.rows, args.features, args.seed, args.compression)


if __name__ == "__main__":
    main()
