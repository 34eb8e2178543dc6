"""One request over HTTP to a page that is served: the page itself, one of its files, a prediction, a download."""

import hashlib
import re
import urllib.request
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read()


def one_request(address: str, session: Any) -> str:
    """Ask as a browser would, with the first example; returns what came, in one line.

    Raises:
        UserError: the page, one of its files, the prediction or a download did not come.
    """
    from gradio_client import Client, handle_file  # pyright: ignore[reportMissingImports]

    from scaling_perception.demo.parts import EXAMPLES, example

    page = _get(f"{address}/").decode()
    script = re.search(r'src="\./(assets/[^"]+\.js)"', page)
    if script is None or not _get(f"{address}/{script[1]}"):
        raise UserError(f"{address} serves no page: install Gradio again (pip install 'scaling-perception[demo]')")
    name = next((name for name in session.tasks if get_task(name).prompt is None), session.tasks[0])
    ends = [".jpg"]
    if (prompt := get_task(name).prompt) is not None:
        ends.append("_next.jpg" if prompt.frame else "_visible.png")
    given: dict[str, Any] = dict(
        zip(("picture", "second"), (handle_file(example(EXAMPLES[0], end)) for end in ends), strict=False)
    )
    if prompt is not None and not prompt.frame:
        given["mask"], given["way"] = given.pop("second"), "Mask file"
    client = Client(address, verbose=False)
    found = client.predict(**given, api_name=f"/{name}")
    files = next(one for one in found if isinstance(one, list) and str(one[-1]).endswith(".json"))
    kinds = sorted({Path(file).suffix for file in files})
    total = sum(Path(file).stat().st_size for file in files)
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]
    what = f"{len(files)} files ({', '.join(kinds)}), {total} bytes, sha256 {digest}"
    return f"smoke: {address} served its page and {name} of 1 picture: {what}"
