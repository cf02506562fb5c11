"""What lmms-eval asks, as the model needs it: none of it needs lmms-eval itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastskip
from fastskip.demo import checkpoint_path
from fastskip.integrations.lmms_eval.inputs import model_inputs, prompt_of
from fastskip.integrations.lmms_eval.likelihood import continuations, score_all
from fastskip.integrations.lmms_eval.messages import RequestError, conversation_of
from fastskip.integrations.lmms_eval.requests import Options, Question, batches
from fastskip.integrations.lmms_eval.times import TaskTimes
from fastskip.prompts import build_inputs, processor_for
from fastskip.prompts.conversations import Turn
from fastskip.study.evaluation.metrics import Metric
from fastskip.timing import Arrivals
from tests.study.evaluation.test_exam import items_of


@dataclass
class Request:
    """As lmms-eval's `Instance`."""

    args: tuple[Any, ...]
    idx: int = 0


@dataclass
class Documents:
    """A task's documents, and how many of them were asked for."""

    count: int
    every: int = 2
    asked: list[int] = field(default_factory=list)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.asked.append(number)
        picture = Image.new("RGB", (8, 8)) if number % self.every == 0 else None
        return {"text": f"what is {number}?", "image": picture}


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}] if document["image"] else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["text"]}]}]


def asked(
    task: str,
    number: int,
    options: dict[str, Any] | None = None,
    context: str = "",
    messages_of: Callable[[Any], Any] = messages,
) -> Request:
    return Request((context, messages_of, options or {}, number, task, "test"))


def test_greedy_unless_asked_otherwise() -> None:
    plain = {"do_sample": False, "num_beams": 1}
    assert Options.of({}) == Options(plain, None, ())
    given = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16, "until": ["\n\n", ""]}
    assert Options.of(given) == Options(plain, 16, ("\n\n",))
    assert Options.of({"temperature": 0.7, "do_sample": False}).generate == plain
    warm = Options.of({"temperature": 0.7, "top_p": None, "top_k": 5, "until": "."})
    assert warm.generate == {"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_k": 5}
    assert warm.until == (".",)
    beams = Options.of({"num_beams": 3, "image_aspect_ratio": "pad", "until": None})
    assert beams.generate == {"do_sample": False, "num_beams": 3} and not beams.is_timed


def test_unknown_options_are_told() -> None:
    with pytest.raises(RequestError, match="generation_kwargs: temprature; allowed: do_sample, "):
        Options.of({"temprature": 1})
    request = asked("shapes", 0, {"heat": 1})
    with pytest.raises(RequestError, match="task 'shapes': generation_kwargs: heat"):
        list(batches([request], {"shapes": {"test": Documents(1)}}, 2))


def test_answers_end_at_the_first_stop() -> None:
    options = Options.of({"until": ["\n\n", "USER:"]})
    assert options.cut("red USER: and\n\n") == "red "
    assert options.cut("red\n\nUSER:") == "red"
    assert options.cut("red\nor so") == "red\nor so"


def test_batches_are_of_one_task_and_one_kind() -> None:
    requests = [asked("a", n) for n in range(5)]
    requests += [asked("b", n, {"max_new_tokens": 3 + n % 2}) for n in range(4)]
    found = list(batches(requests, {t: {"test": Documents(5)} for t in "ab"}, 2))
    places = sorted(question.place for batch in found for question in batch.questions)
    assert places == list(range(9))
    for batch in found:
        assert {question.task for question in batch.questions} == {batch.task}
        assert len({bool(question.images) for question in batch.questions}) == 1
        own = {requests[q.place].args[2].get("max_new_tokens") for q in batch.questions}
        assert own == {batch.options.new_tokens}
    # of task a: two with images, two without, one with; of b the options part the two kinds
    assert [len(batch.questions) for batch in found] == [2, 2, 1, 2, 2]


def test_long_requests_first_and_documents_when_due() -> None:
    documents = Documents(6, every=1)
    requests = [asked("a", n, context="long " * (n % 3)) for n in range(6)]
    made = batches(requests, {"a": {"test": documents}}, 2)
    first = next(made)
    assert [question.place for question in first.questions] == [2, 5]
    assert documents.asked == [2, 5]


def test_what_goes_wrong_is_told_with_its_document() -> None:
    def broken(document: Any) -> Any:
        raise FileNotFoundError("no 3.png")

    requests = [asked("a", 0), asked("a", 3, messages_of=broken)]
    with pytest.raises(RequestError, match="task 'a', doc 3: no 3.png"):
        list(batches(requests, {"a": {"test": Documents(4)}}, 2))


def user(*content: Any) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": each} if isinstance(each, str) else {"type": "image", "url": each}
        for each in content
    ]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
PICTURE = Image.new("L", (2, 3))


