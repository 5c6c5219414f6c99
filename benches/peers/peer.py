"""What all image peers in Python have in common: their arguments, the clock, what they print."""

import argparse
import json
from pathlib import Path
from time import perf_counter

# In the target: what the chain makes, and what the embeddings are compared by.
FEATURES, EMBEDDINGS = "features.parquet", "embeddings.parquet"


def arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", type=Path, help="a folder of JPEGs; the folder that holds one is its label")
    parser.add_argument("model", type=Path, help="the network")
    parser.add_argument("target", type=Path, help="the folder that is written to")
    parser.add_argument("--components", type=int, default=25)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    return parser


class Stopwatch:
    """Takes the seconds of one stage after the other."""

    def __init__(self):
        self.seconds = {}
        self.before = perf_counter()

    def lap(self, stage):
        now = perf_counter()
        self.seconds[stage] = now - self.before
        self.before = now

    def report(self, version):
        """Prints the stages of the chain, and the seconds after its last one: those of the check."""
        print(json.dumps({"version": version, "seconds": self.seconds, "check": perf_counter() - self.before}))
