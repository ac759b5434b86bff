"""Names from inside lm-eval, which may move in any release (tests/unit/test_internals.py)."""

from sleb_cli.engine.third_party import internals

with internals("lm_eval"):
    from lm_eval import evaluator
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