def test_messages_become_a_conversation(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    file = tmp_path / "a.png"
    said = conversation_of([SYSTEM, user(file, PICTURE, "who?"), assistant("he"), user("why?")])
    assert said.system == "be brief" and said.question == "why?"
    assert said.history == (Turn("<image> <image> who?", "he"),)
    assert [(image.mode, image.size) for image in said.images] == [("RGB", (4, 4)), ("RGB", (2, 3))]
    assert conversation_of([user("is ", PICTURE, "it,\n", "or", "not?")]).question == (
        "is <image> it,\nor not?"
    )
    # a text that places the images itself
    assert conversation_of([user(PICTURE, "is <image> it?")]).question == "is <image> it?"


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "roles: none; allowed: user and assistant alternating"),
        ([SYSTEM], "roles: none; allowed"),
        ([user("a"), assistant("b")], "roles: user, assistant; allowed: .* a user last"),
        ([user("a"), user("b")], "roles: user, user; allowed"),
        ([user("a"), SYSTEM], "roles: user, system; allowed"),
        ([{"role": "tool", "content": "x"}], "roles: tool; allowed"),
        ([{**user(PICTURE), "role": "system"}], "system: 1 images; allowed: images from the user"),
        ([user(PICTURE, PICTURE, "a <image>?")], "user: 1 <image> in the text for 2 images"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "content: 'video'"),
    ],
)
def test_messages_that_are_no_conversation(messages: list[dict[str, Any]], message: str) -> None:
    request = asked("a", 3, messages_of=lambda document: messages)
    with pytest.raises(RequestError, match=f"task 'a', doc 3: {message}"):
        list(batches([request], {"a": {"test": Documents(4)}}, 2))


def test_conversations_become_prompts(processor: Any) -> None:
    said = conversation_of([user(PICTURE, "who?"), assistant("he."), user("and ", PICTURE, "she?")])
    assert prompt_of(processor, Question(0, "a", 3, said)) == (
        "USER: <image>\nwho? ASSISTANT: he.</s>USER: and <image> she? ASSISTANT:"
    )
    for wrong in ([user(PICTURE)], [user("a <image>?")], [user("a"), assistant(""), user("b")]):
        with pytest.raises(RequestError, match="task 'a', doc 3: .*; allowed: "):
            prompt_of(processor, Question(0, "a", 3, conversation_of(wrong)))


def test_times_are_of_every_step_but_not_the_prompt() -> None:
    arrivals, times = Arrivals(), TaskTimes()
    for _ in range(4):
        arrivals.put(torch.zeros(2))
    arrivals.end()
    assert len(arrivals.tokens) == 3
    assert times.latencies() == {} and times.tokens_per_second == 0
    times.add(1.0, 3.0, 6, [1.5, 1.75, 2.5])
    times.add(4.0, 5.0, 3, ())
    assert times.tokens_per_second == 3
    assert times.latencies() == {"ttft": 0.5, "tpot": 0.5}
    single = TaskTimes()
    single.add(0.0, 1.0, 2, [0.5])
    assert single.latencies().keys() == {"ttft"}  # one token has no time per further token


@pytest.fixture(scope="module")
def processor() -> Any:
    return processor_for(checkpoint_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return fastskip.load_model(checkpoint_path(), "dense", dtype="float32")


def test_too_long_a_prompt_is_the_one_that_is_named(model: Any, processor: Any) -> None:
    words = {0: "is it red?", 1: "red " * 2000}

    def told(document: dict[str, Any]) -> Any:
        return [{"role": "user", "content": words[int(document["text"][8])]}]

    requests = [asked("a", n, messages_of=told) for n in range(2)]
    (batch,) = batches(requests, {"a": {"test": Documents(2)}}, 2)
    prompts = [f"USER: {words[n]} ASSISTANT:" for n in range(2)]
    with pytest.raises(RequestError, match="task 'a', doc 1: prompt: .* tokens"):
        model_inputs(model, processor, batch.questions, prompts)


POLICIES: dict[str, Any] = {
    "dense": "dense",
    "generated": {
        "schema_version": 1,
        "rules": [{"layers": "2:5", "tokens": ["generated"], "skip": ["block"]}],
    },
}


@pytest.mark.parametrize("policy", POLICIES)
def test_likelihood_of_what_the_model_says(model: Any, processor: Any, policy: str) -> None:
    """The greedy answer's tokens have the log-probabilities that `generate` had for them."""
    fastskip.set_policy(model, POLICIES[policy])
    # captions: answers of several tokens
    items = [item for item in items_of(40) if item.metric is Metric.CAPTION][:5]
    texts, expected = [], []
    for item in items:
        inputs = build_inputs(processor, item.question, item.images)
        out = model.generate(
            **inputs, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
        tokens = tokens[tokens != model.generation_config.eos_token_id]
        texts.append(" " + processor.decode(tokens))
        pairs = zip(out.logits, tokens, strict=False)
        logs = [logits[0].log_softmax(-1)[token] for logits, token in pairs]
        expected.append(float(torch.stack(logs).sum()))

    def visual(item: Any) -> list[Any]:
        return list(item.images)

    requests = [
        Request((item.question, text, visual, n, "a", "test"))
        for n, (item, text) in enumerate(zip(items, texts, strict=True))
    ]
    requests.append(Request((items[0].question, lambda item: " zero blue", visual, 0, "a", "test")))
    found = dict(
        score_all(model, processor, continuations(requests, {"a": {"test": items}}), size=4)
    )
    assert sorted(found) == list(range(len(requests)))
    for n, likelihood in enumerate(expected):
        total, is_greedy = found[n]
        assert is_greedy and total == pytest.approx(likelihood, abs=1e-3)
    total, is_greedy = found[len(items)]
    assert not is_greedy and total < expected[0] - 1


def test_wrong_continuations(model: Any, processor: Any) -> None:
    documents = {"a": {"test": [items_of(1)[0]]}}
    with pytest.raises(RequestError, match="2 arguments; allowed: 6"):
        list(continuations([Request(("", "red"))], documents))
    empty = [Request(("who?", "", None, 0, "a", "test"))]
    with pytest.raises(RequestError, match="doc 0: continuation ''; allowed: at least one token"):
        list(score_all(model, processor, continuations(empty, documents), 2))
