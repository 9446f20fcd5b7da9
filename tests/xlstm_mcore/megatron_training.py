"""Five steps of Megatron-LM's own trainer on GPTModel with our layers; prints losses and norms.

`python -m tests.xlstm_mcore.megatron_training` needs the newer stack: megatron-core 0.19's wheel
holds `megatron.training`. Its `setup_model_and_optimizer` and `train_step` run as they are:
arguments, DDP, distributed optimizer, learning rate schedule, clipping. What stands between
`megatron.training.pretrain` itself and a machine without CUDA is taken out of the way here, and
none of it computes anything: it asserts CUDA and leaves process groups alone without it, compiles a
data set index builder whose makefile is not in the wheel, builds DDP on a CUDA stream, and keeps
CUDA's random states for reruns.
"""

import contextlib
import json
import os
import sys

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel

from pretrain import layout as layouts
from tests.dist import work
from tests.xlstm_mcore.test_specs import mask_of
from xlstm_mcore.build import make_config
from xlstm_mcore.gpt_specs import gpt_layer_spec, prepare_gpt_model
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.megatron import cpu_runtime

# Megatron-LM decays by the number of dimensions, we by kind: without decay both are the same.
RUN = work.run_config("large", optimizer__weight_decay=0.0)
OPTIONS = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 24
    --max-position-embeddings 24 --position-embedding-type none --transformer-impl local
    --no-persist-layer-norm --no-masked-softmax-fusion --disable-bias-linear
    --no-gradient-accumulation-fusion --use-cpu-initialization
    --micro-batch-size 1 --global-batch-size 4 --train-iters 10 --calculate-per-token-loss
    --lr 1e-2 --lr-decay-style constant --adam-eps 1e-2 --adam-beta1 0.9 --adam-beta2 0.95
    --weight-decay 0 --clip-grad 1.0 --use-distributed-optimizer
    --tokenizer-type NullTokenizer --vocab-size 95
    --distributed-backend gloo --disable-gloo-process-groups --rerun-mode disabled
"""


def start():
    """Megatron-LM's globals, on the CPU."""
    cpu_runtime.activate()
    from megatron.training import arguments, global_vars, initialize, training

    stand_in = cpu_runtime._stand_in()
    stand_in.cuda.Stream = torch.cpu.Stream
    stand_in.cuda.stream = lambda stream: contextlib.nullcontext()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.training") and vars(module).get("torch") is torch:
            module.torch = stand_in
    cpu_runtime._redirect_methods_in("megatron.training.training", None, "get_model")
    initialize._compile_dependencies = lambda: None

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    sys.argv = ["megatron", *OPTIONS.split()]
    parsed = arguments.parse_args()
    arguments.validate_args(parsed)
    global_vars.set_global_variables(parsed, build_tokenizer=False)
    groups = single_process_groups()
    initialize.initialize_megatron(allow_no_cuda=True)
    cpu_runtime.activate()
    return training, groups


def megatrons_steps(steps):
    training, groups = start()
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config

    def provider(pre_process=True, post_process=True, **others):
        config = make_config(RUN.model)
        model = GPTModel(
            config=config,
            transformer_layer_spec=gpt_layer_spec(config),
            vocab_size=config.vocab_size,
            max_sequence_length=RUN.data.seq_len,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="none",
            pg_collection=groups,
        )
        prepare_gpt_model(model, config, RUN.run.seed)
        work.perturb([model])
        return model

    def forward_step(batches, model):
        batch = next(batches)
        output = model(batch.tokens, None, mask_of(batch.boundaries), labels=batch.labels)

        def loss_function(losses):
            total, number = (losses * batch.loss_mask).sum(), batch.loss_mask.sum()
            return total, number.int(), {"lm loss": torch.stack((total.detach(), number))}

        return output, loss_function

    model, optimizer, schedule = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, provider
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    results = []
    for step in range(steps):
        losses, *_, norm, _, _ = training.train_step(
            forward_step,
            RerunDataIterator(iter(work.random_batches(RUN, step))),
            model,
            optimizer,
            schedule,
            config,
            get_forward_backward_func(),
            iteration=step,
        )
        results.append((float(losses["lm loss"]), float(norm)))
    return results


def our_steps(steps):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    engine, layout = work.make_engine(RUN)
    return work.train_steps(engine, layout, RUN, 0, steps)


if __name__ == "__main__":
    theirs = megatrons_steps(5)
    layouts.leave()
    print(json.dumps({"megatron": theirs, "ours": our_steps(5)}))
