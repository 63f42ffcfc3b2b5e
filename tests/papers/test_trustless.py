"""What is sent between strangers: proofs, shards of weights, answers."""

import contextlib
import importlib.util
import socket
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from deltax import UserError
from deltax.claims.systems.decentralized.toploc import int_by_rows
from deltax.errors import StoreError
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.post_training.grpo import grpo
from deltax.papers.systems.decentralized.prime_rl import Lagging, faults, prime_rl, seed_of, two_sided, work
from deltax.papers.systems.decentralized.shardcast import Choice, Relay, Server, cut, fetch, keep, manifest, shardcast
from deltax.papers.systems.decentralized.toploc import (
    PRIME,
    Errors,
    Limits,
    Proof,
    answer,
    commit,
    compare,
    interpolate,
    read,
    toploc,
    verify,
)
from deltax.tasks.language.arithmetic import Arithmetic
from deltax.train.job import Job
from deltax.train.loop import build, train

TINY = gpt.put("model.dim", 12).put("model.stack.depth", 1).put("task.held_out", 200)
SMALL = TINY + grpo(group=4, questions=3)


def same(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items()) and a.keys() == b.keys()


# TOPLOC


def test_the_coefficients_are_those_of_the_released_code():
    found = importlib.util.find_spec("toploc")
    if found is None:
        pytest.skip("toploc is not installed")
    [library] = Path(found.submodule_search_locations[0]).glob("C/csrc/ndd.*.so")  # the rest wants an older torch
    spec = importlib.util.spec_from_file_location("ndd", library)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    random = np.random.default_rng(0)
    for k in (1, 2, 17, 128):
        x, y = random.choice(PRIME, k, replace=False), random.integers(0, PRIME, k)
        assert list(interpolate(x, y)) == peer.compute_newton_coefficients(x.tolist(), y.tolist())
        elsewhere = random.integers(0, PRIME, 9)
        ours = Proof(PRIME, interpolate(x, y)).at(elsewhere)
        assert ours.tolist() == [peer.evaluate_polynomial(list(interpolate(x, y)), int(i)) for i in elsewhere]


