"""An independent oracle: Hugging Face's VideoMAE with our weights predicts the same and loses the same."""

import pytest
import torch

from augment import IMAGENET_MEAN, IMAGENET_STD
from modeling_finetune import Size
from modeling_pretrain import PretrainVisionTransformer
from targets import reconstruction_error, reconstruction_targets

transformers = pytest.importorskip("transformers")


def to_huggingface(ours: dict) -> dict:
    """Our (the published) parameter names and fused projections -> Hugging Face's."""
    theirs = {}
    for key, value in ours.items():
        key = (
            key.replace("encoder.patch_embed.proj", "videomae.embeddings.patch_embeddings.projection")
            .replace("encoder.blocks.", "videomae.encoder.layer.")
            .replace("encoder.norm.", "videomae.layernorm.")
            .replace("decoder.blocks.", "decoder.decoder_layers.")
            .replace("norm1", "layernorm_before")
            .replace("norm2", "layernorm_after")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
            .replace("attn.proj", "attention.output.dense")
            .replace("attn.q_bias", "attention.attention.query.bias")
            .replace("attn.v_bias", "attention.attention.value.bias")
        )
        if key.endswith("attn.qkv.weight"):
            stem = key.removesuffix("attn.qkv.weight") + "attention.attention."
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{stem}{name}.weight"] = part
        else:
            theirs[key] = value
    return theirs


def test_videomae_equals_huggingface():
    torch.manual_seed(0)
    size = Size(dim=32, depth=2, heads=4, decoder_dim=16, decoder_heads=2)
    ours = PretrainVisionTransformer(
        size=size, patch=4, window=(4, 4, 4), mask_type="tube", mask_ratio=0.75, decoder_depth=2
    )
    for p in ours.parameters():  # biases and norms away from 0 and 1, so that each of them counts
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else None
    config = transformers.VideoMAEConfig(
        image_size=16,
        patch_size=4,
        num_frames=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
        norm_pix_loss=True,
    )
    theirs = transformers.VideoMAEForPreTraining(config)
    theirs.load_state_dict(to_huggingface(ours.state_dict()))
    ours.eval(), theirs.eval()

    pixels = torch.rand(2, 3, 8, 16, 16)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    clip = (pixels - mean) / std
    out = ours(clip)
    hidden = torch.zeros(2, 64, dtype=torch.bool).scatter(1, out.masked, True)
    expected = theirs(clip.transpose(1, 2), bool_masked_pos=hidden)
    error = reconstruction_error(out.prediction, reconstruction_targets(pixels, out.masked, 4))

    torch.testing.assert_close(out.prediction, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(error.mean(), expected.loss, rtol=1e-4, atol=1e-6)
