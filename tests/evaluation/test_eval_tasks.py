import json

import pytest

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.passages import last_word_items
from chai_attention.evaluation.tasks import PAPER, task_names, task_sources, text_length

WORDS = [f"w{i}" for i in range(30)]


def paragraph(end, *, said=True, words=30):
    return " ".join([*(["Table"] if said else []), *(WORDS * 9)[:words], end])


def test_names_are_sets_or_lm_evals():
    assert task_names("paper, lambada,piqa,xy") == (*PAPER, "lambada_openai", "xy")
    with pytest.raises(EvaluationError, match="--tasks"):
        task_names(" , ")


def test_items_come_from_the_folder_and_other_items_are_another_task(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a"}\n\n{"goal": "b"}\n')
    (tmp_path / "lambada.jsonl").write_text('{"text": "a b"}\n')
    piqa, lambada = task_sources(task_names("piqa,lambada"), tmp_path)
    assert piqa.rows == ({"goal": "a"}, {"goal": "b"})
    assert (lambada.name, lambada.rows) == ("lambada_openai", ({"text": "a b"},))
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a"}\n{"goal": "c"}\n')
    assert task_sources(["piqa"], tmp_path)[0].digest != piqa.digest
    (hub,) = task_sources(["piqa"])
    assert (hub.rows, hub.digest) == (None, "hub")


@pytest.mark.parametrize("content", ["", "[1]\n", "not JSON\n"])
def test_files_that_hold_no_items_are_refused(tmp_path, content):
    (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl"):
        task_sources(["piqa"], tmp_path)
    with pytest.raises(EvaluationError, match="is missing"):
        task_sources(["boolq"], tmp_path)
    with pytest.raises(EvaluationError, match="--text"):
        task_sources(["last_word"], tmp_path)


def test_passages_end_with_a_word_that_was_there_before():
    good = paragraph('table."')
    skipped = [paragraph("table.", said=False), paragraph("w3."), paragraph("table", words=40)]
    short, long = paragraph("table.", words=20), paragraph("table.", words=200)
    text = "\n\n".join([*skipped, short, long, good.replace(" ", "\n", 1)])
    (item,) = last_word_items([text], count=10)
    assert item == {"text": paragraph("table")}


def test_the_seed_decides_which_passages_are_taken():
    texts = ["\n\n".join(f"n{i} " + paragraph("table.") for i in range(40))]
    first, again, other = (last_word_items(texts, count=5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    numbers = [int(item["text"].split()[0][1:]) for item in first]
    assert numbers == sorted(numbers)
    assert len(numbers) == 5


def test_text_tasks_take_passages_or_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(paragraph("table."))
    words, whole = task_sources(["last_word", "perplexity"], text=str(path))
    assert words.rows == ({"text": paragraph("table")},)
    assert whole.rows == ({"text": paragraph("table.")},)
    path.write_text(json.dumps("nothing to cut"))
    with pytest.raises(EvaluationError, match="no passage"):
        task_sources(["last_word"], text=str(path))


def test_perplexity_may_name_the_tokens_of_its_windows(tmp_path):
    assert [text_length(name) for name in ("perplexity", "perplexity-2048")] == [512, 2048]
    for other in ("perplexity-0", "perplexity-", "perplexity-1k", "piqa", "last_word"):
        assert text_length(other) is None
    path = tmp_path / "text.txt"
    path.write_text(paragraph("table."))
    (found,) = task_sources(["perplexity-64"], text=str(path))
    assert (found.name, len(found.rows)) == ("perplexity-64", 1)
