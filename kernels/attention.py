"""Softmax attention, with the fastest exact kernel for each device and type."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 392  # queries whose scores are computed at once: with 1568 keys they fit into a core's cache
FEW_THREADS = 4  # more of them would idle in `RowBlocks`, whose products are small


def attend(q: Tensor, k: Tensor, v: Tensor, *, drop: float = 0.0) -> Tensor:
    """Softmax attention: q, k, v (B,N,heads,d) -> (B,N,heads*d), with dropout of the attention weights.

    On a GPU, and on the CPU in float32, torch's fused attention is the fastest; on the CPU in bfloat16 `RowBlocks` is
    (forward and backward at ViT-B's sizes on two cores with AMX: 305 against 446 ms and 174 against 240 ms).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,heads,N,d)
    low_on_cpu = q.device.type == "cpu" and q.dtype is torch.bfloat16
    if low_on_cpu and not drop and not torch.compiler.is_compiling() and torch.get_num_threads() <= FEW_THREADS:
        x = RowBlocks.apply(q, k, v)  # (B,heads,N,d)
    else:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)  # (B,heads,N,d)
    return x.transpose(1, 2).flatten(2)


class RowBlocks(torch.autograd.Function):
    """Attention (B,heads,N,d) head by head in blocks of queries, with float32 softmax and products in the inputs' type.

    It stores the row sums of the softmax alone and recomputes the weights in the backward pass (Dao et al.,
    "FlashAttention", 2022), so it takes no more memory than torch's fused attention.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[3] ** -0.5
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # (B,heads,N,d), heads side by side in memory
        log_sums = torch.empty(q.shape[:3], dtype=torch.float32)
        for clip, head, rows in row_blocks(q):
            scores = (q[clip, head, rows] @ k[clip, head].T).float() * scale  # (rows,N)
            log_sum = scores.logsumexp(1, keepdim=True)
            out[clip, head, rows] = scores.sub_(log_sum).exp_().to(v.dtype) @ v[clip, head]
            log_sums[clip, head, rows] = log_sum[:, 0]
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sums = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        dots = (grad.float() * out.float()).sum(3)  # (B,heads,N)
        dq = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for clip, head, rows in row_blocks(q):
            queries, keys, grads = q[clip, head, rows], k[clip, head], grad[clip, head, rows]
            scores = (queries @ keys.T).float() * scale
            weights = scores.sub_(log_sums[clip, head, rows, None]).exp_()  # (rows,N)
            dv[clip, head] += weights.to(v.dtype).T @ grads
            dweights = (grads @ v[clip, head].T).float()
            dscores = dweights.sub_(dots[clip, head, rows, None]).mul_(weights).mul_(scale).to(q.dtype)
            dq[clip, head, rows] = dscores @ keys
            dk[clip, head] += dscores.T @ queries
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def row_blocks(q: Tensor) -> Iterator[tuple[int, int, slice]]:
    """The clips, heads and slices of queries of (B,heads,N,d), one after another."""
    batch, heads, n, _ = q.shape
    for clip in range(batch):
        for head in range(heads):
            for start in range(0, n, ROWS):
                yield clip, head, slice(start, start + ROWS)
