"""This project's Hugging Face class, registered with transformers' auto classes on import.

After `import xlstm_mcore.hf`, `AutoModelForCausalLM.from_pretrained(folder)` loads an export of
mixed blocks without running code from the folder. The two files beside this one are the same that
travel with an export, and they import nothing else of this project.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xlstm_mcore.hf.configuration_xlstm_blocks import XLSTMBlocksConfig
from xlstm_mcore.hf.modeling_xlstm_blocks import XLSTMBlocksForCausalLM, XLSTMBlocksModel

__all__ = ["XLSTMBlocksConfig", "XLSTMBlocksForCausalLM", "XLSTMBlocksModel"]

AutoConfig.register(XLSTMBlocksConfig.model_type, XLSTMBlocksConfig)
AutoModel.register(XLSTMBlocksConfig, XLSTMBlocksModel)
AutoModelForCausalLM.register(XLSTMBlocksConfig, XLSTMBlocksForCausalLM)
