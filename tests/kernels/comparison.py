"""Compares kernels with the float64 recurrence: values, states and gradients."""

import torch

VALUE_LIMIT, GRAD_LIMIT = 5e-6, 2e-5
RECURRENCE_FACTOR = 8  # a float32 kernel may err this much more than the float32 recurrence


def relative_error(x, reference):
    """Largest error as a fraction of the largest reference value; infinite if x is not finite."""
    if not x.isfinite().all():
        return float("inf")
    error = (x.double() - reference.double()).abs().max().item()
    largest = reference.double().abs().max().item()
    return error / largest if largest > 0 else error


def run(function, inputs, dtype, **options):
    """Outputs and gradients of `function` as a dict, on copies of `inputs` in `dtype`.

    `inputs` maps names to tensors; `function(inputs, **options)` returns a dict of outputs. The
    loss is a fixed random combination of all outputs but m.
    """
    inputs = {name: x.detach().clone().to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = function(inputs, **options)
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for name, x in outputs.items():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if name != "m":
            loss = loss + (x * weight.to(x.dtype)).sum()
    names = [name for name in inputs if name != "m0"]
    grads = torch.autograd.grad(
        loss, [inputs[name] for name in names], allow_unused=True, materialize_grads=True
    )
    values = {name: x.detach() for name, x in outputs.items()}
    return values | {f"d_{name}": grad for name, grad in zip(names, grads, strict=True)}


def assert_float32_close(kernel, recurrence, inputs, **options):
    """The float32 kernel is as good as the project's limits demand, in values and gradients."""
    exact = run(recurrence, inputs, torch.float64, **options)
    plain = run(recurrence, inputs, torch.float32, **options)
    got = run(kernel, inputs, torch.float32, **options)
    assert got.keys() == exact.keys()
    for name, reference in exact.items():
        floor = GRAD_LIMIT if name.startswith("d_") else VALUE_LIMIT
        limit = max(floor, RECURRENCE_FACTOR * relative_error(plain[name], reference))
        error = relative_error(got[name], reference)
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.2e}"


def assert_same(got, expected, limit=1e-11):
    """Two results of `run` in float64 agree to rounding."""
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        error = relative_error(got[name], reference)
        assert error <= limit, f"{name}: error {error:.2e} above {limit:.0e}"
