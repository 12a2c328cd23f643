"""The damping study: a deep linear network on MNIST, every damping tuned alike."""
