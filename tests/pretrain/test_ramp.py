"""The batch-size ramp in closed form, against counting."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.ramp import BatchRamp


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), max_size=5),
    st.integers(1, 50),
)
def test_steps_and_samples_agree_with_counting(stages, final):
    ramp = BatchRamp(final, stages)
    sizes = [size for steps, size in stages for _ in range(steps)] + [final] * 20
    consumed = 0
    for step, size in enumerate(sizes):
        assert ramp.size(step) == size and ramp.samples(step) == consumed
        assert ramp.step(consumed) == step
        if size > 1:
            assert ramp.step(consumed + size - 1) == step
        consumed += size


def test_a_ramp_costs_nothing_far_out():
    ramp = BatchRamp(100, [(10, 10), (10, 50)])
    assert ramp.samples(10**12 + 20) == 600 + 10**14
    assert ramp.step(600 + 10**14) == 10**12 + 20
