"""Cluster the rows of a matrix by NeuralMixture, a scikit-learn estimator, and by k-means."""

from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from fastroute.clustering import NeuralMixture, cluster_accuracy


def main() -> dict[str, float]:
    X, y = load_digits(return_X_y=True)  # the labels only judge the result
    estimators = {
        "k-means": KMeans(10, n_init=3, random_state=0),
        "NeuralMixture": NeuralMixture(10, n_init=1, epochs=15, random_state=0),
    }
    accuracies = {name: cluster_accuracy(y, estimator.fit_predict(X)) for name, estimator in estimators.items()}
    for name, accuracy in accuracies.items():
        print(f"{name}: accuracy {accuracy:.3f}")

    mixture = estimators["NeuralMixture"]
    probabilities = mixture.predict_proba(X[:5])  # posteriors, also of samples that it has not seen
    print(f"weights of the clusters: {mixture.priors_.round(2)}")
    print(
        f"the first five samples belong to {probabilities.argmax(1)}, with probability {probabilities.max(1).round(2)}"
    )
    return accuracies


if __name__ == "__main__":
    main()
