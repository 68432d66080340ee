"""Starting from image ViTs of timm: their tokens, block outputs and positions, and what can't be taken."""

import pytest
import timm
import torch
from programs import start
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as ImageViT
from videos import write_list, write_videos

from augment import normalize
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from run_class_finetuning import main
from runs.checkpoints import CheckpointError, save_checkpoint
from utils import SettingError
from weights import images
from weights.classifier import load_classifier, load_classifier_weights
from weights.names import load_weights
from weights.positions import resize_positions
from weights.pretraining import load_pretraining_weights
from weights.teachers import Teacher

TINY, TINY_MAE_ST = "vit_tiny_patch8_64", "vit_tiny_mae_st_patch8_64"


def image_vit(**settings) -> ImageViT:
    """A ViT for images of 32 pixels, with as wide and many blocks as our tiny one, every parameter random."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, **settings}
    model = ImageViT(num_classes=10, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def save(tmp_path, model, name="vit.pth", **more):
    save_checkpoint(tmp_path / name, {"model": {**model.state_dict(), **more}})
    return tmp_path / name


def classifier(name=TINY, **settings):
    return create_classifier(name, num_classes=5, **{"num_frames": 8, "input_size": 32, **settings}).eval()


def begin(model, path, how="mean"):
    found = images.inflate(load_weights(path), model, how)
    return load_classifier_weights(model, found, lambda text: None)


def still(image: torch.Tensor, frames: int) -> torch.Tensor:
    return image[:, :, None].expand(-1, -1, frames, -1, -1)  # (B,3,T,H,W)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["mean", "center"])
@pytest.mark.parametrize("tubelet", [1, 2, 4])
@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
def test_a_still_clip_has_the_images_tokens_in_every_slot(tmp_path, name, tubelet, how):
    source, model, image = image_vit(), classifier(name, tubelet=tubelet), torch.randn(2, 3, 32, 32)
    begin(model, save(tmp_path, source), how)
    tokens = model.patch_embed(still(image, 8)).unflatten(1, (8 // tubelet, -1))  # (B,T',n,D)
    close(tokens, source.patch_embed(image)[:, None].expand_as(tokens))


@pytest.mark.parametrize(("tubelet", "middle"), [(1, 0), (2, 1), (4, 2), (8, 4)])
def test_center_sees_the_middle_frame_alone(tmp_path, tubelet, middle):
    source, model, clip = image_vit(), classifier(tubelet=tubelet), torch.randn(2, 3, 8, 32, 32)
    begin(model, save(tmp_path, source), "center")
    tokens = model.patch_embed(clip).unflatten(1, (8 // tubelet, -1))
    for slot in range(8 // tubelet):
        close(tokens[:, slot], source.patch_embed(clip[:, :, slot * tubelet + middle]))


@pytest.mark.parametrize("name", [TINY, TINY_MAE_ST])
@pytest.mark.parametrize("slots", [1, 3])
def test_blocks_compute_what_those_of_the_image_do(tmp_path, name, slots):
    """Though ours may have no key bias; equal slots attend to copies, which changes nothing either."""
    source, model = image_vit(), classifier(name, num_frames=2 * slots)
    report = begin(model, save(tmp_path, source))
    assert all(name in report.loaded for name in model.state_dict() if name.startswith("blocks."))
    image = torch.randn(2, 3, 32, 32)
    theirs = source.blocks(source.patch_embed(image))[:, None]  # (B,1,n,D)
    ours = model.blocks(model.patch_embed(still(image, 2 * slots))).unflatten(1, (slots, -1))
    close(ours, theirs.expand_as(ours))


@pytest.mark.parametrize("class_row", [True, False])
@pytest.mark.parametrize("pos_embed", ["separable", "learnable"])
def test_mae_st_computes_what_the_image_model_does(tmp_path, pos_embed, class_row):
    """With one time slot, class token and learned positions the whole network is the image's."""
    source = image_vit(no_embed_class=not class_row)
    model, image = classifier(TINY_MAE_ST, num_frames=2, pos_embed=pos_embed), torch.randn(2, 3, 32, 32)
    report = begin(model, save(tmp_path, source))
    assert report.fresh == ["head.weight", "head.bias"]
    tokens = model.norm(model.forward_tokens(still(image, 2)))
    close(tokens, source.forward_features(image)[:, 1:])


