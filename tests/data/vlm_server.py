"""A real multimodal model behind a real endpoint on loopback, as `transformers serve` is, with the standard library.

`transformers serve` itself wants fastapi and uvicorn. One request at a time; pictures come as data URLs.
"""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image


class Model:
    """A checkpoint folder that answers chat requests by sampling. `guided` forces the reply into the asked schema.

    Guided as servers do it that decode under a grammar: the form is right whatever the model says.
    """

    def __init__(self, folder: Path, guided: bool) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self._guided = guided
        self._lock = threading.Lock()
        self.requests = self.pictures = 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": each["role"], "content": _parts(each["content"])} for each in body["messages"]]
        with self._lock:
            self.requests += 1
            self.pictures += sum(part["type"] == "image" for each in messages for part in each["content"])
            text, usage = self._generate(messages, min(body["max_tokens"], 48))
            if self._guided and "response_format" in body:
                text = self._in_form(body["response_format"]["json_schema"]["schema"], text)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        completion = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"]}
        return {**completion, "choices": [choice], "usage": usage}

    def _generate(self, messages: list[dict[str, Any]], max_tokens: int) -> tuple[str, dict[str, int]]:
        import torch

        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = self._model.generate(**inputs, do_sample=True, max_new_tokens=max_tokens)
        length = inputs["input_ids"].shape[1]
        text = self._processor.decode(out[0, length:], skip_special_tokens=True)
        written = out.shape[1] - length
        return text, {"prompt_tokens": length, "completion_tokens": written, "total_tokens": out.shape[1]}

    @staticmethod
    def _in_form(schema: dict[str, Any], text: str) -> str:
        fields = schema["properties"].items()
        return json.dumps({name: text if field["type"] == "string" else len(text) % 10 / 10 for name, field in fields})


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_picture(part["image_url"]["url"]) if part["type"] == "image_url" else part for part in content]


def _picture(url: str) -> dict[str, Any]:
    data = base64.b64decode(url.partition("base64,")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}


@contextmanager
def serve(folder: Path, guided: bool = False) -> Iterator[tuple[str, Model]]:
    """The base URL of an endpoint around the checkpoint in `folder`, and its model, which counts."""
    model = Model(folder, guided)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            reply = model.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", model
        finally:
            server.shutdown()
