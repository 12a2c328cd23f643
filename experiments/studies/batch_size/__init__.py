"""The batch-size study: tuned optimisers, LeNet-5 on CIFAR-10."""
