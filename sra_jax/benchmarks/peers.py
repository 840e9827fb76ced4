"""The same training step in PyTorch, for the benchmark: SiT or DiT + SRA on timm's attention and MLP. Never
trained with.

Names of the tensors are the authors', so that our parameters load into it and the arithmetic can be checked equal.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn


class TimeEmbedder(nn.Module):
    """Sinusoids, linear, SiLU, linear."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer(
            "rates", torch.exp(-math.log(10000) * torch.arange(frequencies // 2) / (frequencies // 2)), persistent=False
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """A table with a row for the null label."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """adaLN-Zero block; attention runs PyTorch's fused kernel."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, hidden, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class PeerTransformer(nn.Module):
    """SiT or DiT of any size with the alignment head."""

    def __init__(
        self, *, input_size: int, patch: int, channels: int, outputs: int, width: int, depth: int, heads: int,
        hidden: int, classes: int,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.outputs, self.grid = patch, outputs, input_size // patch
        self.x_embedder = PatchEmbed(input_size, patch, channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * outputs)
        self.ap_head = Head(width)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, tap: int | None = None, stop: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Prediction (None with `stop`) and the tokens after block `tap`."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        tapped = None
        for number, block in enumerate(self.blocks[:stop], start=1):
            x = block(x, c)
            if number == tap:
                tapped = x
        if stop is not None:
            return None, tapped
        x = self.final_layer(x, c).reshape(-1, self.grid, self.grid, self.patch, self.patch, self.outputs)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, self.grid * self.patch, self.grid * self.patch)
        return x, tapped


class Flow:
    """SiT's linear path."""

    def __init__(self, device: str = "cpu"):
        del device

    def perturb(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (1 - t) * x0 + t * e

    def loss(self, v: torch.Tensor, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (v - (e - x0)).square().mean()


class Gaussian:
    """DiT's DDPM: 1000 linear betas, learned range of variances, its bound's gradient stopped at the mean."""

    def __init__(self, device: str = "cpu"):
        beta = np.linspace(1e-4, 0.02, 1000)
        after = np.cumprod(1 - beta)
        before = np.append(1.0, after[:-1])
        posterior = beta * (1 - before) / (1 - after)
        posterior[0] = posterior[1]
        self._tables = {
            name: torch.tensor(table, dtype=torch.float32, device=device)
            for name, table in {
                "signal": np.sqrt(after), "noise": np.sqrt(1 - after), "log_beta": np.log(beta),
                "log_posterior": np.log(posterior), "of_x0": beta * np.sqrt(before) / (1 - after),
                "of_x": (1 - before) * np.sqrt(1 - beta) / (1 - after),
            }.items()
        }  # fmt: skip

    def _at(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: table[t.long()] for name, table in self._tables.items()}

    def perturb(self, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at = self._at(t)
        return at["signal"] * x0 + at["noise"] * e

    def loss(self, prediction: torch.Tensor, x0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        predicted, code = prediction.chunk(2, dim=1)
        at, x = self._at(t), self.perturb(x0, e, t)
        implied = (x - at["noise"] * predicted.detach()) / at["signal"]
        mean, target = (at["of_x0"] * clean + at["of_x"] * x for clean in (implied, x0))
        fraction = (code + 1) / 2
        log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_posterior"]
        difference = at["log_posterior"] - log_variance
        divergence = (difference.exp() - 1 - difference + (target - mean).square() / log_variance.exp()) / 2
        deviation = (log_variance / 2).exp()
        upper, lower = (self._cumulative((x0 - mean + side / 255) / deviation) for side in (1, -1))
        upper, lower = torch.where(x0 > 0.999, 1, upper), torch.where(x0 < -0.999, 0, lower)
        likelihood = (upper - lower).clamp(min=1e-12).log()
        bound = torch.where(t == 0, -likelihood, divergence).mean() / math.log(2)
        return (e - predicted).square().mean() + bound

    @staticmethod
    def _cumulative(x: torch.Tensor) -> torch.Tensor:
        """Of the standard normal, as improved DDPM approximates it."""
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


PROCESSES: dict[str, type[Flow] | type[Gaussian]] = {"interpolant": Flow, "gaussian": Gaussian}
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "smooth_l1": lambda h, target: F.smooth_l1_loss(h, target, beta=0.05),
    "cosine": lambda h, target: (1 - F.cosine_similarity(h, target, dim=-1)).mean(),
}


class PeerStep:
    """A training step as a careful PyTorch user writes it: multi-tensor AdamW, clip and EMA.

    Args:
      shape: keyword arguments of `PeerTransformer`.
      tensors: parameters under the authors' names.
      process: a key of PROCESSES.
      student_block, teacher_block, weight: of the alignment.
      threads: CPU threads.
      device: where it runs, "cpu" or "cuda".
      bfloat16: whether products are in bfloat16, by autocast; parameters and optimizer stay float32.
      compiled: whether the networks' blocks go through torch.compile: one for all, where whole networks take minutes.
      distance: smooth_l1 with beta 0.05, or cosine over features.
    """

    def __init__(
        self, shape: Mapping[str, int], tensors: Mapping[str, np.ndarray], *, process: str, student_block: int,
        teacher_block: int, weight: float, threads: int, device: str = "cpu", bfloat16: bool = False,
        compiled: bool = False, distance: str = "smooth_l1",
    ):  # fmt: skip
        torch.set_num_threads(threads)
        self._device = device
        self._precision = functools.partial(torch.autocast, device, torch.bfloat16, enabled=bfloat16)
        self._process = PROCESSES[process](device)
        self.student, self.teacher = PeerTransformer(**shape), PeerTransformer(**shape)
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        if not any(name.startswith("ap_head") for name in state):
            del self.student.ap_head, self.teacher.ap_head
        for network in (self.student, self.teacher):
            network.load_state_dict(state)
            network.to(device)
            if compiled:
                for block in network.blocks:
                    block.compile()
        self.teacher.requires_grad_(False)
        self._student_block, self._teacher_block, self._weight = student_block, teacher_block, weight
        self._distance = DISTANCES[distance]
        self._parameters = [p for p in self.student.parameters() if p.requires_grad]
        self._averages = [
            a for a, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True) if p.requires_grad
        ]
        fused = True if device == "cuda" else None
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0.0, fused=fused)

    def loss(self, example: Mapping[str, np.ndarray], teacher: str) -> torch.Tensor:
        """The SRA loss of a batch of x0 and e (B,C,H,W), t, s (B,) and y (B,).

        Args:
          example: the batch.
          teacher: "full" runs all blocks as the authors do, "truncated" blocks 1..n, "none" is the baseline.
        """
        x0, e, t, s = (torch.from_numpy(example[name]).to(self._device) for name in ("x0", "e", "t", "s"))
        y = torch.from_numpy(example["y"]).long().to(self._device)
        at = t[:, None, None, None]
        prediction, h = self.student(self._process.perturb(x0, e, at), t, y, tap=self._student_block)
        loss = self._process.loss(prediction, x0, e, at)
        if teacher == "none":
            return loss
        at = s[:, None, None, None]
        with torch.no_grad():
            _, target = self.teacher(
                self._process.perturb(x0, e, at), s, y, tap=self._teacher_block,
                stop=self._teacher_block if teacher == "truncated" else None,
            )  # fmt: skip
        return loss + self._weight * self._distance(self.student.ap_head(h), target)

    def step(self, example: Mapping[str, np.ndarray], teacher: str) -> float:
        """One whole step; returns the loss."""
        with self._precision():
            loss = self.loss(example, teacher)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, 1e-4)
        return loss.item()

    @torch.no_grad()
    def sample(
        self, noise: np.ndarray, labels: np.ndarray, steps: int, scale: float, low: float, high: float, null: int
    ) -> np.ndarray:
        """Euler-Maruyama as the authors' loop runs it: guided steps on the doubled batch; returns the latents."""
        x, y = torch.from_numpy(noise), torch.from_numpy(labels).long()
        grid = torch.cat([torch.linspace(1.0, 0.04, steps), torch.zeros(1)])
        generator = torch.Generator().manual_seed(0)
        for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
            guided = scale > 1 and low <= t <= high
            inputs, chosen = (torch.cat([x, x]), torch.cat([y, torch.full_like(y, null)])) if guided else (x, y)
            v, _ = self.teacher(inputs, t.expand(len(inputs)), chosen)
            drift = v - t * (-((1 - t) * v + inputs) / (t**2 + (1 - t) * t))
            if guided:
                conditional, unconditional = drift.chunk(2)
                drift = unconditional + scale * (conditional - unconditional)
            dt = t_next - t
            x = x + drift * dt
            if i < steps - 1:
                x = x + torch.sqrt(2 * t * -dt) * torch.randn(x.shape, generator=generator)
        return x.numpy()
