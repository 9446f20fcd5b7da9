"""What this package needs of megatron-core beyond its public interface."""
