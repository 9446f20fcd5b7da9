"""Every Triton launch of the kernels, described so that it can be compiled without a GPU.

`variant` says what is known of one launch before it runs. The other modules list
the launches of their kernel at the sizes of the papers' models and at awkward sizes. They call the
planning functions of `xlstm_kernels` with tensors of the meta device, so that grids, tiles and
arguments are those of a real launch.
"""

import importlib

from benchmarks.kernel_variants.variant import TARGETS, Variant

MODULE = "benchmarks.kernel_variants"


def triton_variants(target: str) -> list[Variant]:
    """The variants of all kernels for one of `TARGETS`. Imports Triton."""
    from benchmarks.kernel_variants import (
        conv,
        cross_entropy,
        feed_forward,
        mlstm,
        norm,
        qkv,
        slstm,
    )

    modules = (conv, cross_entropy, feed_forward, mlstm, norm, qkv, slstm)
    return [one for module in modules for one in module.triton_variants(target)]


def find_variants(target: str, module: str = MODULE) -> list[Variant]:
    """What the function `triton_variants` of a module gives for one of `TARGETS`.

    Raises:
        ValueError: For an unknown target, and for two variants of one name.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known; use one of {', '.join(TARGETS)}")
    variants = importlib.import_module(module).triton_variants(target)
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two variants are called {twice[0]!r}; give each its own name")
    return variants
