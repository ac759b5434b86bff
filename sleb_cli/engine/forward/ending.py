"""The ending of a model: what it computes from the hidden states that leave its last block, and how
far two of its results lie apart.

The walk and the race know this seam, and none of the endings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sleb_cli.engine.files.tensors import read_all
from sleb_cli.engine.files.weights import find_weights
from sleb_cli.engine.forward.logits import Logits, Predictions, score_logits
from sleb_cli.engine.model.architecture import Architecture
from sleb_cli.engine.model.padded import PaddedTexts
from sleb_cli.engine.model.reading import Module
from sleb_cli.engine.third_party import error_saying, translate_errors
from sleb_plugins import LogitMetric, Metric, ModelError, OutputMetric
from sleb_plugins.metrics.kl import compare_logits
from sleb_plugins.metrics.nll import NegativeLogLikelihood
from sleb_plugins.metrics.output import OutputDistance

if TYPE_CHECKING:
    from sleb_cli.engine.forward.skipping import SkippableModel

CHECKED_POSITIONS = 64
"""How many positions of each sequence are compared before a search."""


class Ending(ABC):
    """What a model puts out, and how results are compared.

    Attributes:
        loss_metric: what a pruned model is measured by, besides the metric of the search.
        output: what plans call what the model puts out; None for logits.
    """

    loss_metric: LogitMetric | OutputMetric
    output: str | None = None

    @abstractmethod
    def of_states(self, model: SkippableModel, tokens: Any, hidden: Tensor) -> Any:
        """Return the result for hidden states that leave the last block."""

    @abstractmethod
    def of_model(self, model: SkippableModel, tokens: Any, removed: Collection[int]) -> Any:
        """Return the result of a pass of the whole model without these blocks."""

    @abstractmethod
    def scores(
        self,
        metric: Metric,
        result: Any,
        tokens: Any,
        dense: Any,
        *,
        loss_mask: Tensor | None = None,
        positions: int | None = None,
    ) -> Tensor:
        """Return each sequence's score, float64 [batch]; `dense` is the dense model's result.

        At most `positions` positions, over all sequences, are computed at once.
        """

    @abstractmethod
    def both_ways(
        self, model: SkippableModel, tokens: Any, hidden: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return the result without a block in two ways, which should be equal.

        The first is from these hidden states, the second from a pass of the whole model.
        """


