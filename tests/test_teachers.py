"""Frozen networks as targets: their features are those of the model in the checkpoint, at the same tokens."""

import pytest
import torch
from PIL import Image
from tokenizer import NearestColour, export
from torch.nn.functional import layer_norm
from videos import write_video

from augment import COLOUR_STATISTICS, normalize
from modeling_finetune import create_classifier
from modeling_pretrain import create_pretrain_model
from pictures.panels import BLANK, error_panel
from pictures.reconstruction import reconstruct
from probes import build_classifier
from runs.checkpoints import save_checkpoint
from targets import create_target
from tools import visualize
from tools.demo_report import report_on
from utils import UserError
from weights.names import hugging_face_names
from weights.teachers import Teacher, Tokenizer

SMALL = {"num_frames": 8, "input_size": 32}
WINDOW = (4, 4, 4)
EVERYWHERE = torch.arange(64).expand(2, -1)


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return torch.rand(2, 3, 8, 32, 32)


def save(path, model, **state):
    save_checkpoint(path, {"model": model.state_dict(), **state})
    return str(path)


def shake(model):
    """A model whose norms and biases are not those of its start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "colours"),
    [("pretrain_videomae_tiny_patch8_64", "imagenet"), ("pretrain_mae_st_tiny_patch8_64", "mae_st")],
)
def test_a_pretrained_encoder_of_all_tokens(name, colours, pixels, tmp_path):
    settings = {"name": name, **SMALL}
    model = shake(create_pretrain_model(**settings))
    teacher = Teacher(save(tmp_path / "t.pth", model, model_settings=settings), patch=8, window=WINDOW)
    with torch.no_grad():
        tokens = model.encoder.patch_embed(normalize(pixels, *COLOUR_STATISTICS[colours]))
        expected = model.encoder(tokens, EVERYWHERE, EVERYWHERE[:, :0])
    found = teacher(pixels)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and not teacher.training and not any(p.requires_grad for p in teacher.parameters())

    masked = torch.tensor([[3, 9], [0, 63]])
    target = create_target("features", patch=8, teacher=teacher, **teacher.settings)
    by_hand = torch.stack([expected[b, masked[b]] for b in range(2)])
    torch.testing.assert_close(target(pixels, masked), layer_norm(by_hand, (128,)))


@pytest.mark.parametrize("name", ["vit_tiny_patch8_64", "vit_tiny_mae_st_patch8_64"])
@pytest.mark.parametrize("probe", [None, {"kind": "attentive"}])
def test_a_classifier_has_the_tokens_of_its_last_block(name, probe, pixels, tmp_path):
    settings = {"name": name, "num_classes": 3, **SMALL} | ({"probe": probe} if probe else {})
    model = shake(build_classifier(settings))
    flags = {"imagenet_default_mean_and_std": False}
    teacher = Teacher(save(tmp_path / "t.pth", model, model_settings=settings, args=flags), patch=8, window=WINDOW)
    encoder = model.encoder if probe else model
    with torch.no_grad():
        tokens = encoder.forward_tokens(normalize(pixels, *COLOUR_STATISTICS["mae_st" if "mae_st" in name else "half"]))
        expected = encoder.norm(tokens) if "mae_st" in name else tokens
    torch.testing.assert_close(teacher(pixels), expected)


def test_a_folder_of_hugging_face(tmp_path):
    """It says neither frames nor pixels, so these are those of the model's name."""
    model = shake(create_pretrain_model("pretrain_videomae_tiny_patch8_64"))
    torch.save(hugging_face_names(model.state_dict()), tmp_path / "pytorch_model.bin")
    teacher = Teacher(str(tmp_path), patch=8, window=(8, 8, 8))
    clip = torch.rand(1, 3, 16, 64, 64)
    with torch.no_grad():
        index = torch.arange(512)[None]
        expected = model.encoder(model.encoder.patch_embed(normalize(clip)), index, index[:, :0])
    torch.testing.assert_close(teacher(clip), expected)