def test_positions_are_the_images_for_space_and_zero_for_time(tmp_path):
    """Another number of pixels resizes those for space."""
    source, model = image_vit(), classifier(TINY_MAE_ST, input_size=64)
    report = begin(model, save(tmp_path, source))
    space = resize_positions(source.pos_embed[:, 1:].detach(), (1, 4, 4), (1, 8, 8))
    close(model.pos_embed_spatial.detach(), space)
    assert not model.pos_embed_temporal.any() and model.pos_embed_temporal.shape == (1, 4, 128)
    assert torch.equal(model.pos_embed_class, source.pos_embed[:, :1])
    assert report.notes == ["pos_embed_spatial resized from 1x4x4 to 1x8x8 tokens"]


def test_one_learned_table_repeats_the_images(tmp_path):
    source, model = image_vit(), classifier(pos_embed="learnable")
    begin(model, save(tmp_path, source))
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:].repeat(1, 4, 1))


def test_the_report_of_a_model_with_fixed_positions(tmp_path):
    source, model = image_vit(), classifier()
    report = begin(model, save(tmp_path, source), "center")
    assert report.source == f"{tmp_path / 'vit.pth'}: image ViT classifier (inflated: center) checkpoint"
    assert report.fresh == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    left = {"cls_token", "pos_embed", "head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert set(report.ignored) == left


def test_a_head_of_as_many_classes_is_left_out_too(tmp_path):
    model = create_classifier(TINY, num_classes=10, num_frames=8, input_size=32)
    before = model.head.weight.clone()
    begin(model, save(tmp_path, image_vit()))
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("form", ["timm's file", "MAE's file", "average pooling"])
def test_every_form_of_file(tmp_path, form):
    source, model = image_vit(**({"global_pool": "avg"} if form == "average pooling" else {})), classifier(TINY)
    if form == "timm's file":
        path = tmp_path / "model.safetensors"
        save_file(source.state_dict(), path)
    else:
        decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128)}
        path = save(tmp_path, source, **({} if form == "average pooling" else decoder))
    report = begin(model, path)
    kind = {"MAE's file": "pre-training"}.get(form, "classifier")
    assert f"image ViT {kind} (inflated: mean)" in report.source
    assert torch.equal(model.blocks[3].mlp.fc2.weight, source.blocks[3].mlp.fc2.weight)
    assert ("fc_norm.weight" in report.loaded) == (form == "average pooling")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embed_dim": 192, "num_heads": 3}, r"width 192, 4 blocks, patch 8.*: patch_embed.proj.weight is \(192, "),
        ({"patch_size": 16}, r"patch 16.*\(128, 3, 2, 16, 16\) in the file and \(128, 3, 2, 8, 8\) in the model"),
        ({"depth": 5}, r"5 blocks.*: blocks\.4\.\S* is not in the model"),
        ({"init_values": 0.1}, r"blocks\.0\.ls1\.gamma is not in the model"),
        ({"pre_norm": True}, "image ViT classifier checkpoint with norm_pre, which no model here has"),
        ({"reg_tokens": 2}, "with reg_token, which no model here has"),
    ],
    ids=["width", "patch", "depth", "layer scale", "norm before", "registers"],
)
def test_what_does_not_fit_is_one_line(tmp_path, settings, words):
    path = save(tmp_path, image_vit(**settings))
    with pytest.raises(CheckpointError, match=words) as caught:
        begin(classifier(), path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_grid_that_is_no_square_is_refused(tmp_path):
    path = save(tmp_path, image_vit(img_size=(32, 40)))
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 21, 128\) is no square grid"):
        begin(classifier(TINY_MAE_ST), path)
    begin(classifier(), path)  # does without


