"""Counts against sums done by hand."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

from prunebench.evaluation.cost import count_macs, count_nonzero, count_parameters, peak_memory


def both(macs: int, products: int = 0) -> dict[str, int]:
    return {"macs": macs, "macs_without_attention_products": macs - products}


class FusedAttention(nn.Module):
    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)


def test_parameters_and_nonzero():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.data.fill_(1.0)[0] = 0
    model[0].bias.data.zero_()
    model[1].weight.data.fill_(2.0)
    model[1].bias.data.fill_(1.0)
    assert count_parameters(model) == 4 * 3 + 3 + 3 * 2 + 2
    assert count_nonzero(model) == 4 * 2 + 3 * 2 + 2


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4, bias=False)
    assert count_parameters(nn.Sequential(layer, layer)) == 16


def test_linear():
    assert count_macs(nn.Linear(5, 7), torch.randn(3, 5)) == both(3 * 5 * 7)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_strided_tokens_is_no_attention_product(bias):
    tokens = torch.randn(2, 5, 9).transpose(1, 2)
    assert count_macs(nn.Linear(5, 7, bias=bias), tokens) == both(2 * 9 * 5 * 7)


def test_convolutions():
    image = torch.randn(1, 4, 8, 8)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert count_macs(conv, image) == both(4 * 4 * 6 * 4 * 9)
    assert count_macs(nn.Conv2d(4, 4, 3, padding=1, groups=4), image) == both(8 * 8 * 4 * 9)


def test_fused_attention():
    query, key, value = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    products = 2 * (8 * 6 * 4) * 2  # heads x (query-key and attention-value)
    assert count_macs(FusedAttention(), query, key, value) == both(products, products)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_timm_attention(fused, device):
    tokens, width, heads = 16, 24, 3
    model = Attention(width, num_heads=heads).to(device).eval()
    model.fused_attn = fused
    products = 2 * tokens * tokens * width
    linears = tokens * width * 3 * width + tokens * width * width
    inputs = torch.randn(1, tokens, width, device=device)
    assert count_macs(model, inputs) == both(linears + products, products)


def test_zeroed_weights_save_no_macs():
    model = nn.Linear(5, 7)
    model.weight.data.zero_()
    assert count_macs(model, torch.randn(1, 5)) == both(35)


def test_peak_memory_is_model_plus_allocations_alive_together():
    model = nn.Linear(10, 10, bias=False)
    kept = torch.zeros(1000, 250)  # 1 MB that was there before

    def run():
        first = kept + 1
        second = first + 1
        del first
        return second * 2  # two of 1 MB alive at any time

    megabytes = peak_memory(run, model)
    assert megabytes == pytest.approx(2 + 400 / 1e6, abs=1e-3)
    assert peak_memory(run, model) == megabytes


def test_peak_memory_counts_no_gradients():
    """A chain of layers needs two activations at a time, not all of them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(16)))
    x = torch.zeros(4096, 64)
    parameters = 16 * 64 * 64 * 4 / 1e6
    activation = 4096 * 64 * 4 / 1e6
    peak = peak_memory(lambda: model(x), model) - parameters
    assert peak <= 2 * activation + 0.01
