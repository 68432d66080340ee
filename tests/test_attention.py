"""Attention and tubelet embedding: each kernel computes the plain formula."""

import pytest
import torch
from timm.models import beit

from kernels import attention
from kernels.attention import RowBlocks, attend
from modeling_blocks import Attention, TubeletEmbed


def written_out(q, k, v):
    """Attention of (B,heads,N,d), as in the papers."""
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(3) @ v


def value_and_gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
def test_attention_in_row_blocks_is_the_formula(tokens, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 32)  # several blocks, and a last one that is shorter
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, tokens, 8, dtype=torch.float64) for _ in range(3)]
    ours = value_and_gradients(RowBlocks.apply, *qkv)
    for found, expected in zip(ours, value_and_gradients(written_out, *qkv), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the softmax is in float32


def test_attention_in_bfloat16_is_as_close_to_float32_as_the_published_way(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 32)
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 80, 8).bfloat16() for _ in range(3)]

    def published(q, k, v):
        weights = (q * q.shape[3] ** -0.5 @ k.mT).float().softmax(3)
        return weights.bfloat16() @ v

    exact = value_and_gradients(written_out, *(x.float() for x in qkv))
    ours, theirs = value_and_gradients(RowBlocks.apply, *qkv), value_and_gradients(published, *qkv)
    for found, peer, right in zip(ours, theirs, exact, strict=True):
        assert found.dtype is torch.bfloat16
        assert (found.float() - right).norm() < 1.1 * (peer.float() - right).norm()


@pytest.mark.parametrize(
    ("threads", "dtype", "drop", "by_rows"),
    [
        (2, torch.bfloat16, 0.0, True),
        (2, torch.float32, 0.0, False),
        (2, torch.bfloat16, 0.5, False),
        (64, torch.bfloat16, 0.0, False),
    ],
)
def test_the_kernel_follows_type_and_threads(threads, dtype, drop, by_rows, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = (torch.randn(1, 10, 2, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, drop=drop)
    assert out.shape == (1, 10, 8)
    names, node = [], out.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert any("RowBlocks" in name for name in names) == by_rows, names


@pytest.mark.parametrize("biased", [True, False])
def test_attention_equals_timms_and_keeps_its_names(biased):
    torch.manual_seed(0)
    timms = beit.Attention(24, num_heads=3, qkv_bias=biased).eval()
    for p in timms.parameters():
        torch.nn.init.normal_(p)
    ours, x = Attention(timms), torch.randn(2, 20, 24)
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-5, atol=1e-4)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in timms.named_parameters()]


def test_the_embedding_is_the_convolution_with_contiguous_tokens():
    torch.manual_seed(0)
    embed = TubeletEmbed(patch=8, dim=24)
    clip = torch.randn(2, 3, 4, 16, 24)
    tokens = embed(clip)
    torch.testing.assert_close(tokens, embed.proj(clip).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert tokens.shape == (2, 12, 24) and tokens.is_contiguous()