class LanguageHead(Ending):
    """Predicts the next token at each position: logits, and the loss of the text."""

    loss_metric = NegativeLogLikelihood()

    def of_states(self, model: SkippableModel, tokens: Tensor, hidden: Tensor) -> Predictions:
        """Return the logits, [batch, positions, vocabulary], computed when they are asked for."""
        return Predictions(model, tokens, hidden)

    def of_model(self, model: SkippableModel, tokens: Tensor, removed: Collection[int]) -> Tensor:
        """Return the logits, [batch, positions, vocabulary]."""
        return model.logits(tokens, removed)

    def scores(
        self,
        metric: Metric,
        result: Logits,
        tokens: Tensor,
        dense: Logits | None,
        *,
        loss_mask: Tensor | None = None,
        positions: int | None = None,
    ) -> Tensor:
        """Average the metric over the tokens that count."""
        assert isinstance(metric, LogitMetric)
        return score_logits(metric, result, tokens, dense, loss_mask=loss_mask, positions=positions)

    def both_ways(
        self, model: SkippableModel, tokens: Tensor, hidden: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        """Compare the logits of the last positions."""
        # In two slices, since a search also computes logits slice by slice.
        checked = min(CHECKED_POSITIONS, tokens.shape[1])
        middle = -checked // 2
        first = model.head(hidden[:, -checked:middle], tokens[:, -checked:middle])
        second = model.head(hidden[:, middle:], tokens[:, middle:])
        plain = model.logits(tokens, {block}, last=checked)
        return torch.cat([first, second], dim=1), plain[:, -checked:]


class Reader(Ending):
    """Puts out one row of numbers for each text."""

    loss_metric = OutputDistance()

    @abstractmethod
    def outputs(self, output: Any, texts: PaddedTexts) -> Tensor:
        """Return the numbers, float32 [texts, width], from what transformers' model returns."""

    @abstractmethod
    def distance(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return the distance of each text's numbers from the dense model's, [texts]."""

    def of_states(self, model: SkippableModel, tokens: PaddedTexts, hidden: Tensor) -> Tensor:
        """Return the numbers, float32 [texts, width]."""
        return self.outputs(model.outputs_of(hidden, tokens), tokens)

    def of_model(
        self, model: SkippableModel, tokens: PaddedTexts, removed: Collection[int]
    ) -> Tensor:
        """Return the numbers, float32 [texts, width]."""
        return self.outputs(model.outputs(tokens, removed), tokens)

    def scores(
        self,
        metric: Metric,
        result: Tensor,
        tokens: PaddedTexts,
        dense: Tensor | None,
        *,
        loss_mask: Tensor | None = None,
        positions: int | None = None,
    ) -> Tensor:
        """Return the distances."""
        assert dense is not None
        return self.distance(result, dense).double()

    def both_ways(
        self, model: SkippableModel, tokens: PaddedTexts, hidden: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        """Compare the numbers of each text."""
        return self.of_states(model, tokens, hidden), self.of_model(model, tokens, {block})


class Vectors(Reader):
    """Pools the hidden states of a text; distance is 1 - cosine."""

    output = "vectors"

    def __init__(self, pooling: nn.Module, behind: nn.Sequential, width: int | None) -> None:
        self.pooling = pooling
        self.behind = behind
        self.width = width

    def outputs(self, output: Any, texts: PaddedTexts) -> Tensor:
        """Return the vectors, as sentence-transformers computes them."""
        pooled = self.pooling(output.last_hidden_state.float(), texts.mask)
        vectors: Tensor = self.behind(pooled)
        return vectors[:, : self.width]

    def distance(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return 1 - cosine."""
        cosine = functional.cosine_similarity(outputs, dense, dim=-1)
        return (1 - cosine).clamp(min=0)  # rounding may leave less than 0


class Classes(Reader):
    """Classifies a text; distance is KL(dense || pruned) of the classes, in nats."""

    output = "classes"

    def outputs(self, output: Any, texts: PaddedTexts) -> Tensor:
        """Return the logits of the classes."""
        logits: Tensor = output.logits
        return logits.float()

    def distance(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return the divergence."""
        return compare_logits(dense, outputs).divergence


class Scores(Classes):
    """Scores a text or a pair; distance is the squared difference."""

    output = "scores"

    def distance(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return the squared difference."""
        return (outputs - dense).square().sum(-1)


class Pooling(nn.Module):
    """Makes one vector of the hidden states of a text's tokens.

    The modes are sentence-transformers'; the vectors of several are joined.
    """

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool float32 [texts, positions, width] where the mask is 1, to [texts, width]."""
        mask = mask.to(hidden.device)
        counts = mask.unsqueeze(-1).float()
        rows = torch.arange(len(hidden), device=hidden.device)
        vectors = []
        for mode in self.modes:
            if mode == "cls":
                vector = hidden[rows, mask.argmax(1)]
            elif mode == "lasttoken":
                last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
                vector = hidden[rows, last]
            elif mode == "max":
                vector = hidden.masked_fill(counts == 0, -torch.inf).amax(1)
            else:
                weights = counts
                if mode == "weightedmean":
                    weights = counts * counts.cumsum(1)
                total = weights.sum(1)
                if mode == "mean_sqrt_len_tokens":
                    total = total.sqrt()
                vector = (hidden * weights).sum(1) / total
            vectors.append(vector)
        return torch.cat(vectors, dim=-1)


class Dense(nn.Module):
    """A linear map with a function behind it; with a residual, the input is added."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        settings = module.settings
        widths = settings["in_features"], settings["out_features"]
        self.linear = nn.Linear(*widths, bias=settings.get("bias", True))
        self.activation_function = _activation(module)
        self.residual: nn.Module | None = None
        if settings.get("use_residual"):
            self.residual = nn.Identity()
            if settings["in_features"] != settings["out_features"]:
                self.residual = nn.Linear(*widths, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map [texts, in_features] to [texts, out_features]."""
        mapped: Tensor = self.activation_function(self.linear(vectors))
        if self.residual is not None:
            mapped = mapped + self.residual(vectors)
        return mapped


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Normalize [texts, width]."""
        return functional.normalize(vectors, dim=-1)


def ending_of(architecture: Architecture, device: torch.device) -> Ending:
    """Return the ending of a model, with the weights that it has behind the model itself."""
    reading = architecture.reading
    if reading is None:
        return LanguageHead()
    if reading.output == "vectors":
        width = len(reading.pooling) * architecture.text_config.hidden_size
        behind = _behind(reading.behind, width).to(device)
        return Vectors(Pooling(reading.pooling), behind, reading.truncate_dim)
    if reading.output == "scores":
        return Scores()
    return Classes()


def _behind(listed: Sequence[Module], width: int) -> nn.Sequential:
    """Return the modules behind the pooling, whose vectors have this width, with their weights.

    Raises:
        ModelError: a module does not fit its settings, or the vectors.
    """
    behind = nn.Sequential()
    vector = torch.zeros(1, width)
    for module in listed:
        what = f"The module in {module.folder} does not fit the model"
        fault = error_saying(ModelError, what, "Copy or download the model again.")
        with translate_errors(fault):
            loaded = _load_module(module)
            vector = loaded(vector)
        behind.append(loaded)
    return behind.requires_grad_(False).eval()


def _load_module(module: Module) -> nn.Module:
    if module.kind == "Dense":
        return _load(Dense(module), module)
    if module.kind == "LayerNorm":
        norm = nn.LayerNorm(module.settings["dimension"])
        return _load(nn.Sequential(OrderedDict(norm=norm)), module)
    if module.kind == "Normalize":
        return Normalize()
    return nn.Identity()  # dropout, which does nothing after training


def _activation(module: Module) -> nn.Module:
    """Return the function behind a dense module: a class of torch, by name; by default, tanh."""
    name = str(module.settings.get("activation_function", "torch.nn.Tanh"))
    kind = None
    if name.startswith("torch."):
        kind = getattr(nn, name.rpartition(".")[2], None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ModelError(
            f"{module.folder} names an activation function that torch does not have: {name}.",
            hint="sleb runs no code of models here: save the model with one of torch.nn.",
        )
    return kind()


def _load(into: nn.Module, module: Module) -> nn.Module:
    """Read the weights of a module from its folder."""
    values = {}
    for name, tensor in read_all(find_weights(module.folder)):
        values[name] = tensor.float()
    into.load_state_dict(values)
    return into
