"""A local page to try a model on pictures: depth, flow, amodal masks, with the dial of compute.

Before a run the page shows which error the model's own table predicts for the chosen compute, with its interval, how
many steps and members that means, and how long it takes on this machine. It works without network, and listens on this
machine alone unless --host says otherwise. Needs Gradio: pip install 'scaling-perception[demo]'.
"""

import argparse

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT, POSITIVE, number_in

EXAMPLES = """
scaling-perception demo
scaling-perception demo --model runs/mine --port 8000
scaling-perception demo --model OWNER/NAME --host 0.0.0.0 --megapixels 4
scaling-perception demo --smoke
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="mini", help="model folder, training run, hub id or name (default mini)")
    group.add_argument("--autoencoder", help="another autoencoder than the model's: name, folder or hub id")
    group.add_argument(
        "--dtype", default="float32", help="of the transformer's products: float32 (default) or bfloat16"
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    group.add_argument(
        "--port", type=number_in("[0, 65535]"), default=7860, help="port; 0 takes a free one (default %(default)s)"
    )
    group = parser.add_argument_group("limits of a request")
    group.add_argument(
        "--megapixels", type=POSITIVE, default=16.0, metavar="X", help="of a picture (default %(default)g)"
    )
    group.add_argument(
        "--megabytes", type=POSITIVE, default=64.0, metavar="X", help="of an uploaded file (default %(default)g)"
    )
    group.add_argument(
        "--waiting", type=COUNT, default=8, metavar="N", help="requests that may wait for their turn (default 8)"
    )
    parser.add_argument("--smoke", action="store_true", help="start, serve one request over HTTP, and end")


def run(args: argparse.Namespace) -> int:
    from scaling_perception.demo.server import check_port, require_gradio, serve

    require_gradio()
    if args.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {args.dtype}: give float32 or bfloat16")
    check_port(args.host, 0 if args.smoke else args.port)
    return serve(args)
