"""What the pruned model says is shown where a search ends, and in the model card."""

import pytest

from conftest import gpt2_config, save_model
from sleb_cli.engine.quality.sample_generation import PROMPT
from sleb_cli.plan import read_plan


@pytest.fixture
def searched(search, shared_data):
    """Search for all but the protected blocks of a trained model, which then only stutters."""
    return search("--remove", 3, "--sample-tokens", 48, model=shared_data / "models" / "stories260K")


def test_a_collapse_is_shown_and_warned_of(searched, tmp_path):
    plan = read_plan(tmp_path / "plan.json")
    assert plan.sample_generation.is_repetitive
    assert plan.sample_generation.pruned_repetition > 0.4
    assert f'both models continue "{PROMPT}"' in searched.stdout
    assert f"pruned ({plan.sample_generation.pruned_repetition:.0%} repeated): " in searched.stdout
    assert " ".join(plan.sample_generation.dense.split())[:60] in searched.stdout
    assert "The pruned model repeats itself" in searched.stdout


def test_the_model_card_lets_both_speak(searched, run_sleb, tmp_path):
    assert run_sleb("apply", "-o", "three").exit_code == 0
    card = (tmp_path / "three" / "README.md").read_text()
    said = read_plan(tmp_path / "plan.json").sample_generation
    assert "**The pruned model repeats itself: " in card
    for text in (said.dense, said.pruned):
        assert " ".join(text.split()).replace("`", "'") in card
    # Of a model that was not heard, nothing is said.
    assert run_sleb("apply", "--remove", 1, "-o", "one").exit_code == 0
    assert PROMPT not in (tmp_path / "one" / "README.md").read_text()


def test_it_is_the_same_each_time(found):
    first, second = (found("--remove", 2).sample_generation for _ in range(2))
    assert first == second
    assert first.new_tokens == 6


def test_a_model_with_few_positions_is_searched_without_it(search, tmp_path):
    folder = save_model(tmp_path / "short", gpt2_config(3, n_positions=16))
    assert "No sample text is shown" in search("--remove", 1, "--sequence-length", 16, model=folder).stderr
    assert read_plan(tmp_path / "plan.json").sample_generation is None
