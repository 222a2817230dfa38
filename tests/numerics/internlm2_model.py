"""InternLM2 as its published code computes it, written once more in plain torch: for parity cases.

It shares no code with `vico` or transformers. Parameters have the published names and shapes.
"""

# B rows, L tokens, D width, H heads, K key heads, G heads that share a key head, d width of a head

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.key_heads, self.d = config["num_key_value_heads"], width // self.heads
        self.base, self.scaling = config["rope_theta"], config.get("rope_scaling")
        self.longest = config["max_position_embeddings"]
        rows = (self.heads + 2 * self.key_heads) * self.d
        self.wqkv = nn.Linear(width, rows, bias=config["bias"])
        self.wo = nn.Linear(width, width, bias=config["bias"])

    def turned(self, x_BHLd: torch.Tensor) -> torch.Tensor:
        """Turn pairs (i, i + d / 2) of each head by position x frequency."""
        length, half = x_BHLd.shape[2], self.d // 2
        base = self.base
        if self.scaling and self.scaling["type"] == "dynamic" and length > self.longest:
            factor = self.scaling["factor"]
            base *= (factor * length / self.longest - (factor - 1)) ** (self.d / (self.d - 2))
        frequency = torch.tensor([base ** (-2 * n / self.d) for n in range(half)], dtype=x_BHLd.dtype)
        angle_Lh = torch.arange(length, dtype=x_BHLd.dtype)[:, None] * frequency
        first, second = x_BHLd[..., :half], x_BHLd[..., half:]
        cos, sin = angle_Lh.cos(), angle_Lh.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BLD.shape
        shared = self.heads // self.key_heads
        groups = self.wqkv(x_BLD).view(batch, length, self.key_heads, shared + 2, self.d)
        q = groups[..., :shared, :].reshape(batch, length, self.heads, self.d).transpose(1, 2)
        k, v = groups[..., shared, :].transpose(1, 2), groups[..., shared + 1, :].transpose(1, 2)
        q, k = self.turned(q), self.turned(k)
        attended = []
        for head in range(self.heads):
            key = head // shared
            weights_BLL = q[:, head] @ k[:, key].transpose(1, 2) / self.d**0.5
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            attended.append(weights_BLL.masked_fill(later, float("-inf")).softmax(-1) @ v[:, key])
        return self.wo(torch.cat(attended, -1))


class FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, wide = config["hidden_size"], config["intermediate_size"]
        self.w1, self.w3 = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.w2 = nn.Linear(wide, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = RmsNorm(width, eps), RmsNorm(width, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])


class InternLM2(nn.Module):
    """A random InternLM2 of the config's sizes, in float64; called as transformers' causal models are."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.model = Decoder(config)
        self.output = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter + torch.randn_like(parameter) * 0.05)
        self.double()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tok_embeddings

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = inputs_embeds.double()
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.output(self.model.norm(x)).float())
