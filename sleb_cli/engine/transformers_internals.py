"""Names from inside transformers, which may move in any release (tests/unit/test_internals.py)."""

from functools import partial
from inspect import signature

from sleb_cli.engine.third_party import internals

with internals("transformers"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        convert_and_load_state_dict_in_model,
        revert_weight_conversion,
    )
    from transformers.generation import BaseStreamer
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.pytorch_utils import Conv1D

try:
    from transformers.integrations.gguf import get_gguf_tokenizer
except ImportError:  # before versions that read the tokens apart
    get_gguf_tokenizer = None

# before transformers 5.16
if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters:
    convert_and_load_state_dict_in_model = partial(
        convert_and_load_state_dict_in_model, tp_plan=None
    )
