"""A server that behaves like a vLLM replica, as far as ``VllmServers`` looks, and fails on demand."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import safetensors.torch
import torch
from torch.distributed import TCPStore

from igpo_fast.engines.fingerprint import fingerprint
from igpo_fast.engines.vllm.broadcast import Broadcast


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted; the default of 5 refuses some


class Replica:
    """Answers a request with tokens that follow from its seed alone: ``tokens_of``.

    ``dies_at`` ends it in the middle of that generation (1 is the first), ``torn_at`` only the connection; ``together``
    holds generations back until so many have been asked for. ``answers`` overrides the status and body of routes; a
    body of bytes is sent as it is.
    """

    def __init__(self, port: int = 0):
        self.log: list[str] = []
        self.version, self.tensors, self.updating = "default", {}, False
        self.dies_at, self.torn_at, self.together, self.generations = None, None, 0, 0
        self.aborts, self.before_abort = 0, 2
        """How often all generations were aborted, and the tokens that they had by then."""
        self.paused = False
        self.key = ""
        """What requests must carry, if anything."""
        self.stop_string: str | None = None
        """What it takes for a stop string that ended a turn, where any is asked for."""
        self.answers: dict[str, tuple[int, dict | bytes]] = {}
        self.about = {
            "dtype": "float32", "logprobs_mode": "processed_logprobs", "max_tokens": 64, "transfer": "igpo",
        }  # fmt: skip
        self.dies_at_bucket = None
        """The bucket of a broadcast (1 is the first) in the middle of which it dies."""
        self._group, self._buckets, self.link = None, 0, ""
        self._lock = threading.Condition()
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Type") != "application/octet-stream":
                    body = json.loads(body or b"{}")
                if replica.key and self.headers.get("Authorization") != f"Bearer {replica.key}":
                    answer = 401, {"error": "no key"}
                else:
                    answer = replica.answer(self.path.lstrip("/"), body)
                if answer is None:  # the process is gone, or the connection
                    self.close_connection = True
                    return
                status, found = answer
                content = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

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
                aborts, mine = self.aborts, self.generations
                self._lock.notify_all()
                together = self.together - (mine == self.torn_at)
                self._lock.wait_for(
                    lambda: self.dead or self.aborts > aborts or (self.generations >= together and not self.paused),
                    timeout=10,
                )
                if mine == self.torn_at:
                    return None
                if self.aborts > aborts:
                    ids = tokens_of(body["sampling_params"]["seed"])[: self.before_abort]
                    return 200, self.generation(body, ids, "abort")
            if self.dead:
                return None
            if name in self.answers:
                return self.answers[name]
            found = getattr(self, "on_" + name.replace("/", "_"))(body)
            return None if self.dead else (200, found)

    def on_igpo_about(self, body):
        return {"results": [self.about | {"updating": self.updating, "link": self.link}]}

    def on_igpo_fingerprints(self, body):
        return {"results": [{name: [[0, 0, fingerprint(tensor)]] for name, tensor in self.tensors.items()}]}

    def on_pause(self, body):
        self.aborts, self.paused = self.aborts + 1, True
        self._lock.notify_all()
        return {"status": "paused"}

    def on_resume(self, body):
        self.paused = False
        self._lock.notify_all()
        return {"status": "resumed"}

    def on_weight_info(self, body):
        return {"weight_version": self.version}

    def on_reset_prefix_cache(self, body):
        return {"success": self.paused}

    def on_start_weight_update(self, body):
        assert self.paused and not self.updating
        self.updating = True
        return {}

    def on_init_weight_transfer_engine(self, body):
        info = body["init_info"]
        store = TCPStore(info["host"], info["port"])
        self._group, self.link = Broadcast(store, 1, 2, info["backend"], info["timeout"]), info["name"]
        return {}

    def on_update_weights(self, body):
        assert self.updating
        if isinstance(body, bytes):
            self.tensors |= safetensors.torch.load(body)
            return {}
        self._buckets += 1
        for name, shape in body["update_info"]["shapes"]:
            if self._buckets == self.dies_at_bucket:
                self._group = None
                self.kill()
                return None
            self.tensors[name] = self._group(torch.empty(shape, dtype=getattr(torch, self.about["dtype"])))
        return {}

    def on_finish_weight_update(self, body):
        assert self.updating
        self.updating, self.version = False, body.get("weight_version", self.version)
        return {}

    def on_inference_v1_generate(self, body):
        return self.generation(body, tokens_of(body["sampling_params"]["seed"]), "stop")

    def generation(self, body, ids: list[int], reason: str):
        logprobs = {"content": [{"logprob": -id / 16} for id in ids]}
        spans = [{"version": self.version, "start": 0, "end": len(ids)}][: len(ids)]
        choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": reason, "weight_versions": spans}
        choice["stop_reason"] = self.stop_string if "stop" in body["sampling_params"] else 9
        return {"choices": [choice]}


def tokens_of(seed: int) -> list[int]:
    return [seed % 7, seed % 11, seed % 13]
