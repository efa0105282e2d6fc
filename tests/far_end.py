"""A server as the tests need one: it holds models, knows nothing of this library, and runs what is sent to it.

Run as ``python far_end.py <folder of checkpoints> <file for its port>``. It speaks what nnsight's client speaks: a
websocket at /subscribe, a form with the request at /request, and the result back on the websocket.
"""

import base64
import email
import hashlib
import io
import json
import queue
import sys
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

UNKNOWN = ("resid_surgery", "jaxtyping", "beartype", "tiny", "oracle", "shapes")


class NotHere:
    """Refuses to import what a server does not have."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in UNKNOWN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotHere())  # type: ignore[arg-type]

import nnsight  # noqa: E402
import torch  # noqa: E402
import zstandard  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402
from nnsight.tracing.tracer import dec, inc  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

waiting: "queue.Queue[tuple[bool, bytes]]" = queue.Queue()


def result_of(model: Any, meta: dict[str, Any], blob: bytes) -> bytes:
    """Run a request; the values that its block saved."""
    with torch.no_grad():
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), meta["compress"])
        inc()
        try:
            tracer.execute(tracer.info.code)
        finally:
            dec()
    out = io.BytesIO()
    torch.save({"report": tracer.info.frame.f_locals["report"]}, out)
    return zstandard.ZstdCompressor().compress(out.getvalue()) if meta["compress"] else out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    models: ClassVar[dict[str, Any]] = {}

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """A websocket: the session's name, then the result."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.frame(False, json.dumps({"session_id": "1"}).encode())
        self.frame(*waiting.get())
        self.close_connection = True

    def frame(self, binary: bool, data: bytes) -> None:
        """One websocket message."""
        self.wfile.write(bytes([0x82 if binary else 0x81, 127]) + len(data).to_bytes(8, "big") + data)
        self.wfile.flush()

    def do_POST(self) -> None:
        """A request: run it, and hand the result to the websocket."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in email.message_from_bytes(head + body).walk()
            if not part.is_multipart()
        }
        meta = json.loads(parts["data"])
        try:
            name = json.loads(meta["model_key"].partition(":")[2])["repo_id"]
            data = result_of(self.models[name], meta, parts["blob"])
            waiting.put((True, ResponseModel(id="1", status=Status.COMPLETED, data=data).pickle()))
        except Exception as error:  # noqa: BLE001  (whatever it is, the client is told)
            sys.stderr.write(traceback.format_exc())
            sys.stderr.flush()
            said = ResponseModel(id="1", status=Status.ERROR, description=f"{type(error).__name__}: {error}")
            waiting.put((False, said.model_dump_json().encode()))
        reply = ResponseModel(id="1", status=Status.RECEIVED).model_dump_json().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


def opened(folder: Path) -> Any:
    """A checkpoint as nnsight runs it."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    module.config._experts_implementation = "eager"  # the grouped product refuses float64
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))
    return nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation", device="cpu")


def main(folder: str, port_file: str) -> None:
    """Serve every model of a folder, as someone/<its name>, until killed."""
    Handler.models = {f"someone/{path.name}": opened(path) for path in Path(folder).iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(port_file + ".new").write_text(str(server.server_port))
    Path(port_file + ".new").rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
