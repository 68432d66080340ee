"""Exports a model for other libraries: Hugging Face's transformers, the hub, the published code.

    python tools/export.py --model output/checkpoint-best.pth --output exported --to huggingface --license mit
    python tools/export.py --model output/checkpoint-799.pth --output exported --to native --push org/name

Reads the checkpoints that predict.py and visualize.py read, and writes a folder:

    huggingface  config.json, preprocessor_config.json, model.safetensors: a classifier of AdaMAE or VideoMAE becomes
                 `VideoMAEForVideoClassification`, also for `pipeline("video-classification")`; the encoder and decoder
                 of a pre-training model become `VideoMAEForPreTraining`, without AdaMAE's sampler
    native       config.json, model.safetensors: the whole model, for `weights.native.PretrainingModel.from_pretrained`
                 and `Classifier.from_pretrained`
    published    checkpoint.pth: the weights under the names of the published code, without the optimiser

and README.md, the model card. The first two folders and the last one's file can be given to --finetune and to the tools
here. A linear probe becomes the classifier that it is; of an attentive one only `published` keeps the pooling.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from runs.checkpoints import save_checkpoint
from tools.exporting.card import choose_licence, model_card
from tools.exporting.exported import Exported, read_model
from tools.exporting.huggingface import to_huggingface
from tools.inference.trained import run_tool
from utils import whole_file
from weights.hub import push
from weights.native import Classifier, PretrainingModel


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("export.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="checkpoint, as of predict.py or visualize.py")
    add("--model_key", default="model|module", help="key of the weights in it, e.g. model_ema (default: %(default)s)")
    add("--to", required=True, choices=list(EXPORTS), help="see above")
    add("--output", required=True, metavar="FOLDER", help="folder to write")
    add("--labels", metavar="FILE", help="file of class names, one per line, from class 0 (default: the checkpoint's)")
    add("--license", metavar="NAME",
        help="licence of the weights, by the hub's name for it (default: mit for a run from random weights)")
    add("--push", default="", metavar="ORG/NAME",
        help="also upload the folder to this repository of the Hugging Face hub, public where it is new")
    return parser
# fmt: on


def to_native(exported: Exported, folder: Path) -> list[str]:
    exported.check_no_pool()
    kind = Classifier if exported.is_classifier else PretrainingModel
    names = dict(enumerate(exported.found.class_names))
    kind.of(exported.model, exported.settings, exported.training, names).save_pretrained(folder)
    return []


def to_published(exported: Exported, folder: Path) -> list[str]:
    about = {"args": exported.training, "class_names": list(exported.found.class_names)}
    state = {"model": exported.model.state_dict(), "model_settings": exported.settings, **about}
    save_checkpoint(folder / "checkpoint.pth", state)
    return []


# Kinds of export: each writes its files to a folder, and returns notes for the card.
EXPORTS: dict[str, Callable[[Exported, Path], list[str]]] = {
    "huggingface": to_huggingface,
    "native": to_native,
    "published": to_published,
}


def export(args: argparse.Namespace) -> int:
    """Writes the folder, and uploads it where the flags say so."""
    exported, folder = read_model(args.model, model_key=args.model_key, labels=args.labels), Path(args.output)
    licence = choose_licence(args.license, exported.found)
    folder.mkdir(parents=True, exist_ok=True)
    notes = EXPORTS[args.to](exported, folder)
    card = model_card(exported.found, to=args.to, classifier=exported.is_classifier, licence=licence, notes=notes)
    with whole_file(folder / "README.md", "w") as file:
        file.write(card)
    print("\n  ".join([f"{args.model} -> {', '.join(sorted(str(path) for path in folder.iterdir()))}", *notes]))
    if args.push:
        print(push(folder, args.push))
    return 0


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    run_tool("export.py", lambda: export(args))


if __name__ == "__main__":
    main()
