"""RouterStatistics: what a router did with its tokens, as sums and as the measures that people read.

Shape legend: R routers, T tokens, S tasks, E experts, K active experts per token, X = 3E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.routing.logits import without_autocast


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over tokens. The leading shape (...) is the reader's: () of one router, (layers,) of several put together.

    All measures are 0 where there is no token.

    Attributes:
        sums: (..., 3E + 1): the number of tokens that each expert serves, its probabilities p_e, its gates; the number of
            tokens.
        by_task: the same by the task that `recording` was given for each example; empty where it was given none. A task without
            tokens may be among them.
    """

    sums: Tensor
    by_task: Mapping[str, RouterStatistics] = field(default_factory=dict)

    @classmethod
    def of_tasks(cls, tasks: Sequence[str], sums_S: Tensor) -> RouterStatistics:
        """Return all tasks' sums (S, 3E + 1) together; the nameless task "" is none."""
        by_task = {task: cls(sums) for task, sums in zip(tasks, sums_S, strict=True) if task}
        return cls(sums_S.sum(0), by_task)

    @classmethod
    @torch.no_grad()
    def of_tokens(
        cls, active_RTE: Tensor, probabilities_RTE: Tensor, gates_RTE: Tensor, weights_ST: Tensor
    ) -> RouterStatistics:
        """Return the statistics (R, S) of R routers over the tokens in each of S weighted sums."""
        with without_autocast(weights_ST.device):  # in bfloat16 counts would end at 256
            sums_RSX = weights_ST @ torch.cat([active_RTE, probabilities_RTE, gates_RTE], -1)
        tokens_RS1 = weights_ST.sum(-1, keepdim=True).expand(len(active_RTE), -1, 1)
        return cls(torch.cat([sums_RSX, tokens_RS1], -1))

    def over(self, dim: int) -> RouterStatistics:
        """Return the tokens along one leading dimension counted together."""
        return RouterStatistics(self.sums.sum(dim))

    @property
    def num_experts(self) -> int:
        return self.sums.shape[-1] // 3

    @property
    def counts(self) -> Tensor:
        """Tokens that each expert serves (..., E)."""
        return self.sums[..., : self.num_experts]

    @property
    def tokens(self) -> Tensor:
        """Number of tokens (...,)."""
        return self.sums[..., -1]

    @property
    def active(self) -> Tensor:
        """Experts that serve a token (...,), mean over the tokens: K under a top-K, where it is the same for all."""
        return self.counts.sum(-1) / self.tokens.clamp(min=1)

    @property
    def load(self) -> Tensor:
        """f_e: share of the tokens that e serves (..., E); they add up to `active`."""
        return self.counts / self.tokens.clamp(min=1).unsqueeze(-1)

    @property
    def even_load(self) -> Tensor:
        """What each load is when it is even (...,): active/E. That of one expert per token where there are fewer, so that all
        experts of a router without an expert for any token count as dead."""
        return self.active.clamp(min=1) / self.num_experts

    @property
    def probability(self) -> Tensor:
        """P_e: mean of p_e over all tokens (..., E)."""
        return self.sums[..., self.num_experts : 2 * self.num_experts] / self.tokens.clamp(min=1).unsqueeze(-1)

    @property
    def gate(self) -> Tensor:
        """Mean gate of an expert over the tokens that it serves (..., E)."""
        return self.sums[..., 2 * self.num_experts : -1] / self.counts.clamp(min=1)

    @property
    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e (...,), paper Eq. 13-14; K when the load is even."""
        return self.num_experts * (self.load * self.probability).sum(-1)

    @property
    def load_imbalance(self) -> Tensor:
        """Load of the busiest expert over the mean load (...,): 1 is even, E/K is the worst."""
        return self._share.amax(-1) * self.num_experts

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the load over that of an even load (...,): 1 is even, log K / log E is the worst."""
        return self._entropy / math.log(self.num_experts) if self.num_experts > 1 else torch.ones_like(self.tokens)

    @property
    def balance(self) -> Tensor:
        """Return how far routing is from collapse (...,): 1 for an even load, 0 where the same K experts serve every token.

        (exp(entropy of the load) - K) / (E - K): experts in use beyond the K that are always in use, K = `active`. 1 for K = E.
        """
        spare = self.num_experts - self.active
        share = (self._entropy.exp() - self.active).clamp(min=0) / spare.clamp(min=torch.finfo(spare.dtype).tiny)
        return torch.where(spare > 0, share, 1.0) * (self.tokens > 0)

    def dead(self, below: float) -> Tensor:
        """Return which experts serve less than `below` times an even share of the tokens, bool (..., E)."""
        return self.load < below * self.even_load.unsqueeze(-1)

    @property
    def _share(self) -> Tensor:
        """Share of all that experts serve (..., E)."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)

    @property
    def _entropy(self) -> Tensor:
        return torch.special.entr(self._share).sum(-1)


class TokenWeights:
    """Which tokens count, and for which task: shared by all routers of a model for one step.

    Args:
        mask: true for tokens that count, in the leading shape of the routers' inputs; None counts all.
        tasks: the task of each example, along the first dimension of that shape; None is one nameless task.
        known: names of tasks that keep their place.
    """

    def __init__(self, mask: Tensor | None, tasks: Sequence[str] | None, known: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys([*known, *(tasks if tasks is not None else [""])]))
        self._mask = mask
        self._rows = None if tasks is None else torch.tensor([self.names.index(task) for task in tasks])
        self._masks: dict[_Like, Tensor] = {}
        self._by_task: dict[_Like, Tensor] = {}

    def mask(self, probabilities: Tensor) -> Tensor:
        """1 or 0 for each of the tokens (T,) of probabilities (..., E)."""
        shape, device, dtype = key = _like(probabilities)
        if key not in self._masks:
            mask = torch.ones(shape, device=device) if self._mask is None else self._mask
            self._masks[key] = mask.to(device, dtype).flatten()
        return self._masks[key]

    def by_task(self, probabilities: Tensor) -> Tensor:
        """Return the same for each task, 0 for the tokens of other tasks (S, T).

        Raises:
            UserError: if there is not one task per example.
        """
        shape, device, dtype = key = _like(probabilities)
        if key not in self._by_task:
            mask_T = self.mask(probabilities)
            if self._rows is None:
                self._by_task[key] = torch.stack([mask_T if name == "" else torch.zeros_like(mask_T) for name in self.names])
            else:
                if shape[:1] != self._rows.shape:
                    raise UserError(
                        f"tasks has {len(self._rows)} names, but the adapted projection sees tokens of shape {tuple(shape)}; "
                        "give one for each entry of the first dimension"
                    )
                own_SB = nn.functional.one_hot(self._rows, len(self.names)).T
                own_SB1 = own_SB.to(device, dtype, non_blocking=True).unsqueeze(-1)  # a step never waits for the device
                self._by_task[key] = (own_SB1 * mask_T.view(shape[0], -1)).flatten(1)
        return self._by_task[key]


_Like = tuple[torch.Size, torch.device, torch.dtype]


def _like(probabilities: Tensor) -> _Like:
    return probabilities.shape[:-1], probabilities.device, probabilities.dtype
