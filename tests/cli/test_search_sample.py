"""What the pruned model says is shown where a search ends, and in the model card."""

from conftest import gpt2_config, save_model
from sleb_cli.engine.quality.sample_generation import PROMPT
from sleb_cli.plan import read_plan


def test_a_collapse_is_shown_and_in_the_model_card(search, sleb, shared_data, tmp_path):
    """A trained model without all but the protected blocks only stutters."""
    shown = search(
        "--remove 3 --sample-tokens 48", model=shared_data / "models" / "stories260K"
    ).stdout
    said = read_plan(tmp_path / "plan.json").sample_generation
    assert said.pruned_repetition > 0.4
    assert f'both models continue "{PROMPT}"' in shown
    assert f"pruned ({said.pruned_repetition:.0%} repeated): " in shown
    assert " ".join(said.dense.split())[:60] in shown
    assert "The pruned model repeats itself" in shown
    assert shown.endswith(
        "wrote plan.json; next, with fewer blocks removed: sleb apply plan.json --remove 1\n"
    )
    sleb("apply -o three")
    card = (tmp_path / "three" / "README.md").read_text()
    assert "**The pruned model repeats itself: " in card
    for text in (said.dense, said.pruned):
        assert " ".join(text.split()).replace("`", "'") in card
    # Of a model that was not heard, nothing is said.
    sleb("apply --remove 1 -o one")
    assert PROMPT not in (tmp_path / "one" / "README.md").read_text()


def test_a_model_with_few_positions_is_searched_without_it(search, tmp_path):
    folder = save_model(tmp_path / "short", gpt2_config(3, n_positions=16))
    assert (
        "No sample text is shown" in search("--remove 1 --sequence-length 16", model=folder).stderr
    )
    assert read_plan(tmp_path / "plan.json").sample_generation is None