def test_the_modulus_keeps_indices_apart():
    values = torch.zeros(3 * PRIME, dtype=torch.bfloat16)
    values[[5, 5 + PRIME, 7 + 2 * PRIME]] = torch.tensor([3.0, -2.0, 1.5], dtype=torch.bfloat16)
    proof = commit(values, k=3)
    assert proof.modulus == PRIME - 1
    assert compare(values, proof) == Errors(0, 0.0, 0.0, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interpolate([1, 1], [2, 3]), "2 points have 1 different x"),
        (lambda: commit(torch.randn(3), k=4), "choose k from 1 to 3"),
        (lambda: Proof.read(b"abc"), "at least 4 bytes, not 3"),
        (lambda: Proof.read(b"\0\1\0\1"), "modulus 1 or a coefficient is outside"),
        (lambda: verify(torch.randn(40, 9), [], prompt=3), "need 3 proofs, not 0"),
        (lambda: verify(torch.randn(3, 9), [commit(torch.randn(27), k=2)], prompt=3), "27 coefficients, not 2"),
        (lambda: toploc(torch.randn(3, 9), prompt=0), "choose prompt <= 3"),
    ],
)
def test_what_is_no_proof_is_named(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_an_answer_decoded_in_a_batch_is_that_of_one_pass():
    model = build(gpt.put("model.dim", 12)(), Arithmetic(), 0)
    prompts = Arithmetic().prompts(0, size=5, seed=0)
    tokens, states = answer(model, prompts, length=3)
    torch.testing.assert_close(read(model, tokens), states)
    for row, alone in zip(states, tokens, strict=True):
        errors = verify(read(model, alone[None])[0], toploc(row, prompt=6), prompt=6)
        assert all(Limits().accept(e) for e in errors) and len(errors) == 2


def test_weights_of_few_bits_take_few_values():
    weight = torch.randn(5, 400)
    rounded = int_by_rows(weight, 4)
    assert all(len(row.unique()) <= 15 for row in rounded)
    assert ((rounded - weight).abs().amax(1) <= weight.abs().amax(1) / 14 * 1.0001).all()


# SHARDCAST


def test_a_relay_that_stops_half_way_stops_nobody():
    shards = cut(Random(0).randbytes(9_001), 13)
    known = manifest(shards)
    with Server(shards) as whole, Server(shards[:4]) as half:
        got = [None] * 4

        def client(i):
            got[i] = shardcast([half.url, whole.url], known, choice=Choice(2, seed=i))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert got == [b"".join(shards)] * 4
        assert half.sent + whole.sent == 4 * 9_001


def test_a_relay_that_trickles_is_left():
    shards, began = cut(Random(2).randbytes(999), 2), time.monotonic()
    with Server(shards) as whole, socket.create_server(("127.0.0.1", 0)) as slow:

        def trickle():
            with contextlib.suppress(OSError):
                while True:
                    line = slow.accept()[0]
                    for _ in range(600):
                        line.sendall(b"H")
                        time.sleep(0.01)

        threading.Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{slow.getsockname()[1]}"
        assert fetch(url, 0, manifest(shards), 0.1) is None
        assert time.monotonic() - began < 5
        assert shardcast([url, whole.url], manifest(shards), choice=Choice(2, seed=1), patience=8) == b"".join(shards)


def test_who_comes_late_needs_no_origin():
    shards = cut(Random(3).randbytes(999), 3)
    known = manifest(shards)
    with Server(shards) as origin:
        relay = Relay(origin.url, known)
        relay.wait()
    with relay:
        assert shardcast([relay.url], known) == b"".join(shards)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    keep(b"old", path)

    def die(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(StoreError, match="No space left"):
        broken.setattr("os.replace", die)
        keep(b"new", path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    keep(b"new", path)
    assert path.read_bytes() == b"new"
    with pytest.raises(StoreError, match="cannot write"):
        keep(b"new", tmp_path / "nowhere" / "weights")


def test_weights_that_were_sent_prove_themselves(tmp_path):
    trainer, worker, task = (*(build(TINY.fill("task", Arithmetic)(), Arithmetic(), s) for s in (0, 1)), Arithmetic())
    shards = cut(save(trainer.state_dict()), 4)
    with Server(shards) as origin, Relay(origin.url, manifest(shards)) as relay:
        keep(shardcast([relay.url], manifest(shards)), tmp_path / "weights.safetensors")
    assert "activations of other weights" in faults(work(worker, task, node=0, step=0, count=0, size=4), trainer, task)
    worker.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert faults(work(worker, task, node=0, step=0, count=0, size=4), trainer, task) == []


def test_a_relay_does_not_hand_on_what_is_wrong():
    shards = cut(Random(1).randbytes(101), 3)
    with Server([shards[0], b"other", shards[2]]) as liar, Relay(liar.url, manifest(shards), patience=0.2) as relay:
        relay.wait()
        assert relay.shards == {0: shards[0]}


def test_a_client_waits_for_a_relay_that_is_behind():
    shards = cut(b"0123456789", 2)
    with Server(shards[:1]) as relay:
        threading.Timer(0.1, relay.shards.__setitem__, (1, shards[1])).start()
        assert shardcast([relay.url], manifest(shards)) == b"0123456789"


def test_a_manifest_that_is_wrong_is_named():
    shards = cut(b"0123456789", 2)
    wrong = manifest(shards)._replace(whole="0" * 64)
    with Server(shards) as relay, pytest.raises(UserError, match="manifest is wrong"):
        shardcast([relay.url], wrong)
    with pytest.raises(UserError, match="choose 1 to 10"):
        cut(b"0123456789", 11)
    with pytest.raises(UserError, match="at least one relay"):
        Choice(0)


def test_nobody_waits_longer_than_told():
    began = time.monotonic()
    with Server() as empty, pytest.raises(UserError, match="no relay gave shard 0"):
        shardcast([empty.url], manifest([b"x"]), patience=0.1)
    assert time.monotonic() - began < 3


# PRIME-RL


def test_late_answers_are_learnt_from_and_resumed(tmp_path):
    start, job = build(TINY.fill("task", Arithmetic)(), Arithmetic(), 3).state_dict(), Job(SMALL + prime_rl, 0, 5)
    out = train(job, weights=start)
    assert isinstance(out.model, Lagging) and len(out.model.past) == 2
    assert same(out.model.inner.reference.state_dict(), start)
    now = out.model.inner.policy.state_dict()
    assert not same(now, start)
    assert not same(out.model.past[0].state_dict(), now) and not same(out.model.past[0].state_dict(), start)
    assert not any(p.requires_grad for p in out.model.past.parameters())

    def stop(progress):
        if progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(job, weights=start, save_to=tmp_path / "run", save_every=0.0, on_step=stop)
    resumed = train(job, weights=start, save_to=tmp_path / "run", save_every=0.0)
    assert same(out.model.state_dict(), resumed.model.state_dict())
    fresh = build((SMALL + prime_rl)(), Arithmetic(), 0)
    assert all(same(old.state_dict(), fresh.inner.policy.state_dict()) for old in fresh.past)


def test_a_state_with_its_reference_starts_the_workers_too():
    grpos = build(SMALL(), Arithmetic(), 3)
    model = build((SMALL + prime_rl)(), Arithmetic(), 0)
    model.load_state_dict(grpos.state_dict())
    assert same(model.past[1].state_dict(), grpos.policy.state_dict())
    assert same(model.inner.reference.state_dict(), grpos.reference.state_dict())


def test_submissions_of_other_batches_are_verified():
    model, task = build(TINY.fill("task", Arithmetic)(), Arithmetic(), 0), Arithmetic()
    sent = work(model, task, node=0, step=0, count=0, size=8)
    assert faults(sent, model, task) == []
    assert faults(sent._replace(tokens=sent.tokens[:, :-1]), model, task) == ["other questions than were given"]
    assert faults(sent._replace(step=-1), model, task) == ["other questions than were given"]
    assert faults(sent._replace(tokens=sent.tokens[0]), model, task) == ["other questions than were given"]
    strange = sent.tokens.clone()
    strange[0, -1] = 99
    assert faults(sent._replace(tokens=strange), model, task) == ["tokens that are none"]
    assert faults(sent._replace(rewards=torch.ones(3), proofs=None), model, task) == [
        "other rewards than the task's",
        "activations of other weights",
    ]
    assert len({seed_of(n, s, c) for n in range(3) for s in range(3) for c in range(3)}) == 27


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: two_sided(torch.zeros(2), torch.zeros(2), torch.ones(2), delta=1.1), "delta must exceed"),
        (lambda: seed_of(0, 2**20, 0), "must be 0 to"),
        (lambda: Lagging(4, 4, inner=gpt["model"], lag=0), "at least 1 step"),
    ],
)
def test_what_cannot_be_is_named(call, says):
    with pytest.raises(UserError, match=says):
        call()
