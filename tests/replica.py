"""A server that behaves like a vLLM replica, as far as ``VllmServers`` looks, and fails on demand."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import safetensors.torch

from igpo_fast.engines.fingerprint import fingerprint


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted; the default of 5 refuses some


class Replica:
    """Answers a request with tokens that follow from its seed alone: ``tokens_of``.

    ``dies_at`` ends it in the middle of that generation (1 is the first); ``answers`` overrides the status and body of
    routes.
    """

    def __init__(self, port: int = 0):
        self.log: list[str] = []
        self.version, self.tensors, self.updating = "default", {}, False
        self.dies_at, self.generations = None, 0
        self.stop_string: str | None = None
        """What it takes for a stop string that ended a turn, where any is asked for."""
        self.answers: dict[str, tuple[int, dict]] = {}
        self.about = {
            "dtype": "float32", "logprobs_mode": "processed_logprobs", "max_tokens": 64, "transfer": "igpo",
        }  # fmt: skip
        self._lock = threading.Lock()
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                answer = replica.answer(self.path.lstrip("/"), body)
                if answer is None:  # the process is gone: nothing comes back
                    self.close_connection = True
                    return
                status, found = answer
                content = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = _Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.dead = False

    def kill(self):
        self.dead = True
        threading.Thread(target=self._server.shutdown).start()
        self._server.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict] | None:
        with self._lock:
            name = body["method"] if path == "collective_rpc" else path
            self.log.append(name)
            if path == "inference/v1/generate":
                self.generations += 1
                if self.generations == self.dies_at:
                    self.kill()
            if self.dead:
                return None
            if name in self.answers:
                return self.answers[name]
            return 200, getattr(self, "on_" + name.replace("/", "_"))(body)

    def on_igpo_about(self, body):
        return {"results": [self.about | {"updating": self.updating}]}

    def on_igpo_fingerprints(self, body):
        return {"results": [{name: fingerprint(tensor) for name, tensor in self.tensors.items()}]}

    def on_abort_requests(self, body):
        return {}

    def on_reset_prefix_cache(self, body):
        return {"success": self.log.count("reset_prefix_cache") > 1}  # at first, blocks are still held

    def on_start_weight_update(self, body):
        assert not self.updating
        self.updating = True
        return {}

    def on_update_weights(self, body):
        assert self.updating
        self.tensors |= safetensors.torch.load(base64.b64decode(body["update_info"]["safetensors"]))
        return {}

    def on_finish_weight_update(self, body):
        assert self.updating
        self.updating, self.version = False, body.get("weight_version", self.version)
        return {}

    def on_inference_v1_generate(self, body):
        ids = tokens_of(body["sampling_params"]["seed"])
        logprobs = {"content": [{"logprob": -id / 16} for id in ids]}
        spans = [{"version": self.version, "start": 0, "end": len(ids)}]
        choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop", "weight_versions": spans}
        choice["stop_reason"] = self.stop_string if "stop" in body["sampling_params"] else 9
        return {"choices": [choice]}


def tokens_of(seed: int) -> list[int]:
    return [seed % 7, seed % 11, seed % 13]
