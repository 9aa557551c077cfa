"""Time an epoch of NeuralMixture on 100,000 × 32 float32 values and 20 clusters, against MiniBatchKMeans.

    python -m benchmarks.neural_mixture

Both process the same samples once, in batches of the same size, alternately in one process; medians.
"""

import argparse
import functools
import statistics
import time

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_blobs

from fastroute.clustering import NeuralMixture

SETTINGS = {
    "hidden (128, 128), noise": {},
    "hidden (32, 32)": {"hidden": (32, 32), "noise": 0.0},
    "hidden ()": {"hidden": (), "noise": 0.0},
}


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each")
    rounds = parser.parse_args().rounds
    X = make_blobs(100_000, n_features=32, centers=20, random_state=0)[0].astype(np.float32)
    print("batch  network                     s   MiniBatchKMeans s   ratio")
    for batch_size in (128, 1024):
        for name, options in SETTINGS.items():
            # One epoch each; the mixture's by the loop of `fit`, without its setup and final steps.
            model = NeuralMixture(20, batch_size=batch_size, random_state=0, epochs=0, n_init=1, **options).fit(
                X[:1000]
            )
            means = MiniBatchKMeans(20, batch_size=batch_size, n_init=1, random_state=0).fit(X[:1000])

            def pass_of_means(means=means, batch_size=batch_size):
                for part in np.array_split(X, len(X) // batch_size):
                    means.partial_fit(part)

            epoch = functools.partial(model._model.train_epoch, X)
            times = [(seconds(epoch), seconds(pass_of_means)) for _ in range(rounds)]
            ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{batch_size:5}  {name:24} {ours:6.2f} {theirs:16.2f} {ours / theirs:10.2f}", flush=True)


if __name__ == "__main__":
    main()
