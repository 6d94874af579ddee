"""Answers by a model in memory, by an endpoint, by vLLM's stand-in."""

import json
import socket
import sys
import textwrap
import threading
from importlib.util import find_spec

import pytest
import torch
from chat_server import chat_server
from helpers import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning.generation import Answer, Sampling
from sdpo_lightning.generation_http import OpenAIGenerator
from sdpo_lightning.generation_transformers import FolderGenerator, TransformersGenerator
from sdpo_lightning.generation_vllm import VLLMGenerator, VLLMSettings
from sdpo_lightning.types import ConfigurationError

KEY = "sk-abcdefghijklmnop1234"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"answers": 2}, "temperature 0"),
    ],
)
def test_sampling_refuses_what_has_no_meaning(settings, word):
    with pytest.raises(ConfigurationError, match=word):
        Sampling(**settings)


# ---- transformers


def greedy_by_hand(model, ids: list[int], most: int, ends: set[int]) -> list[int]:
    """Argmax of a whole forward pass, token by token, without a cache or padding."""
    found: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + found])).logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
    return found


def test_greedy_answers_are_argmax_token_by_token(model, tiny_tokenizer):
    prompts = ["w1 w2 w3 w4 w5", "w9", [{"role": "user", "content": "w7 w8"}]]
    ids = [
        tiny_tokenizer("w1 w2 w3 w4 w5")["input_ids"],
        tiny_tokenizer("w9")["input_ids"],
        # The template of conftest, written out.
        tiny_tokenizer("<start> user w7 w8 <eos> <start> assistant")["input_ids"],
    ]
    found = TransformersGenerator(model, tiny_tokenizer, batch_size=2).generate(prompts, Sampling(max_new_tokens=6))
    ends = {tiny_tokenizer.eos_token_id}
    expected = [greedy_by_hand(model, row, 6, ends) for row in ids]
    assert [len(row) for row in found] == [1, 1, 1]
    texts = [tiny_tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    # Of a text prompt the continuation, with the space between.
    assert [row[0].text for row in found] == [f" {texts[0]}", f" {texts[1]}", texts[2]] and all(texts)
    assert [row[0].finished for row in found] == [len(row) < 6 for row in expected]
    assert len({row[0].text for row in found}) > 1


def test_sampling_leaves_random_states_mode_and_weights_alone(model, tiny_tokenizer):
    model.train()
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    generator = TransformersGenerator(model, tiny_tokenizer, batch_size=3)
    drawn = [generator.generate(["w1 w2"], Sampling(8, 1.0, answers=4, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # The seed decides alone, and the four answers are draws of their own.
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 1 and len({answer.text for answer in drawn[0][0]}) > 1


def test_draws_follow_the_models_probabilities(model, tiny_tokenizer):
    with torch.no_grad():
        logits = model(torch.tensor([tiny_tokenizer("w1 w2")["input_ids"]])).logits[0, -1]
    probabilities = (logits / 0.7).softmax(-1)
    likeliest = int(probabilities.argmax())
    word, p = tiny_tokenizer.decode([likeliest], skip_special_tokens=True), float(probabilities[likeliest])
    drawn = TransformersGenerator(model, tiny_tokenizer, batch_size=600).generate(
        ["w1 w2"], Sampling(1, 0.7, answers=600)
    )[0]
    share = sum(answer.text.strip() == word for answer in drawn) / 600
    # Four standard errors of a share of 600 draws.
    assert abs(share - p) < 4 * (p * (1 - p) / 600) ** 0.5


def test_a_folder_is_read_when_asked_and_again_after_close(tiny_model_dir, model, tiny_tokenizer):
    direct = TransformersGenerator(model, tiny_tokenizer).generate(["w3 w4"], Sampling(4))
    with FolderGenerator(tiny_model_dir, device="cpu") as generator:
        first = generator.generate(["w3 w4"], Sampling(4))
    assert first == generator.generate(["w3 w4"], Sampling(4)) == direct
    with pytest.raises(ConfigurationError, match="no model in '/nowhere'"):
        FolderGenerator("/nowhere", device="cpu").generate(["w1"], Sampling(4))


def test_a_dialogue_without_a_template_and_a_prompt_that_fills_the_model_are_refused(model, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    generator = TransformersGenerator(model, tokenizer)
    # 512 positions, and the answer needs one.
    with pytest.raises(ConfigurationError, match="512 tokens"):
        generator.generate([" ".join(["w1"] * 512)], Sampling(4))
    cut = generator.generate([" ".join(["w1"] * 511)], Sampling(4))[0][0]
    assert len(cut.text.split()) <= 1
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template"):
        generator.generate([[{"role": "user", "content": "w1"}]], Sampling(4))


# ---- an endpoint


def test_the_chat_format_goes_out_and_answers_come_back_in_order(monkeypatch):
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    dialogue = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with chat_server(lambda body: f"{body['messages'][-1]['content']}/{body['seed']}") as server:
        generator = OpenAIGenerator(server.url + "/", "m", "ENDPOINT_KEY", parallel=3)
        found = generator.generate(["a", dialogue], Sampling(5, 0.5, top_p=0.9, answers=2, seed=7))
    assert found == [[Answer("a/7", True), Answer("a/8", True)], [Answer("u/7", True), Answer("u/8", True)]]
    assert server.keys == [f"Bearer {KEY}"] * 4
    first = min(server.bodies, key=lambda body: (body["messages"][-1]["content"], body["seed"]))
    assert first == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "n": 1,
    }
    assert dialogue in [body["messages"] for body in server.bodies]


def test_a_busy_server_is_asked_again_and_a_wrong_request_is_not():
    replies = iter([(429, "busy"), (503, "busy"), "at last"])
    with chat_server(lambda body: next(replies)) as server:
        found = OpenAIGenerator(server.url, "m", wait=0.0, tokens_field="max_completion_tokens").generate(
            ["a"], Sampling(3)
        )
        assert found == [[Answer("at last", True)]] and len(server.bodies) == 3
        assert server.bodies[0]["max_completion_tokens"] == 3 and "max_tokens" not in server.bodies[0]
    with chat_server(lambda body: (400, "no such model")) as server:
        with pytest.raises(OSError, match="after 1 tries: 400 no such model"):
            OpenAIGenerator(server.url, "m", wait=0.0).generate(["a"], Sampling())
        assert len(server.bodies) == 1
    with chat_server(lambda body: (500, "down")) as server:
        with pytest.raises(OSError, match="after 3 tries: 500 down"):
            OpenAIGenerator(server.url, "m", retries=2, wait=0.0).generate(["a"], Sampling())
        assert len(server.bodies) == 3


def test_the_key_is_in_no_message_and_follows_no_redirect(monkeypatch):
    monkeypatch.setenv("ENDPOINT_KEY", "plainwordasakey")
    with chat_server(lambda body: (401, "wrong key plainwordasakey")) as server:
        with pytest.raises(OSError, match=r"401 wrong key \*\*\*") as caught:
            OpenAIGenerator(server.url, "m", "ENDPOINT_KEY").generate(["a"], Sampling())
        assert "plainwordasakey" not in str(caught.value) and caught.value.__suppress_context__
    with chat_server(lambda body: "elsewhere") as other:
        with chat_server(lambda body: (302, other.url)) as server:
            with pytest.raises(OSError, match="302"):
                OpenAIGenerator(server.url, "m", "ENDPOINT_KEY").generate(["a"], Sampling())
        assert other.keys == []


def test_no_connection_no_answer_in_time_and_no_json_are_failures():
    with pytest.raises(OSError, match="after 2 tries"):
        OpenAIGenerator(f"http://127.0.0.1:{free_port()}/v1", "m", retries=1, wait=0.0).generate(["a"], Sampling())
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(OSError, match="timed out"):
            OpenAIGenerator(url, "m", timeout=0.1, retries=0).generate(["a"], Sampling())
    for said, why in (("<html>", "no JSON"), ('{"choices": []}', "expected OpenAI's chat format")):
        with chat_server(lambda body, said=said: (200, said)) as server:
            with pytest.raises(OSError, match=why):
                OpenAIGenerator(server.url, "m", retries=0).generate(["a"], Sampling())
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"url": "localhost:8000/v1"}, "expected http"),
        ({"url": "http://me:geheim@host/v1"}, "a password"),
        ({"url": "http://host/v1?key=geheim"}, "a query"),
        ({"api_key_env": "NOT_SET_HERE"}, "'NOT_SET_HERE'"),
        ({"parallel": 0}, "parallel"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_at_once(given, word):
    with pytest.raises(ConfigurationError, match=word) as caught:
        OpenAIGenerator(**({"url": "http://host/v1", "model": "m"} | given))
    assert "geheim" not in str(caught.value)


# ---- vLLM, whose place a stand-in takes: the real one has not run here

STAND_IN = """
    import json
    from types import SimpleNamespace

    class SamplingParams:
        def __init__(self, **given):
            self.given = given

    class LLM:
        def __init__(self, **given):
            self.given = given
            if given["dtype"] == "broken":
                raise RuntimeError("CUDA out of memory")

        def generate(self, prompts, params):
            def output(k, ids):
                text = json.dumps([k, ids, self.given, params.given])
                return SimpleNamespace(text=text, finish_reason="length" if k else "stop")
            return [
                SimpleNamespace(outputs=[output(k, p["prompt_token_ids"]) for k in range(params.given["n"])])
                for p in prompts
            ]
"""


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_said_at_once(tiny_model_dir):
    with pytest.raises(ConfigurationError, match="vLLM isn't installed"):
        VLLMGenerator(tiny_model_dir)
    with pytest.raises(ConfigurationError, match="no_such_python"):
        VLLMGenerator(tiny_model_dir, VLLMSettings(python="/no_such_python"))


def test_a_process_answers_for_vllm(tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    generator = VLLMGenerator(tiny_model_dir, VLLMSettings(python=sys.executable, max_model_len=64))
    found = generator.generate(["w1 w2", [{"role": "user", "content": "w3"}]], Sampling(9, 0.5, 0.8, 2, 3))
    assert [[answer.finished for answer in row] for row in found] == [[True, False], [True, False]]
    number, ids, engine, params = json.loads(found[1][1].text)
    assert number == 1 and ids == tiny_tokenizer("<start> user w3 <eos> <start> assistant")["input_ids"]
    assert engine["model"] == str(tiny_model_dir) and engine["max_model_len"] == 64
    assert engine["trust_remote_code"] is False
    assert params == {"n": 2, "temperature": 0.5, "top_p": 0.8, "max_tokens": 9, "seed": 3}
    assert "vllm" not in sys.modules
    with pytest.raises(OSError, match="CUDA out of memory"):
        VLLMGenerator(tiny_model_dir, VLLMSettings(dtype="broken")).generate(["w1"], Sampling(2))
