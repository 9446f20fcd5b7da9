"""What a cross entropy needs of logits: sums over the vocabulary, and their gradient."""

from xlstm_kernels.cross_entropy.cross_entropy import softmax_gradient, softmax_statistics

__all__ = ["softmax_gradient", "softmax_statistics"]
