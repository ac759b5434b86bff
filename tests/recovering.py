"""Stand-ins, faults and direct computations for tests of `sleb apply --recover` and `--heal`."""

from types import SimpleNamespace

from sleb_cli.engine.recovery import saved_state
from sleb_cli.engine.recovery.language import Distillation
from sleb_cli.engine.recovery.ridge import Ridge
from sleb_cli.plan import ClosedFormRecord


def standing_in(monkeypatch, names):
    """Let something stand in for the regression: it makes the named parameters a tenth larger."""
    asked = SimpleNamespace(names=names, calls=[])

    def run(stage, job, values):
        removed = sorted(job.settings.surgery.removed)
        asked.calls.append((removed, job.train.sequences, job.validation.sequences))
        own = dict(job.dense.model.named_parameters())
        stored = job.settings.stored
        values = {name: (own[name] * 1.1).detach().to(stored) for name in asked.names}
        return values, ClosedFormRecord(fits=())

    monkeypatch.setattr(Ridge, "run", run)
    return asked


def failing(module, name, error):
    """Return a function that lets a function of a module fail."""

    def fail(*arguments):
        raise error

    return lambda patch: patch.setattr(module, name, fail)


def save_always(monkeypatch):
    """Have a recovery save whenever it can."""
    monkeypatch.setattr(saved_state, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(saved_state, "MAX_SAVING_SHARE", float("inf"))


def interrupt_healing(monkeypatch, step, distillation=Distillation):
    """Have healing save after every step, and end like Ctrl-C before the given one."""
    save_always(monkeypatch)
    add_gradient = distillation.add_gradient
    steps = []

    def few(*arguments):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return add_gradient(*arguments)

    monkeypatch.setattr(distillation, "add_gradient", few)
    return steps


def plain_losses(dense, ours, tokens):
    """Return the loss of a model, and the divergence from the dense one, from whole logits."""
    p, q = (model(tokens).logits[:, :-1].float().log_softmax(-1) for model in (dense, ours))
    loss = -q.gather(-1, tokens[:, 1:, None]).mean()
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return loss.item(), divergence.item()
