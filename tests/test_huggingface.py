"""An independent oracle: Hugging Face's VideoMAE with our weights predicts the same and loses the same."""

import pytest
import torch

from augment import IMAGENET_MEAN, IMAGENET_STD
from modeling_finetune import Size, VisionTransformer
from modeling_pretrain import PretrainVisionTransformer
from targets import create_target
from weights.names import hugging_face_names, plain_name, published_names

transformers = pytest.importorskip("transformers")


def their_names(model: torch.nn.Module) -> dict:
    """The weights under the names of their modules, where a file of theirs shortens those of two biases."""
    names = {"q_bias": "query.bias", "v_bias": "value.bias"}
    weights = hugging_face_names(model.state_dict())
    return {k.replace(end := k.rpartition(".")[2], names.get(end, end)): v for k, v in weights.items()}


def test_videomae_equals_huggingface():
    torch.manual_seed(0)
    size = Size(dim=32, depth=2, heads=4, decoder_dim=16, decoder_heads=2)
    target = create_target("pixels", patch=4)
    ours = PretrainVisionTransformer(
        size=size,
        patch=4,
        window=(4, 4, 4),
        target_width=target.width,
        mask_type="tube",
        mask_ratio=0.75,
        decoder_depth=2,
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
    theirs.load_state_dict(their_names(ours))
    ours.eval(), theirs.eval()

    pixels = torch.rand(2, 3, 8, 16, 16)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    clip = (pixels - mean) / std
    out = ours(clip)
    hidden = torch.zeros(2, 64, dtype=torch.bool).scatter(1, out.masked, True)
    expected = theirs(clip.transpose(1, 2), bool_masked_pos=hidden)
    error = target.error(out.prediction, target(pixels, out.masked))

    torch.testing.assert_close(out.prediction, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(error.mean(), expected.loss, rtol=1e-4, atol=1e-6)


def classifiers(mean_pooling: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our classifier and Hugging Face's of the same shape, each with random weights, in evaluation mode."""
    torch.manual_seed(0)
    ours = VisionTransformer(
        size=Size(dim=32, depth=2, heads=4, decoder_dim=0, decoder_heads=0),
        patch=4,
        window=(4, 4, 4),
        num_classes=7,
        mean_pooling=mean_pooling,
    )
    config = transformers.VideoMAEConfig(
        image_size=16,
        patch_size=4,
        num_frames=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        layer_norm_eps=1e-6,
        use_mean_pooling=mean_pooling,
        num_labels=7,
    )
    theirs = transformers.VideoMAEForVideoClassification(config)
    for model in (ours, theirs):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_classifier_equals_huggingface(mean_pooling, direction):
    ours, theirs = classifiers(mean_pooling)
    if direction == "to":
        theirs.load_state_dict(their_names(ours))
    else:
        ours.load_state_dict({plain_name(k): v for k, v in published_names(theirs.state_dict()).items()})
    clip = torch.randn(3, 3, 8, 16, 16)
    logits, expected = ours(clip), theirs(clip.transpose(1, 2)).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_conversion_there_and_back_changes_nothing():
    ours, _ = classifiers(mean_pooling=True)
    state = ours.state_dict()
    back = {plain_name(k): v for k, v in published_names(hugging_face_names(state)).items()}
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
