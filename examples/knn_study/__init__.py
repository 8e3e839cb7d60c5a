"""The parts of examples/cifar10_knn.py."""
