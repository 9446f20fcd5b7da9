"""This project's Hugging Face class, registered with transformers' auto classes on import.

After `import xlstm_mcore.hf`, `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer`
load an export without running code from the folder. The files beside this one are the same that
travel with an export, and they import nothing else of this project.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from xlstm_mcore.hf.configuration_xlstm_blocks import XLSTMBlocksConfig
from xlstm_mcore.hf.modeling_xlstm_blocks import XLSTMBlocksForCausalLM, XLSTMBlocksModel
from xlstm_mcore.hf.tokenization_xlstm_blocks import XLSTMSentencePieceTokenizer

__all__ = [
    "XLSTMBlocksConfig",
    "XLSTMBlocksForCausalLM",
    "XLSTMBlocksModel",
    "XLSTMSentencePieceTokenizer",
]

AutoConfig.register(XLSTMBlocksConfig.model_type, XLSTMBlocksConfig)
AutoModel.register(XLSTMBlocksConfig, XLSTMBlocksModel)
AutoModelForCausalLM.register(XLSTMBlocksConfig, XLSTMBlocksForCausalLM)
AutoTokenizer.register(XLSTMBlocksConfig, XLSTMSentencePieceTokenizer)