def test_nothing_but_fine_tuning_takes_images(tmp_path):
    found = load_weights(save(tmp_path, image_vit()))
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", num_frames=8, input_size=32)
    for load in (lambda: load_pretraining_weights(model, found), lambda: load_classifier(found, headless=True)):
        with pytest.raises(CheckpointError, match="image ViT classifier checkpoint: only fine-tuning can start"):
            load()


@pytest.mark.parametrize("class_token", [True, False])
def test_a_teacher_gives_the_images_own_features_slot_by_slot(tmp_path, class_token):
    source = image_vit(**({} if class_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}))
    teacher = Teacher(str(save(tmp_path, source)), patch=8, window=(3, 4, 4))
    pixels = torch.rand(2, 3, 6, 32, 32)
    images = normalize(pixels).unflatten(2, (3, 2)).mean(3).transpose(1, 2)  # (B,T',3,H,W), means of slots
    theirs = source.forward_features(images.flatten(0, 1))[:, -16:].unflatten(0, (2, 3)).flatten(1, 2)  # (B,N,D)
    close(teacher(pixels), theirs)
    assert teacher.settings["width"] == 128


def test_a_teacher_of_another_patch_or_size_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"--teacher .* 3 x 2 x 2 tokens of 2 x 8 x 8 .* they must agree"):
        Teacher(str(save(tmp_path, image_vit())), patch=16, window=(3, 2, 2))
    with pytest.raises(CheckpointError, match="3 blocks of width 128, which no model here has"):
        Teacher(str(save(tmp_path, image_vit(depth=3))), patch=8, window=(3, 4, 4))


# --- the program --------------------------------------------------------------------------------------------

RUN = [
    *("--model", TINY, "--input_size", "32", "--num_frames", "4", "--data_set", "custom", "--nb_classes", "2"),
    *("--batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--sampling_rate", "1", "--num_sample", "1"),
    *("--num_workers", "0", "--amp", "off", "--device", "cpu", "--decoder", "pyav"),
    *("--test_num_segment", "1", "--test_num_crop", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, 4 * [8], size=(40, 48))
    for split in ("train", "val", "test"):
        write_list(folder / f"{split}.csv", *(f"{name} {i % 2}" for i, name in enumerate(names)))
    return folder


def finetune(data, *flags):
    return start(main, *RUN, "--data_path", data, *flags)


def test_a_run_from_a_file_and_from_a_name(data, tmp_path, monkeypatch):
    source, asked = image_vit(), []
    done = finetune(data, "--finetune", save(tmp_path, source), "--inflate", "center")
    assert done.returncode == 0 and "image ViT classifier (inflated: center) checkpoint" in done.stdout, done.stderr
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append((name, pretrained)) or source)
    done = finetune(data, "--finetune", "timm:vit_any.mae", "--linear_probe")
    assert done.returncode == 0 and asked == [("vit_any.mae", True)], done.stderr
    assert "timm:vit_any.mae: image ViT classifier (inflated: mean) checkpoint" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Unknown model (vit_bose)"), "(Unknown model (vit_bose))"),
        (OSError("An error happened\nMore of it"), "(An error happened)"),
        (ConnectionError(), "(ConnectionError)"),
    ],
)
def test_a_hub_that_can_not_be_reached_is_one_line(data, monkeypatch, error, words):
    def fail(name, pretrained):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    done = finetune(data, "--finetune", "timm:vit_bose")
    assert done.returncode == 1 and f"timm:vit_bose can't be loaded {words}: check the name" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_image_model_can_not_be_tested(data, tmp_path):
    done = finetune(data, "--eval", "--finetune", save(tmp_path, image_vit()))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "vit.pth" in done.stderr
