"""Scores by token against plain arithmetic on whole logits."""

import pytest
import torch
from torch.nn.functional import kl_div

from conftest import llama_config, random_model
from sleb_cli.engine.forward.predictions import predict_together
from sleb_cli.engine.forward.skipping import SkippableModel
from sleb_cli.engine.quality.token_scores import divergence_record, score_tokens

IDS = torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[True, False], ids=["fork", "whole passes"])
def scored(request):
    """A model and the same without block 2 on random tokens: log-probabilities, and the scores of
    both.
    """
    model = random_model(llama_config())
    with torch.inference_mode(), SkippableModel(model, model.model.layers) as skippable:
        log_p = [skippable.logits(IDS, removed)[:, :-1].log_softmax(-1) for removed in ((), (2,))]
        (predicted,) = predict_together(skippable, [IDS], [(), (2,)])
        if not request.param:
            predicted = [skippable.logits(IDS, removed) for removed in ((), (2,))]
        return log_p, *score_tokens(IDS, predicted, 7)


def test_each_score_is_that_of_whole_logits(scored):
    (p, q), *scores = scored
    for log_p, found in zip((p, q), scores, strict=True):
        torch.testing.assert_close(found["nll"], -log_p.gather(-1, IDS[:, 1:, None])[..., 0])
    torch.testing.assert_close(
        scores[1]["divergence"], kl_div(q, p, log_target=True, reduction="none").sum(-1)
    )
    assert torch.equal(scores[1]["same_top"], p.argmax(-1) == q.argmax(-1))
    # Half of what two distributions differ by is what neither has of the other.
    torch.testing.assert_close(scores[1]["accepted"], 1 - (p.exp() - q.exp()).abs().sum(-1) / 2)
    assert "divergence" not in scores[0]


def test_the_divergence_is_summarized_over_the_counted_tokens(scored):
    _, dense, pruned = scored
    counted = torch.ones(3, 19, dtype=torch.bool)
    clusters = torch.arange(3)[:, None].expand(3, 19)
    found = divergence_record(pruned, dense, counted, clusters)
    values = pruned["divergence"].double()
    change = (-pruned["nll"]).exp() - (-dense["nll"]).exp()
    expected = {
        "mean": values.mean(),
        "median": values.quantile(0.5),
        "p90": values.quantile(0.9),
        "maximum": values.max(),
        # Three observations of equal size: the ordinary standard error of three means.
        "standard_error": values.mean(1).std() / 3**0.5,
        "probability_change_rms": change.square().mean().sqrt(),
        "same_top": pruned["same_top"].double().mean(),
        "accepted": pruned["accepted"].mean(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-4)
