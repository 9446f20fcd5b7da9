"""xLSTM as Megatron-core modules: blocks, model, parallel layouts, checkpoint names, converters."""

import warnings

# megatron-core announces at import, several times, that TransformerEngine and Apex are absent. Both
# are optional here: nothing for the user to do.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
# It recommends a GPU setting on every process, without a GPU too.
warnings.filterwarnings("ignore", message=".*environment variable .*DEVICE_MAX_CONNECTIONS")
# Its DistributedOptimizer updates views of the parameters, whose .grad it sets itself.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
# torch 2.13 renames collectives that megatron-core calls by the old name.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
