"""Backends: the trainer's ids reach the model, seeds decide, and servers may fail in every way but for good."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import httpx
import pytest
import torch
from conftest import demo_rows
from scripted_server import free_port, scripted, serving

from solopo_plugin.synthesis import backends
from solopo_plugin.synthesis.backends import Call, Reply, call_seed, generate, load_chat, read_answers
from solopo_plugin.synthesis.files import DataError
from solopo_plugin.synthesis.recipe import make_recipe

ANSWERS = {f"Where does person {i} work?": f"Town {i}" for i in range(40)}


@pytest.fixture
def answers_file(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(ANSWERS))
    return path


pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Servers that failed are asked again at once."""
    monkeypatch.setattr(backends, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(backends, "LONGEST_PAUSE", 0.2)


def openai(urls: str, **keys):
    base = dict(model_name_or_path="none", template="qwen", input="-", dataset_name="d", work_dir="-")
    return make_recipe(base | dict(backend="openai", server_urls=urls, num_samples=4, seed=3) | keys)


def calls(n: int = 40, ks=(0, 1, 2, 3)) -> list[Call]:
    return [Call(f"q{i}", tuple(ks), f"Some documents.\n\n{question}") for i, question in enumerate(list(ANSWERS)[:n])]


def by_answer(replies) -> dict[tuple[str, int], str]:
    """Texts by question and number; an answer given twice is an error."""
    texts = {}
    for reply in replies:
        assert len(reply.ks) == len(reply.answers)
        for k, (text, _) in zip(reply.ks, reply.answers, strict=True):
            assert (reply.id, k) not in texts
            texts[reply.id, k] = text
    return texts


def expected(recipe, asked: list[Call]) -> dict[tuple[str, int], str]:
    """What the scripted server says when each call comes back whole."""
    return {
        (call.id, k): scripted(call.prompt, call_seed(recipe, call), i, ANSWERS)[0]
        for call in asked
        for i, k in enumerate(call.ks)
    }


def one_by_one(asked: list[Call], first_together: int = 1) -> list[Call]:
    """The calls whose first choices are those of a server that gives fewer than it is asked for."""
    parts = []
    for call in asked:
        parts.append(call._replace(ks=call.ks[:first_together]))
        parts += [call._replace(ks=(k,)) for k in call.ks[first_together:]]
    return [part for part in parts if part.ks]


def test_every_call_is_answered_once_and_by_its_seed(answers_file):
    with serving(answers_file) as server:
        recipe = openai(server.url)
        got = by_answer(generate(recipe, iter(calls())))
        assert got == expected(recipe, calls()) and len(got) == 160
        assert by_answer(generate(recipe, reversed(calls()))) == got
        assert by_answer(generate(openai(server.url, seed=4), calls())) != got
        assert by_answer(generate(openai(server.url.removesuffix("/v1")), calls(2))).items() <= got.items()


@pytest.mark.parametrize(
    "options, together",
    [({"max_n": 1}, 1), ({"max_n": 3}, 3), ({"refuse_n": True}, 0)],
    ids=["n is ignored", "n is capped", "n is refused"],
)
def test_what_a_call_leaves_out_is_asked_for_one_by_one(answers_file, options, together):
    with serving(answers_file, **options) as server:
        recipe = openai(server.url)
        got = by_answer(generate(recipe, calls(10)))
    assert got == expected(recipe, one_by_one(calls(10), together)) and len(got) == 40


FAULTS = dict(busy=0.2, broken=0.2, malformed=0.2, hang=0.1)


def test_faults_leave_no_hole_and_no_double(answers_file, tmp_path):
    """The first try of most requests fails: 429, 503 with HTML, four kinds of malformed bodies, silence."""
    log = tmp_path / "log"
    with serving(answers_file, **FAULTS, log=log, hang_seconds=5) as server:
        recipe = openai(server.url, timeout=0.5, concurrency=8)
        got = by_answer(generate(recipe, calls()))
    assert got == expected(recipe, calls())
    met = {json.loads(line)["fault"] for line in log.read_text().splitlines()}
    assert met == {None, *FAULTS}


def test_retry_after_is_honoured(answers_file):
    with serving(answers_file, busy=1.0, retry_after=1.0) as server:
        began = time.monotonic()
        got = by_answer(generate(openai(server.url), calls(1)))
        assert len(got) == 4 and time.monotonic() - began >= 1.0
    server = backends._Server("url")
    server.failed("busy", 0.0)
    server.failed("busy", 60.0)  # while it rests already
    assert server.failures == 1 and server.free_at - time.monotonic() > 59
    response = httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"})
    assert backends._retry_after(response) > 1e8
    assert backends._retry_after(httpx.Response(429, headers={"Retry-After": "soon"})) == 0


def test_a_server_that_comes_back_is_waited_for(answers_file, caplog):
    """It dies in the middle of a request; a new one takes its place after a second, and nothing is lost."""
    port = free_port()
    recipe = openai(f"http://127.0.0.1:{port}/v1", concurrency=4, retries=40)
    with serving(answers_file, port, die_after=10) as dying, ThreadPoolExecutor() as thread:
        replies = thread.submit(lambda: list(generate(recipe, calls())))
        assert dying.process.wait(20) == 1
        time.sleep(1)
        with serving(answers_file, port):
            assert by_answer(replies.result()) == expected(recipe, calls())
    assert "ConnectError" in caplog.text and "next try in" in caplog.text


def test_several_servers_share_the_load_and_a_dead_one_is_avoided(answers_file, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    with (
        serving(answers_file, log=logs[0], slow=0.05) as a,
        serving(answers_file, log=logs[1], slow=0.05) as b,
    ):
        dead = f"http://127.0.0.1:{free_port()}/v1"
        recipe = openai(f"{a.url}, {dead}, {b.url}", concurrency=6)
        began = time.monotonic()
        got = by_answer(generate(recipe, calls()))
        assert time.monotonic() - began < 5
    assert got == expected(recipe, calls())
    seen = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert min(map(len, seen)) >= 12 and sum(map(len, seen)) == 40
    assert max(event["running"] for events in seen for event in events) <= 6


def test_concurrency_is_bounded(answers_file, tmp_path):
    log = tmp_path / "log"
    with serving(answers_file, log=log, slow=0.05) as server:
        list(generate(openai(server.url, concurrency=3), calls(20)))
    assert max(json.loads(line)["running"] for line in log.read_text().splitlines()) == 3


def test_calls_are_taken_only_when_they_can_be_sent(answers_file):
    """A prompt of 8K tokens is not made before its turn: memory stays with what is under way."""
    taken = []

    def lazily():
        for call in calls():
            taken.append(call.id)
            yield call

    with serving(answers_file) as server:
        replies = generate(openai(server.url, concurrency=2), lazily())
        for n in range(1, 11):
            next(replies)
            assert len(taken) <= n + 3
        replies.close()


def test_empty_answers_are_answers(answers_file):
    with serving(answers_file, empty=0.5) as server:
        texts = list(by_answer(generate(openai(server.url), calls())).values())
    assert len(texts) == 160 and 50 < texts.count("") < 110


REFUSALS = [
    (dict(api_key="secret"), {}, "HTTP 401: .*Invalid API key.*environment variable OPENAI_API_KEY"),
    (dict(max_prompt=20), {}, "HTTP 400: .*maximum context length exceeded.*correct the recipe"),
    (dict(malformed=1.0, always=True), {}, r"gave no answer in 3 tries over .*last: a malformed answer \("),
    (dict(broken=1.0, always=True), {}, "last: HTTP 503 .*upstream"),
    (dict(model="one,two"), {}, r"has several models \(one, two\); name one as `served_model`"),
]


@pytest.mark.parametrize("options, keys, sentence", REFUSALS)
def test_what_no_repetition_mends_is_one_sentence(answers_file, options, keys, sentence, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(answers_file, **options) as server:
        with pytest.raises(DataError, match=sentence) as error:
            list(generate(openai(server.url, retries=2, **keys), calls(3)))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_the_key_comes_from_the_environment(answers_file, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(answers_file, api_key="secret") as server:
        assert len(by_answer(generate(openai(server.url, api_key_env="MY_KEY"), calls(2)))) == 8


def test_addresses_that_cannot_be():
    with pytest.raises(DataError, match="needs `server_urls`"):
        list(generate(openai(None), calls(1)))
    with pytest.raises(DataError, match="must begin with http:// or https://, got 'localhost:8000/v1'"):
        list(generate(openai("localhost:8000/v1"), calls(1)))
    with pytest.raises(DataError, match="gave no answer in 2 tries .*ConnectError"):
        list(generate(openai(f"http://127.0.0.1:{free_port()}", retries=1), calls(1)))


def test_more_keys_of_the_body(answers_file, tmp_path):
    log = tmp_path / "log"
    with serving(answers_file, log=log) as server:
        list(generate(openai(server.url, extra_body={"top_k": -1}, served_model="m"), calls(1)))
    sent = json.loads(log.read_text())["keys"]
    assert sent == sorted(["max_tokens", "messages", "model", "n", "seed", "temperature", "top_k", "top_p"])


def test_malformed_bodies_are_recognised():
    good = {"choices": [{"index": 1, "message": {"content": "b"}}, {"index": 0, "message": {"content": None}}]}
    assert read_answers(good, chat=True) == ([("", ""), ("b", "")], None)
    plain = {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"prompt_tokens": 7}}
    assert read_answers(plain, chat=False) == ([("a", "length")], 7)
    for bad in ({}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}, []):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read_answers(bad, chat=True)


def local(model: str, **keys):
    base = dict(model_name_or_path=model, template="qwen", input="-", dataset_name="d", work_dir="-")
    return make_recipe(base | dict(num_samples=4, max_new_tokens=8, seed=3) | keys)


PROMPTS = [Call(f"q{i}", (0, 1, 2, 3), row["prompt"]) for i, row in enumerate(demo_rows(3))]


def trained_on(recipe, tmp_path, run, train_recipe) -> list[list[int]]:
    """Ids of the short prompts as a run of `stage: solopo` prepares them."""
    from datasets import load_from_disk

    tokens = str(tmp_path / "tokens")
    rows = train_recipe(model_name_or_path=recipe.model_name_or_path, max_samples=3, max_steps=1, tokenized_path=tokens)
    run(rows)
    return load_from_disk(tokens)["train"]["short_prompt_ids"]


def sampled_by_hand(
    model, tokenizer, prompt: list[int], n: int, steps: int, temperature: float, seed: int
) -> list[str]:
    """Draws from softmax(logits / temperature), token by token, without a cache."""
    torch.manual_seed(seed)
    ids = torch.tensor([prompt] * n)
    for _ in range(steps):
        probabilities = (model(ids).logits[:, -1] / temperature).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids[:, len(prompt) :].tolist()]


def test_transformers_sees_the_trainers_ids(tiny_model, run, recipe, tmp_path, monkeypatch):
    """Also: an answer is drawn from its call alone, and the model's own generation_config is not used."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = str(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_model()).save_pretrained(model)
    load_chat(local(tiny_model()))[0].save_pretrained(model)
    GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, max_length=4).save_pretrained(model)
    seen = []
    original = AutoModelForCausalLM.from_pretrained(model).__class__.generate

    def spy(self, prompt, **kwargs):
        seen.append(prompt[0].tolist())
        return original(self, prompt, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM.from_pretrained(model).__class__, "generate", spy)
    settings = local(model, backend="transformers")
    got = list(generate(settings, PROMPTS))
    assert seen == trained_on(settings, tmp_path, run, recipe)
    assert [reply.prompt_tokens for reply in got] == list(map(len, seen))
    texts = by_answer(got)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_chat(settings)[0]
    with torch.no_grad():
        for call, prompt, reply in zip(PROMPTS, seen, got, strict=True):
            by_hand = sampled_by_hand(loaded, tokenizer, prompt, 4, 8, 0.85, call_seed(settings, call))
            assert [(text, "length") for text in by_hand] == reply.answers
    again = by_answer(generate(settings, reversed(PROMPTS)))
    assert again == texts
    greedy = local(model, backend="transformers", temperature=0.0)
    alone = [call._replace(ks=(0,)) for call in PROMPTS]
    assert by_answer(generate(greedy, alone)) == by_answer(generate(greedy, reversed(alone)))


def test_completions_send_the_trainers_ids(tiny_model, answers_file, tmp_path, monkeypatch):
    sent = []
    original = httpx.AsyncClient.request

    async def spy(self, method, url, json=None, **kwargs):
        sent.append((url, json))
        return await original(self, method, url, json=json, **kwargs)

    monkeypatch.setattr(httpx.AsyncClient, "request", spy)
    with serving(answers_file) as server:
        recipe = openai(
            server.url, model_name_or_path=tiny_model(), openai_endpoint="completions", concurrency=1, served_model="m"
        )
        assert len(by_answer(generate(recipe, PROMPTS))) == 12
    tokenizer, template = load_chat(recipe)
    for (url, body), call in zip(sent, PROMPTS, strict=True):
        assert url.endswith("/v1/completions")
        assert body["prompt"] == backends.encode_prompt(tokenizer, template, call.prompt)
        assert tokenizer.eos_token_id in body["stop_token_ids"]


def fake_vllm(seen: list) -> ModuleType:
    """The part of vLLM's offline interface that is used; its answers tell what was asked."""

    class LLM:
        def __init__(self, **kwargs):
            seen.append(kwargs)

        def generate(self, prompts, params, use_tqdm):
            seen.append([prompt["prompt_token_ids"] for prompt in prompts])
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(text=f"{p.seed + i}", finish_reason="stop") for i in range(p.n)]
                )
                for p in params
            ]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    return module


def test_vllm_gets_ids_seeds_and_chunks(tiny_model, monkeypatch):
    seen = []
    recipe = local(tiny_model(), long_tokens=2048, tensor_parallel_size=2)
    tokenizer, template = load_chat(recipe)  # before the host can find the module that stands in for vLLM
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(seen))
    monkeypatch.setattr(backends, "VLLM_CHUNK", 2)
    got = list(generate(recipe, iter(PROMPTS)))
    ids = [backends.encode_prompt(tokenizer, template, call.prompt) for call in PROMPTS]
    engine, *chunks = seen
    assert chunks == [ids[:2], ids[2:]]
    assert engine["max_model_len"] == 2056 and engine["tensor_parallel_size"] == 2
    for reply, call, prompt in zip(got, PROMPTS, ids, strict=True):
        seed = call_seed(recipe, call)
        assert reply == Reply(call.id, call.ks, [(str(seed + i), "stop") for i in range(4)], len(prompt))


def test_vllm_that_is_not_there_is_a_sentence(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match=r"`backend: vllm` cannot be loaded .*pip install '.\[vllm\]'"):
        list(generate(local(tiny_model()), PROMPTS))
