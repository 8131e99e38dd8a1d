"""The encoder-free classifier of exposure rounds 1 and 2: embeddings, mean, linear layer."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from btu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BagClassifier(nn.Module):
    """A linear classifier on the mean of embeddings.

    victim: provides the embeddings.
    full: use the victim's whole embedding layer, obtained for any architecture as the victim
        without encoder layers; otherwise the word embeddings alone.
    mean_over_padding: include padding positions in the mean.
    seed: draws the classifier.
    """

    def __init__(
        self,
        victim: PreTrainedModel,
        *,
        classes: int,
        full: bool,
        mean_over_padding: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.mean_over_padding = mean_over_padding
        self.full = full
        if full:
            self.embeddings: nn.Module = _without_layers(victim)
        else:
            self.embeddings = copy.deepcopy(victim.get_input_embeddings())
        self.embeddings.requires_grad_(True)
        hidden = self._width() if full else self.word_rows.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = nn.Linear(hidden, classes)

    def _width(self) -> int:
        """Return the size of the embedding layer's output, which may be wider than a word row.

        Raises:
            UserError: the architecture does not run without encoder layers.
        """
        ids = torch.zeros(1, 2, dtype=torch.int64)
        self.embeddings.eval()  # in train mode its dropout would be active
        try:
            with torch.no_grad():
                output = self.embeddings(input_ids=ids, attention_mask=torch.ones_like(ids))
            return int(output.last_hidden_state.shape[-1])
        # Architectures fail here with different exceptions; the remedy is always the same.
        except Exception as error:
            raise UserError(
                f"defense.bag_embeddings 'full' cannot run {type(self.embeddings).__name__} "
                f"without its encoder layers ({error}); use bag_embeddings 'word'."
            ) from error

    @property
    def word_rows(self) -> Tensor:
        """The (vocabulary, hidden) word embeddings."""
        if self.full:
            rows: Tensor = self.embeddings.get_input_embeddings().weight  # type: ignore[operator]
            return rows
        weight = self.embeddings.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Return an object with (batch, classes) ``logits``."""
        if self.full:
            hidden = self.embeddings(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state
        else:
            hidden = self.embeddings(input_ids)
        # (batch, tokens, hidden) -> (batch, hidden)
        if self.mean_over_padding:
            mean = hidden.mean(dim=1)
        else:
            weight = attention_mask.to(hidden.dtype)[..., None]
            # A row that lost all its tokens in round 2 has mean 0, not 0 / 0.
            mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return SimpleNamespace(logits=self.classifier(mean))


def _without_layers(victim: PreTrainedModel) -> nn.Module:
    """Return the victim's body without encoder layers: its embedding layer."""
    from transformers import AutoModel

    config = copy.deepcopy(victim.config)
    config.num_hidden_layers = 0
    body = victim.base_model
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights that are replaced below
            shell: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        raise UserError(
            f"defense.bag_embeddings 'full' cannot take {type(victim).__name__} without its "
            f"encoder ({error}); use bag_embeddings 'word'."
        ) from error
    wanted = shell.state_dict()
    given = body.state_dict()
    # A pooler that the victim lacks is not used: the mean is over hidden states.
    missing = [k for k in wanted if k not in given and not k.startswith("pooler.")]
    if missing:
        raise UserError(
            f"defense.bag_embeddings 'full' does not fit {type(victim).__name__} ({missing[0]} is "
            "not among its weights); use bag_embeddings 'word'."
        )
    shell.load_state_dict({k: given[k] for k in wanted if k in given}, strict=False)
    return shell
