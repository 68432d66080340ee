"""Frozen networks that make targets for pre-training (`targets.Features`, `targets.Tokens`), from their files."""

import hashlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from augment import COLOUR_STATISTICS, normalize
from masking_generator import Window
from modeling_blocks import TUBELET
from modeling_finetune import CLASSIFIERS, colour_statistics
from modeling_pretrain import PretrainVisionTransformer
from probes import Probe
from utils import SettingError, gather_from_ranks
from weights.classifier import classifier_settings, load_classifier
from weights.images import TIMM, ImageEncoder, load_timm
from weights.names import IMAGE_VIT, load_weights, weights_file


class Teacher(nn.Module):
    """The encoder of a checkpoint: clips (B,3,T,H,W) float32 in [0,1] -> features (B,N,D) of the last block.

    Where the checkpoint has a norm of tokens they go through it: in pre-training, MAE-ST, and classifiers of the first
    token. The `fc_norm` of other classifiers is left out, since it normalises the mean of all tokens.

    Args:
        file: a checkpoint that `load_weights` reads, of pre-training or of a classifier; or an image ViT of timm, as a
            file or `timm:<name>`, which encodes each time slot alone (`ImageEncoder`).
        patch, window: of the model to train: side of a token in pixels, tokens (T',H',W').

    Raises:
        CheckpointError: as `load_weights`, `load_classifier` and `ImageEncoder`.
        SettingError: its tokens are not those of the model to train.
    """

    amp: torch.dtype | None = None  # of mixed precision

    def __init__(self, file: str, *, patch: int, window: Window):
        super().__init__()
        found = load_timm(file) if file.startswith(TIMM) else load_weights(file)
        if found.kind.startswith(IMAGE_VIT):
            self.encoder, statistics = ImageEncoder(found, window=window), "imagenet"
        else:
            model = load_classifier(found, headless=True, report=lambda text: None)
            self.encoder = model.encoder if isinstance(model, Probe) else model
            statistics = CLASSIFIERS[classifier_settings(found)["name"]].statistics
        theirs = (*self.encoder.patch_embed.proj.kernel_size, *self.encoder.window)
        if theirs != (ours := (TUBELET, patch, patch, *window)):
            raise SettingError(
                f"--teacher {file} has {describe(*theirs)}, this model has {describe(*ours)}; they must agree "
                "(--model, --input_size, --num_frames)"
            )
        self.norm = nn.Identity()
        if "norm.weight" in found.plain:
            self.norm = nn.LayerNorm(self.encoder.dim, eps=1e-6)
            self.norm.load_state_dict({name: found.plain[f"norm.{name}"] for name in ("weight", "bias")})
        imagenet = found.flags.get("imagenet_default_mean_and_std", True)
        self.colours = COLOUR_STATISTICS[colour_statistics(statistics, imagenet=imagenet)]
        network = file if file.startswith(TIMM) else f"of sha256 {sha256(weights_file(file))}"
        self.settings = {"width": self.encoder.dim, "network": f"--teacher {network}"}
        self.requires_grad_(False).eval()

    def place(self, device: torch.device, amp: torch.dtype | None) -> "Teacher":
        """Moves it to a device; `amp` is the type of its mixed precision, if any."""
        self.amp = amp
        return self.to(device)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B,N,D) of clips (B,3,T,H,W)."""
        with torch.autocast(pixels.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.norm(self.encoder.forward_tokens(normalize(pixels, *self.colours)))


class Tokenizer:
    """A program of `torch.export.save`: clips (B,3,T,H,W) float32 in [0,1] -> ids (B,N) int64, in (t,h,w) order.

    It computes in the precision that it was exported in.

    Args:
        file: the program. Loading it can run code that it holds.
        patch, window: of the model to train: side of a token in pixels, tokens (T',H',W').
        vocab: number of ids.
        batch: clips of a training batch; None: any number.

    Raises:
        SettingError: it is no program, or not one for these clips, tokens and batches.
    """

    def __init__(self, file: str, *, patch: int, window: Window, vocab: int | None, batch: int | None):
        if vocab is None:
            raise SettingError("--tokenizer_vocab is missing: the number of ids of --tokenizer")
        t, h, w = window
        self.file, self.vocab, self.tokens = file, vocab, t * h * w
        self.program = read_program(file)
        clips, ids = (3, t * TUBELET, h * patch, w * patch), (self.tokens,)
        self.batch = fixed_batch(file, self.program, clips, ids)
        if batch and self.batch and batch % self.batch:
            raise SettingError(
                f"--tokenizer {file} takes {self.batch} clips at a time, which does not divide the {batch} of a batch "
                "(--batch_size x --num_sample): export it with a dynamic batch"
            )
        self.settings = {"width": vocab, "network": f"--tokenizer of sha256 {sha256(Path(file))}"}
        self.checked = False

    def place(self, device: torch.device, amp: torch.dtype | None) -> "Tokenizer":
        """Moves it to a device; mixed precision does not concern it."""
        self.module = move_to_device_pass(self.program, str(device)).module()
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Ids (B,N) of clips (B,3,T,H,W); where it takes a fixed number of clips, the last part is filled up.

        Raises:
            SettingError: the first ids are not (B,N), or not below the vocabulary.
        """
        size = self.batch or len(pixels)
        filling = pixels[:1].expand(-len(pixels) % size, -1, -1, -1, -1)
        parts = torch.cat([pixels, filling]).split(size)
        ids = torch.cat([self.module(part) for part in parts])[: len(pixels)]  # (B,N)
        if not self.checked:  # once, since it waits for the device
            self.checked = True
            if ids.shape[1:] != (self.tokens,):
                raise SettingError(f"--tokenizer {self.file} gives {ids.shape[1]} ids a clip, not {self.tokens}")
            least, most = (x.item() for x in ids.aminmax())
            if least < 0 or most >= self.vocab:
                raise SettingError(
                    f"--tokenizer {self.file} gives the ids {least} to {most}: --tokenizer_vocab {self.vocab}"
                )
        return ids


def read_program(file: str) -> ExportedProgram:
    """Reads a program of `torch.export.save`.

    Raises:
        SettingError: there is none, or it can't be read.
    """
    try:
        with ZipFile(file) as archive:  # torch would print pages about another file
            if not any(name.endswith("archive_format") for name in archive.namelist()):
                raise BadZipFile("no archive_format in it")
        return torch.export.load(file)
    except Exception as error:  # a damaged file can make torch raise any exception
        reason = str(error).splitlines()[0]
        raise SettingError(f"--tokenizer {file} is not a readable program of torch.export.save ({reason})") from error


def fixed_batch(file: str, program: ExportedProgram, clips: tuple[int, ...], ids: tuple[int, ...]) -> int | None:
    """The number of clips that a program takes at a time, None for any.

    Args:
        clips, ids: what it must take and give, without the batch; only sizes that are not dynamic are compared.

    Raises:
        SettingError: it takes or gives something else.
    """
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    takes = [nodes.get(name) for name in program.graph_signature.user_inputs]
    gives = [nodes.get(name) for name in program.graph_signature.user_outputs]
    if not (is_one(takes, clips, torch.float32) and is_one(gives, ids, torch.int64)):
        needs = f"(B, {', '.join(map(str, clips))}) float32 and (B, {ids[0]}) int64"
        raise SettingError(
            f"--tokenizer {file} takes {in_words(takes)} and gives {in_words(gives)}, this model needs {needs} "
            "(--model, --input_size, --num_frames)"
        )
    batch = takes[0].shape[0]
    return batch if isinstance(batch, int) else None


def is_one(values: list, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether there is one tensor, of this type and, but for the batch and dynamic sizes, of this shape."""
    if len(values) != 1 or not isinstance(values[0], Tensor):
        return False
    sizes = values[0].shape[1:]
    same = all(size == wanted for size, wanted in zip(sizes, shape) if isinstance(size, int))
    return values[0].dtype == dtype and len(sizes) == len(shape) and same


def in_words(values: list) -> str:
    """Shapes and types of tensors, with "any" for a dynamic size."""
    texts = []
    for value in values:
        sizes = [str(n) if isinstance(n, int) else "any" for n in getattr(value, "shape", ())]
        texts.append(f"({', '.join(sizes)}) {str(getattr(value, 'dtype', 'no tensor')).removeprefix('torch.')}")
    return " and ".join(texts) or "nothing"


def load_frozen(
    target: str,
    *,
    patch: int,
    window: Window,
    teacher: str = "",
    tokenizer: str = "",
    vocab: int | None = None,
    batch: int | None = None,
) -> Teacher | Tokenizer | None:
    """Loads the frozen network of a target; None for a target without one.

    Its `settings` are those of the target that the model to train must remember.

    Args:
        teacher, tokenizer: files; the others as in `Teacher` and `Tokenizer`.

    Raises:
        CheckpointError, SettingError: as those; or there is no file for the target, or one for another target.
    """
    for owner, flag, file in (("features", "teacher", teacher), ("tokens", "tokenizer", tokenizer)):
        if bool(file) != (target == owner):
            raise SettingError(f"--target {target} {f'takes no --{flag}' if file else f'needs --{flag} FILE'}")
    if teacher:
        return Teacher(teacher, patch=patch, window=window)
    return Tokenizer(tokenizer, patch=patch, window=window, vocab=vocab, batch=batch) if tokenizer else None


def load_same(settings: dict, model: PretrainVisionTransformer, **files: str) -> Teacher | Tokenizer:
    """Loads the frozen network of a trained model and its settings again; `files` as in `load_frozen`.

    Raises:
        CheckpointError, SettingError: as `load_frozen`, or it is another network.
    """
    trained = settings.get("target_settings", {})
    target, vocab = settings.get("target", "pixels"), trained.get("width")
    found = load_frozen(target, patch=model.patch, window=model.window, vocab=vocab, **files)
    if found.settings != trained:
        raise SettingError(
            f"this is the {found.settings['network']}, the model was trained with the {trained['network']}"
        )
    return found


def check_same_on_all_ranks(teacher: Teacher | Tokenizer) -> None:
    """Checks that all processes have read the same file; all of them call it together.

    Raises:
        SettingError: they have not.
    """
    found = gather_from_ranks(teacher.settings["network"])
    if len(set(found)) > 1:
        listed = ", ".join(f"rank {rank}: {network}" for rank, network in enumerate(found))
        raise SettingError(f"the processes have read different files ({listed}): all machines must see the same one")


def describe(tubelet: int, height: int, width: int, *window: int) -> str:
    grid = " x ".join(map(str, window))
    return f"{grid} tokens of {tubelet} x {height} x {width} (frames x pixels)"


def sha256(file: Path) -> str:
    """The first 16 digits of a file's checksum."""
    checksum = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()[:16]