def test_it_computes_in_the_mixed_precision_of_the_run(pixels, tmp_path):
    settings = {"name": "vit_tiny_patch8_64", "num_classes": 3, **SMALL}
    file = save(tmp_path / "t.pth", shake(create_classifier(**settings)), model_settings=settings)
    teacher = Teacher(file, patch=8, window=WINDOW).place(torch.device("cpu"), torch.bfloat16)
    exact = Teacher(file, patch=8, window=WINDOW)(pixels)
    assert not torch.equal(teacher(pixels), exact)
    torch.testing.assert_close(teacher(pixels).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("patch", [8, 16])
def test_another_patch_or_grid_is_refused(patch, tmp_path):
    settings = {"name": "vit_tiny_patch8_64", "num_classes": 3, **SMALL}
    file = save(tmp_path / "t.pth", create_classifier(**settings), model_settings=settings)
    with pytest.raises(
        UserError, match=r"--teacher .*t.pth has 4 x 4 x 4 tokens of 2 x 8 x 8 .* this model has 4 x 2 x 2"
    ):
        Teacher(file, patch=patch, window=(4, 2, 2))


@pytest.mark.parametrize("batch", [None, 3])
def test_a_tokenizer_gives_the_ids_of_masked_tokens(batch, tmp_path):
    """In batches of any size, also where it takes three clips at a time."""
    network = export(tmp_path / "t.pt2", batch=batch)
    tokenizer = Tokenizer(str(tmp_path / "t.pt2"), patch=8, window=WINDOW, vocab=16, batch=None)
    tokenizer.place(torch.device("cpu"), torch.bfloat16)
    target = create_target("tokens", patch=8, teacher=tokenizer, **tokenizer.settings)
    for size in (1, 3, 4):
        pixels, masked = torch.rand(size, 3, 8, 32, 32), torch.tensor([[2, 5, 63]]).expand(size, -1)
        assert torch.equal(target(pixels, masked), network(pixels)[:, [2, 5, 63]])

    found, prediction = target(pixels, masked), torch.randn(4, 3, 16)
    expected = -prediction.log_softmax(2).gather(2, found[:, :, None])[:, :, 0]
    torch.testing.assert_close(target.error(prediction, found, "l1"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_are_those_of_the_cpu(pixels, tmp_path):
    settings = {"name": "vit_tiny_patch8_64", "num_classes": 3, **SMALL}
    file = save(tmp_path / "t.pth", shake(create_classifier(**settings)), model_settings=settings)
    expected, gpu = Teacher(file, patch=8, window=WINDOW)(pixels), torch.device("cuda")
    found = Teacher(file, patch=8, window=WINDOW).place(gpu, None)(pixels.to(gpu))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)

    network = export(tmp_path / "t.pt2", batch=None)
    tokenizer = Tokenizer(str(tmp_path / "t.pt2"), patch=8, window=WINDOW, vocab=16, batch=None).place(gpu, None)
    assert (tokenizer(pixels.to(gpu)).cpu() == network(pixels)).float().mean() > 0.99


def test_a_program_of_another_kind_is_refused(tmp_path):
    class Float(NearestColour):
        def forward(self, pixels):
            return super().forward(pixels).float()

    class Pair(NearestColour):
        def forward(self, pixels, more):
            return super().forward(pixels), more

    pixels = torch.rand(2, 3, 8, 32, 32)
    for network, inputs in ((Float(), (pixels,)), (Pair(), (pixels, pixels))):
        torch.export.save(torch.export.export(network, inputs), tmp_path / "t.pt2")
        with pytest.raises(UserError, match=r"t.pt2 takes .* and gives .*, this model needs \(B, 3, 8"):
            Tokenizer(str(tmp_path / "t.pt2"), patch=8, window=WINDOW, vocab=16, batch=None)


def test_pictures_with_and_without_the_teacher(tmp_path, capsys):
    torch.manual_seed(0)
    settings = {"name": "pretrain_videomae_tiny_patch8_64", **SMALL}
    teacher = save(tmp_path / "t.pth", create_pretrain_model(**settings), model_settings=settings)
    other = save(tmp_path / "o.pth", create_pretrain_model(**settings), model_settings=settings)
    settings |= {"target": "features", "target_settings": Teacher(teacher, patch=8, window=WINDOW).settings}
    student = save(tmp_path / "s.pth", create_pretrain_model(**settings), model_settings=settings)
    video = write_video(tmp_path / "a.mp4", 30)

    def arguments(*flags):
        given = ["--model", student, str(video), "--output", str(tmp_path / "out"), "--device", "cpu", *flags]
        return visualize.parse_args(given)

    held = torch.load(student, weights_only=True)
    for flags in ([], ["--teacher", teacher]):
        assert visualize.draw(arguments(*flags, "--compare_masks")) == 0
        assert Image.open(tmp_path / "out" / "a.png").width > 500
        model, shown, _ = visualize.load_model(arguments(*flags))
        panel = error_panel(reconstruct(model, torch.rand(1, 3, 8, 32, 32), shown))
        blank = (panel.frames == BLANK).all()
        assert blank == (not flags) and ("unknown without --teacher of sha256" in panel.label.notes[0]) == blank
    with pytest.raises(
        UserError, match=r"this is the --teacher of sha256 .*, the model was trained with the --teacher of"
    ):
        visualize.load_model(arguments("--teacher", other))

    def error_is_known(file) -> bool:  # the checkpoint's run had this file, and no flag names one
        torch.save({**held, "args": {"teacher": str(file)}}, student)
        return visualize.load_model(arguments())[1].target.ready

    assert error_is_known(teacher) and not error_is_known(other) and not error_is_known(tmp_path / "gone.pth")
    assert "the model was trained with" in capsys.readouterr().err


def test_the_report_refuses_a_model_that_needs_its_teacher(tmp_path):
    settings = {"name": "pretrain_videomae_tiny_patch8_64", **SMALL, "target": "features"}
    settings |= {"target_settings": {"width": 8, "network": "--teacher of sha256 12"}}
    save(tmp_path / "checkpoint-0.pth", create_pretrain_model(**settings), model_settings=settings)
    with pytest.raises(UserError, match="its error is unknown without --teacher of sha256 12"):
        report_on({"a": tmp_path}, tmp_path / "test.csv", tmp_path)
