"""Cluster nested rings, which differ only in connectivity, by NeuralMixture on features of a neighbour graph."""

from sklearn.datasets import make_circles
from sklearn.manifold import SpectralEmbedding

from fastroute.clustering import NeuralMixture, cluster_accuracy


def main() -> dict[str, float]:
    X, y = make_circles(1000, factor=0.5, noise=0.05, random_state=0)  # the labels only judge the result
    # Samples that a chain of neighbours joins get nearly the same features: each ring becomes a point.
    embedding = SpectralEmbedding(2, affinity="rbf", gamma=50, random_state=0)
    inputs = {"the points": X, "spectral features": embedding.fit_transform(X)}
    accuracies = {}
    for name, features in inputs.items():
        labels = NeuralMixture(2, n_init=1, epochs=15, random_state=0).fit_predict(features)
        accuracies[name] = cluster_accuracy(y, labels)
        print(f"clusters of {name}: accuracy {accuracies[name]:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
