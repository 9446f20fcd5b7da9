"""What an H100 can do at most, for bounds that are counted. No number here was measured here."""

BANDWIDTH = 3.35e12  # bytes a second of its memory
BF16_PRODUCTS = 742e12  # operations a second that large products of bf16 matrices reach in practice
FP32_PRODUCTS = 50e12  # the same of fp32 matrices, which tensor cores do not take
CELL_FACTOR = 2.5  # published chunkwise kernels take 1.8 to 5.2 times their counted bound
