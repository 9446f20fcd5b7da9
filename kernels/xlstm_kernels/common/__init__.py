"""What all kernels share: the choice of a backend, checks of arguments, launching."""
