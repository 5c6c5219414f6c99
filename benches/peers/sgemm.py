"""Measures how fast the processor multiplies matrices of Float32, with the BLAS that NumPy brings.

    OPENBLAS_NUM_THREADS=1 python sgemm.py --threads 2     # two multiplications at once, a thread each

Prints one line of JSON: GFLOP/s of all threads together.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np


def main():
    parser = argparse.ArgumentParser(description="Measures how fast matrices are multiplied.")
    parser.add_argument("--size", type=int, default=3_072)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1, help="how many multiplications run at once")
    args = parser.parse_args()

    def multiply(seed):
        """GFLOP/s of one multiplication after the other."""
        a, b = np.random.default_rng(seed).standard_normal((2, args.size, args.size), dtype=np.float32)
        product = a @ b
        started, count = perf_counter(), 0
        while perf_counter() - started < args.seconds:
            np.matmul(a, b, out=product)
            count += 1
        return count * 2e-9 * args.size**3 / (perf_counter() - started)

    with ThreadPoolExecutor(args.threads) as pool:
        print(json.dumps({"gflops": sum(pool.map(multiply, range(args.threads)))}))


if __name__ == "__main__":
    main()
