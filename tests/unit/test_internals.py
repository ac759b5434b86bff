"""What we take from inside other packages is where we look for it, and takes what we give it."""

import ast
import importlib
import inspect
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn

import sleb_cli
from sleb_plugins import MachineError

ADAPTERS = {"transformers": "transformers_internals", "lm_eval": "lm_eval_internals"}
ENGINE = Path(sleb_cli.__file__).parent / "engine"
TAKEN = [
    # The module, the name in it, and with what it is called: how many by position, and which by name.
    ("accelerate.hooks", "AlignDevicesHook", 0, "execution_device offload weights_map"),
    ("accelerate.hooks", "AlignDevicesHook.post_forward", 3),
    ("accelerate.hooks", "AlignDevicesHook.pre_forward", 2),
    ("accelerate.utils", "PrefixedDataset", 0, "dataset prefix"),
    ("huggingface_hub.utils", "validate_repo_id", 1),
    ("lm_eval.evaluator", "add_env_info", 1),
    ("lm_eval.evaluator", "get_git_commit_hash", 0),
    ("lm_eval.evaluator", "simple_evaluate", 0, """model tasks task_manager limit bootstrap_iters apply_chat_template
     fewshot_as_multiturn confirm_run_unsafe_code"""),
    ("lm_eval.models.huggingface", "HFLM", 0, "pretrained tokenizer batch_size"),
    ("lm_eval.models.huggingface", "HFLM._loglikelihood_tokens", 2, "disable_tqdm override_bs"),
    ("lm_eval.models.huggingface", "HFLM._model_generate", 4, "attention_mask"),
    ("lm_eval.models.huggingface", "HFLM.chat_template", 2),
    ("lm_eval.models.huggingface", "HFLM.max_length"),
    ("lm_eval.models.utils", "normalize_gen_kwargs", 1),
    ("lm_eval.models.utils_hf", "stop_sequences_criteria", 4),
    ("lm_eval.tasks", "TaskManager", 0, "include_path include_defaults"),
    ("lm_eval.tasks", "TaskManager.all_subtasks"),
    ("lm_eval.tasks", "TaskManager.all_tasks"),
    ("lm_eval.tasks", "TaskManager.load", 2),
    ("lm_eval.utils", "handle_non_serializable", 1),
    ("transformers", "CompileConfig._compile_all_devices"),
    ("transformers", "PreTrainedConfig._attn_implementation"),
    ("transformers.conversion_mapping", "get_model_conversion_mapping", 1),
    ("transformers.core_model_loading", "WeightConverter"),
    ("transformers.core_model_loading", "revert_weight_conversion", 2),
    ("transformers.generation", "BaseStreamer.end", 1),
    ("transformers.generation", "BaseStreamer.put", 2),
    ("transformers.modeling_gguf_pytorch_utils", "GGUF_SUPPORTED_ARCHITECTURES"),
    ("transformers.modeling_utils", "LoadStateDictConfig", 0, "device_map dtype dtype_plan weight_mapping"),
    ("transformers.modeling_utils", "PreTrainedModel._finalize_model_loading", 3),
    ("transformers.modeling_utils", "PreTrainedModel._get_dtype_plan", 2),
    ("transformers.pytorch_utils", "Conv1D"),
    ("sleb_cli.engine.transformers_internals", "convert_and_load_state_dict_in_model", 3),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "given"), [(module, name, given) for module, name, *given in TAKEN])
def test_what_we_take_is_still_there(module, name, given):
    package = module.partition(".")[0]
    where = f"{package} {version('sleb' if package == 'sleb_cli' else package)} has moved or changed {module}.{name}"
    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{where}: there is no {part}"
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    if given:
        by_name = dict.fromkeys(" ".join(given[1:]).split())
        try:
            inspect.signature(getattr(found, "__func__", found)).bind(*[None] * given[0], **by_name)
        except TypeError as error:
            pytest.fail(f"{where}: {error}")


def test_accelerate_leaves_its_hook_and_what_it_replaced_at_a_module():
    hooks = importlib.import_module("accelerate.hooks")
    module = hooks.add_hook_to_module(nn.Linear(1, 1), hooks.AlignDevicesHook(offload=True))
    for name in ("_hf_hook", "_old_forward"):
        assert hasattr(module, name), f"accelerate {version('accelerate')} has no {name} on a module with a hook"


@pytest.mark.parametrize("package", ADAPTERS)
def test_only_its_adapter_takes_names_from_inside_a_package(package):
    taken = {
        (path.stem, f"{node.module}.{alias.name}")
        for path in ENGINE.parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}.")
        for alias in node.names
        if package == "lm_eval" or node.module != package
    }
    assert {path for path, _ in taken} == {ADAPTERS[package]}
    in_table = {f"{module}.{name}" for module, name, *_ in TAKEN}
    missing = [name for _, name in taken if not any(f"{each}.".startswith(f"{name}.") for each in in_table)]
    assert {name.rpartition(".")[2] for name in missing} <= {
        "convert_and_load_state_dict_in_model",
        "get_gguf_tokenizer",
    }


def test_a_name_that_has_moved_is_an_error_of_the_machine(monkeypatch):
    adapter = f"sleb_cli.engine.{ADAPTERS['transformers']}"
    monkeypatch.delattr("transformers.modeling_utils.LoadStateDictConfig")
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    said = f"This sleb does not know transformers {version('transformers')}: cannot import name 'LoadStateDictConfig'"
    with pytest.raises(MachineError, match=re.escape(said)):
        importlib.import_module(adapter)
