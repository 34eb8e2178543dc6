"""The command line: ``scaling-perception VERB …``, one line a verb.

Each verb is a module of this package with ``EXAMPLES``, ``add_arguments(parser)`` and ``run(args)``; only the one that
is asked for is imported, so that ``--help`` stays instant. Exit codes: 0 done; 2 the user's input is wrong (one line
says what and how to mend it), or the machine refuses it: no such device, no memory, no permission; 1 a bug or an
outside failure; 130 interrupted; 143 stopped by SIGTERM. Output that nobody reads (``| head``) ends no command.
"""

import gc
import sys
import warnings
from collections.abc import Sequence

from scaling_perception.support.allocation import keep_freed_memory
from scaling_perception.support.compilation import keep_compiled_programs, quiet_libtpu
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.failures import explain, memory_cause
from scaling_perception.support.stopping import answer_signals, end_process, leave_at_once, wait_if_leaving
from scaling_perception.support.streams import keep_standard_streams, one_line, print_message
from scaling_perception.support.verbs import run_verb

VERBS = {
    "quickstart": "the main job end to end on the embedded scenes: data, fine-tuning, compute budgets, report",
    "presets": "every model size: parameters, MACs, layers, width",
    "prepare": "raw dataset to validated manifest or to a sharded latent cache",
    "train": "train or fine-tune from a config; resumes by itself",
    "evaluate": "error of a model on a dataset, by denoising steps and ensemble size",
    "predict": "images, folders or globs to depth, flow or amodal masks on disk",
    "demo": "a local page to try a model on pictures, with the dial of compute",
    "generate": "a picture of samples of a class-conditional model, with guidance",
    "convert": "published checkpoints in, ours out: DiT, DiT-MoE, autoencoders, text encoders",
    "fit": "a scaling law of points in any CSV: parameters with intervals, hold-out, warnings, figure",
    "plan": "the best choice under a budget, by fitted laws: size, training, steps, members; the commands",
    "study": "a grid of runs declared in a config: run, resumed, collected; its cost before",
    "report": "pictures, curves and tables of evaluations as one self-contained HTML page",
    "compile": "ahead of time for a TPU slice that is not here: memory, FLOPs, collectives, step time",
    "bench": "measure speed: ratios in one run on this machine",
    "doctor": "what is wrong with this machine: devices, versions, memory, weights, data",
}
# Each of several processes that run one of these would do all of it, and write the same files.
IN_ONE_PROCESS = ("quickstart", "prepare", "evaluate", "predict", "demo", "generate", "convert", "bench")
# These allocate the same large arrays in every step.
STEPS = (["quickstart"], ["train"], ["bench", "train"])
# Interrupted, these keep what they have finished.
GO_ON = ("quickstart", "prepare", "train", "evaluate", "predict", "study")

MEMORY_HINTS = {
    "predict": "give a smaller --batch-size (images × members at once), or fewer --ensemble members",
    "evaluate": "give a smaller --batch-size (images × members at once), or fewer --ensemble members",
    "generate": "give fewer --classes",
    "prepare": "give a smaller --batch, or fewer --workers",
    "convert": "free some memory; tensors are read one after the other",
}


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {text}" for name, text in VERBS.items()]
    return "\n".join(
        [
            "usage: scaling-perception VERB [options]   (scaling-perception VERB --help shows examples)",
            "",
            "Train, scale, run and study diffusion models for depth, optical flow and amodal segmentation.",
            "",
            *lines,
            "",
            "  --version  print the version",
        ]
    )


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from scaling_perception import __version__

        print(f"scaling-perception {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{did_you_mean(verb, VERBS)}")
    keep_compiled_programs()  # before JAX is imported, as is the next
    quiet_libtpu()
    if verb in IN_ONE_PROCESS and not {"-h", "--help"} & {*rest}:
        from scaling_perception.parallel.joining import refuse_several

        refuse_several(verb)
    return run_verb(verb, rest)


def _note(message: Warning | str, *_: object, **__: object) -> str:
    return one_line(f"note: {' '.join(str(message).split())}") + "\n"


def _warnings_as_notes() -> None:
    """Show Python's warnings, our own and those of libraries, as one line without the place in the source.

    Whoever asks Python for warnings (``-W``, PYTHONWARNINGS) gets Python's own form.
    """
    if not sys.warnoptions:
        warnings.formatwarning = _note


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        words: the command; None: that of this process, which is then ended by SIGINT and SIGTERM at any moment. With
            words the caller's handlers stay, and a KeyboardInterrupt gives 130.
    """
    keep_standard_streams()
    if words is None:
        gc.set_threshold(50_000, 20, 50)  # imports and traced programs are millions of objects that stay
        _warnings_as_notes()
        if any(sys.argv[1 : 1 + len(begin)] == begin for begin in STEPS):
            keep_freed_memory()
        goes_on = sys.argv[1:2] and sys.argv[1] in GO_ON
        again = "the same command goes on from what is finished" if goes_on else "the same command starts anew"
        answer_signals(again)
    try:
        code = _run(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()  # an error of it is told here, not by the interpreter at its end
        if words is None and "jax" in sys.modules and sys.argv[1] in IN_ONE_PROCESS:
            end_process(code)
        return code
    except UserError as error:
        return _refuse(str(error), error.code)
    except KeyboardInterrupt:
        if words is None:  # raised by a verb's own handler
            leave_at_once(130, "scaling-perception: interrupted")
        return _refuse("interrupted", 130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        given = sys.argv[1:] if words is None else words
        hint = MEMORY_HINTS.get(given[0] if given else "", "") if memory_cause(error) else ""
        return _refuse(line + (f": {hint}" if hint else ""))
    finally:
        wait_if_leaving()  # a signal that came while the command ended decides its exit code


def _refuse(line: str, code: int = 2) -> int:
    wait_if_leaving()  # what fails because the process is ending is no news
    print_message(f"scaling-perception: {line}")
    return code
