"""A rehearsal passes for a sound run and finds every planted fault."""

import json
import subprocess
from pathlib import Path

import pytest

from pretrain.commands.before_run.rehearse import chosen_ranks
from pretrain.config import ConfigError
from pretrain.rehearsal.gpus import gpu_named
from tests.dist import work
from tests.dist.needs import needs_deepspeed

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results(warm_python):
    done = subprocess.run(
        [warm_python.executable, "-m", "tests.pretrain.rehearsal.cases"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture
def faults(results):
    return results["faults"]


def test_a_sound_run_has_no_mismatch(faults):
    assert faults["sound"] == [] and faults["waits"] == []
    assert faults["running"] == 0, "the ends of all messages are waited for"
    assert "no mismatch" in faults["text"] and "for the verdict" in faults["text"]


def test_everything_can_be_written_as_json(faults):
    assert faults["json"] > 10_000


def test_a_collective_of_one_rank_is_found_with_both_stacks(faults):
    first = faults["one_sided_collective"][0]
    assert "rank 0 and rank 5" in first and first.count("train_step") == 2


def test_a_collective_in_the_wrong_group_is_found(faults):
    found = faults["wrong_group"]
    assert any("TENSOR_MODEL_PARALLEL" in text and "rank 2" in text for text in found)
    assert any("PIPELINE_MODEL_PARALLEL" in text and "nothing more" in text for text in found)


def test_a_missing_receive_is_found(faults):
    (text,) = [t for t in faults["missing_receive"] if "from rank 0 to rank 4" in t]
    assert "send" in text and "rank 4" in text


def test_groups_in_different_order_are_found(faults):
    (text,) = faults["other_order_of_groups"]
    assert "different order" in text


def test_a_forgotten_wait_is_found_with_its_place(faults):
    ((what, place, count),) = faults["forgotten_wait"]
    assert "value of a tensor" in what and "read_norm" in place and count == 1


@pytest.mark.parametrize(
    "way", ["2 receive first", "2 send first", "3 receive first", "3 send first"]
)
def test_a_ring_of_single_messages_is_found_with_its_place(faults, way):
    (text,) = faults["rings"][way]
    assert "they wait for each other" in text and text.count("send of 16 bytes") >= int(way[0])
    assert "rank 0: " in text and "rank 1: " in text and "faults.py" in text


def test_messages_that_do_not_wait_for_each_other_pass(faults):
    assert faults["rings"]["batch"] == []
    assert faults["schedules"] == {"interleaved": [], "context": []}


def test_waits_of_megatron_itself_are_found(faults):
    assert {what for what, _ in faults["waits_of_messages"]} == {"all streams"}
    assert all("p2p_communication.py" in place for _, place in faults["waits_of_messages"])


def test_the_check_of_replicas_is_played(faults):
    assert {"all_gather", "all_gather_object", "send", "receive"} <= {*faults["replica_check"]}


def test_buffers_of_graphs_are_counted_once_for_all_layers(faults):
    """128 steps in bf16: gates, h, what is kept for the backward pass, weights and states."""
    width = 4 * 272
    tokens, state, weight = 2 * 128, 4 * 2 * width, 2 * 4 * 4 * 272 * 272
    both = tokens * (2 * 2 * (4 + 1 + 4) * width + 2 * 4 * 3 * width + 2)
    forward, backward = weight + 2 * 4 * width + 5 * state, weight + 3 * state
    assert faults["forms"] == {"graphs": both + forward + backward, "persistent": 0}


def test_gradients_summed_in_bf16_send_half_the_bytes(faults):
    wide, narrow = faults["gradient_bytes"]
    assert narrow == wide / 2 > 0


def test_ranks_of_a_matrix_agree_on_what_muon_gathers(faults):
    assert faults["muon"] == []


def test_a_start_is_counted_from_a_rehearsed_rank(faults):
    start = faults["start"]
    assert start["imports"] == 2 and start["plan and first batch"] == 0.5
    assert start["rendezvous and process groups"] > 8 * 25 * 1e-3 and start["NCCL"] >= 4
    assert start["text"].count("goal 60 s: reached") == 2
    # Values are drawn and kernels compiled at the first start; later ones read a checkpoint.
    only_first = start["initial values"] + start["kernels"]
    assert start["first"] - start["later"] == pytest.approx(only_first - start["checkpoint"])


def test_a_slice_that_two_ranks_save_is_found(faults):
    assert any("overlaps" in text for text in faults["everybody_owns"])


def test_a_slice_that_nobody_saves_is_found_when_all_ranks_are_there(faults):
    all_ranks, some = faults["a rank missing"]
    assert all_ranks > 0 and some == 0


@needs_deepspeed
@pytest.mark.parametrize("stage", ["stage 1", "stage 2", "stage 3"])
def test_the_engine_of_deepspeed_is_rehearsed_at_every_stage(results, stage):
    found = results["deepspeed"]["stages"][stage]
    assert found["mismatches"] == []
    assert {"build", "step 1", "step 2", "evaluation", "step 3"} <= {*found["phases"]}
    # One replica of two pipeline stages, or two replicas of one.
    exchange = "send" if stage == "stage 1" else "all_gather"
    assert {"all_reduce", exchange} <= {*found["operations"]}
    # DeepSpeed reads the norm by itself, once to judge it and once to clip with it.
    assert any("is_invalid_grad_norm" in place for _, place in found["waits"])
    assert f"ZeRO {stage}" in found["text"] and "no mismatch" in found["text"]


@needs_deepspeed
def test_zero_shares_out_what_each_stage_says(results):
    """Weights in bf16; master weight and two moments in fp32, over two replicas."""
    stages = results["deepspeed"]["stages"]
    plain, gradients, weights = (stages[f"stage {stage}"]["held"] for stage in (1, 2, 3))
    # One replica of two pipeline stages: nothing is shared out.
    assert plain["optimizer state"] == pytest.approx(12 / 2 * plain["weights"], rel=0.01)
    assert plain["gradients"] == pytest.approx(4 / 2 * plain["weights"], rel=0.01)
    shared = gradients["optimizer state"] / gradients["weights"]
    assert shared == pytest.approx(12 / 2 / 2, rel=0.01)
    # Small weights stay whole at stage 3, beside this rank's partition of them.
    assert weights["optimizer state"] / weights["weights"] == pytest.approx(12 / 2, rel=0.1)


@needs_deepspeed
def test_a_replica_that_loads_no_weight_holds_them_all(results):
    first, last = results["deepspeed"]["many"]
    assert first["weights"] == last["weights"] > 0


@needs_deepspeed
def test_an_offloaded_optimizer_works_beside_a_device(results):
    """The norm of gradients in host memory is judged on the device, and clips them on the host."""
    found = results["deepspeed"]["offloaded"]
    assert "optimizer state" not in found["held"] and found["steps"] >= 5


@needs_deepspeed
def test_faults_in_the_engine_of_deepspeed_are_found(results):
    found = results["deepspeed"]["faults"]
    (text,) = found["a sum that one rank alone asks for"]
    assert "rank 0 and rank 1" in text and "norm_and_sum" in text
    assert any("overlaps" in text for text in found["a slice that two ranks save"])


@needs_deepspeed
def test_gradients_of_deepspeed_that_are_summed_in_the_wrong_group_are_found(results):
    found = results["deepspeed"]["faults"]["gradients that one rank sums in another group"]
    assert any("rank 0 and rank 1" in text and "DATA_PARALLEL" in text for text in found)


@needs_deepspeed
def test_a_loss_of_deepspeed_that_is_summed_in_the_wrong_group_is_found(results):
    found = results["deepspeed"]["faults"]["a loss that one rank sums in another group"]
    assert any("PIPELINE_MODEL_PARALLEL" in text and "nothing more" in text for text in found)


@needs_deepspeed
def test_a_message_that_deepspeed_does_not_receive_is_found(results):
    found = results["deepspeed"]["faults"]["a message that is not received"]
    (text,) = [text for text in found if "from rank 0 to rank 1" in text]
    assert "send" in text and "rank 1" in text


@needs_deepspeed
def test_a_wait_that_was_left_in_the_engine_of_deepspeed_is_found(results):
    ((what, place),) = results["deepspeed"]["faults"]["a wait that was left there"]
    assert "value of a tensor" in what and "read_norm" in place


def test_corners_are_all_places_of_the_first_and_last_replica():
    config = work.run_config("large", layout__tensor=2, layout__pipeline=2, data__global_batch=64)
    assert chosen_ranks(config, 64, "corners") == [0, 1, 30, 31, 32, 33, 62, 63]
    assert chosen_ranks(config, 64, "3, 1,1") == [1, 3]
    assert len(chosen_ranks(config, 64, "all")) == 64


@pytest.mark.parametrize("text", ["64", "first", "1,-2", ""])
def test_ranks_that_are_not_there_are_an_error(text):
    config = work.run_config("large", data__global_batch=64)
    with pytest.raises(ConfigError, match="--ranks"):
        chosen_ranks(config, 64, text)


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(ConfigError, match="h100"):
        gpu_named("v100")
