"""Pictures of classes from a pre-trained model, with guidance: a look at what pre-training or an import gave.

Perception models draw none: they are asked with `predict`.
"""

import argparse

from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.verbs import NOT_NEGATIVE, SEED, STEPS

EXAMPLES = """
scaling-perception generate --model runs/a1 --out a1.png
scaling-perception generate --model models/dit256 --classes 207,360,387,974 --steps 250 --guidance 4 --out dit.png
"""
OUTPUTS = ("out",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, training run, or hub id")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, all classes on one sheet")
    parser.add_argument(
        "--classes", default="", metavar="I,I,…", help="classes to draw, names or labels (default: eight)"
    )
    parser.add_argument("--steps", type=STEPS, default=50, metavar="T", help="denoising steps (default %(default)s)")
    parser.add_argument(
        "--guidance",
        type=NOT_NEGATIVE,
        default=4.0,
        metavar="S",
        help="1 is none (default %(default)s)",
    )
    parser.add_argument(
        "--channels", type=int, default=3, metavar="N", help="guided channels of 4 (default %(default)s, as DiT)"
    )
    parser.add_argument("--solver", default="ddim", help="ddim, ddpm, dpm++2m or unipc (default %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the noise (default %(default)s)")
    parser.add_argument("--vae", default="", metavar="NAME|DIR", help="autoencoder (default: the model's own)")
    add_overwrite(parser, "a picture")


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args, ("out",), ("model", "vae"))
    check_output(args.out, settings, args.overwrite)
    from scaling_perception.inference.class_pictures import example_classes, grid_of, write_classes
    from scaling_perception.interop.find import find_model
    from scaling_perception.interop.model_folder import load_model

    if not 1 <= args.channels <= 4:
        raise UserError(f"--channels {args.channels}: give 1 to 4")
    params, meta = load_model(find_model(args.model))
    words = [word.strip() for word in args.classes.split(",") if word.strip()]
    names = meta.get("class_names") or []
    labels = [names.index(word) if word in names else int(word) if word.isdecimal() else -1 for word in words]
    if -1 in labels:
        wrong = words[labels.index(-1)]
        raise UserError(
            f"--classes {args.classes}: '{wrong}' is no class{did_you_mean(wrong, names)}; give whole numbers, or "
            "names that the model holds, with commas between them"
        )
    labels = labels or example_classes(meta.get("classes") or meta["model"]["num_classes"], 8)
    how = {"steps": args.steps, "guidance": args.guidance, "channels": args.channels, "solver": args.solver}
    with replacing(args.out, settings) as file:
        pictures = write_classes(file, params, meta, labels, key=args.seed, autoencoder=args.vae, **how)
    print(f"{args.out}: classes {', '.join(map(str, labels))}, {grid_of(len(pictures))} to a row")
    if shown := [f"{label} {names[label]}" for label in labels if label < len(names) and names[label]]:
        print(f"names of the classes: {', '.join(shown)}")
