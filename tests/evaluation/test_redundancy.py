"""The redundancy study against maps that transformers' eager attention returns."""

import base64
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from chai_attention.calibration import pairs
from chai_attention.clustering.elbow import elbow
from chai_attention.clustering.kmeans import kmeans
from chai_attention.evaluation.map_pictures import encode
from chai_attention.evaluation.redundancy import (
    default_lengths,
    parse_lengths,
    shown_prompts,
    study,
)
from chai_attention.evaluation.redundancy_files import RedundancyError
from result_files import load_redundancy
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

FAMILIES = ["llama", "llama-grouped", "opt", "gemma2"]
REQUESTS, LENGTH, LENGTHS = 5, 23, [3, 9, 20, 23]
ABOUT = {"sources": ["x"], "seed": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A model, its study, and its maps by eager attention: layer -> [N, H, S, S]."""
    model = tiny_model(request.param)
    windows = torch.randint(3, 97, (REQUESTS, LENGTH), generator=torch.manual_seed(2))
    prompt = ("a prompt", windows[:1, :17], [f"t{i}" for i in range(17)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "ROWS", 7)  # several blocks of queries, across the lengths
        found = study(
            model, windows, name="tiny", text=ABOUT, prompts=[prompt], lengths=[3, 9, 20],
            clusters=3, cells=6, batch_size=2,
        )  # fmt: skip
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(windows, output_attentions=True).attentions
    return found, {layer: one.double().numpy() for layer, one in enumerate(maps)}


def test_layers_and_facts(case):
    found, _ = case
    sliding = found.model["architecture"] == "gemma2"
    assert [layer.layer for layer in found.layers] == ([1, 2] if sliding else [0, 1, 2])
    assert found.lengths == LENGTHS
    assert found.text["requests"] == REQUESTS
    assert found.model["heads"] == 6
    assert found.machine["torch"] == torch.__version__


def test_correlation_is_numpys(case):
    found, maps = case
    row, column = np.tril_indices(LENGTH)
    inner = column > 0
    for layer in found.layers:
        entries = maps[layer.layer][:, :, row, column]  # [N, H, entries]
        whole = entries.transpose(1, 0, 2).reshape(6, -1)
        rest = entries[:, :, inner].transpose(1, 0, 2).reshape(6, -1)
        np.testing.assert_allclose(layer.correlation, np.corrcoef(whole), atol=2e-4)
        np.testing.assert_allclose(layer.without_first, np.corrcoef(rest), atol=2e-4)
        first = maps[layer.layer][..., 0].mean()
        assert layer.first_share == pytest.approx(first, abs=1e-4)


def test_inertia_and_elbow(case):
    found, maps = case
    for layer in found.layers:
        points = torch.tensor(maps[layer.layer]).transpose(0, 1).flatten(1)  # [H, N * S * S]
        gram = points @ points.T
        for k in (1, 3, 6):
            rep = kmeans(gram[None], k)
            spread = 0.0
            for head in set(rep[0].tolist()):
                members = points[rep[0] == head]
                spread += float((members - members.mean(0)).square().sum())
            assert layer.inertia[k - 1] == pytest.approx(spread / REQUESTS, rel=1e-3, abs=1e-6)
        assert layer.elbow == elbow(
            list(range(1, 7)), [e / layer.inertia[0] for e in layer.inertia]
        )
        assert layer.representatives == kmeans(gram[None], 3)[0].tolist()
        assert sum(layer.sizes) == 6
        assert len(layer.sizes) == 3


def memberships(maps, layer, request):
    """By the maps of the first n queries, for every length."""
    found = []
    for n in LENGTHS:
        points = torch.tensor(maps[layer][request, :, :n, :n]).flatten(1)
        found.append(kmeans((points @ points.T)[None], 3)[0].tolist())
    return found


def test_stability(case):
    found, maps = case
    for layer in found.layers:
        rows = [memberships(maps, layer.layer, request) for request in range(REQUESTS)]
        points = torch.tensor(maps[layer.layer]).flatten(2)  # [N, H, S * S]
        others = []
        for request in range(REQUESTS):
            rest = torch.cat([points[n] for n in range(REQUESTS) if n != request], 1)
            others.append(kmeans((rest @ rest.T)[None], 3)[0].tolist())
        for i in range(4):
            for j in range(4):
                scores = [adjusted_rand_score(row[i], row[j]) for row in rows]
                assert layer.stability.agreement[i][j] == pytest.approx(np.mean(scores), abs=1e-4)
                error = np.std(scores, ddof=1) / math.sqrt(REQUESTS)
                assert layer.stability.agreement_error[i][j] == pytest.approx(error, abs=1e-4)
            fixed = [adjusted_rand_score(row[i], o) for row, o in zip(rows, others, strict=True)]
            assert layer.stability.static[i] == pytest.approx(np.mean(fixed), abs=1e-4)
        assert layer.stability.kept[0] == 1
    mean = np.mean([layer.stability.agreement for layer in found.layers], axis=0)
    np.testing.assert_allclose(found.stability.agreement, mean, atol=2e-4)


def decode(text, heads, cells):
    """Probabilities from `encode`'s text, zeros above the diagonal."""
    values = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    maps = torch.zeros(heads, cells, cells)
    rows, columns = torch.tril_indices(cells, cells)
    maps[:, rows, columns] = (values.view(heads, -1).float() / 255).square()
    return maps


def test_maps_of_a_prompt(case):
    found, maps = case
    (prompt,) = found.prompts
    assert (prompt.block, prompt.lengths) == (3, [3, 9, 17])
    place = np.arange(17) // 3
    for index, layer in enumerate(found.layers):
        whole = maps[layer.layer][0, :, :17, :17]
        pooled = np.zeros((6, 6, 6))
        for i in range(6):
            for j in range(6):
                pooled[:, i, j] = whole[:, place == i][:, :, place == j].sum(2).mean(1)
        shown = decode(prompt.maps[index], 6, 6)
        np.testing.assert_allclose(shown.sqrt(), np.sqrt(pooled), atol=0.51 / 255 + 1e-5)
        assert prompt.representatives[index][:2] == memberships(maps, layer.layer, 0)[:2]


def test_file_comes_back(case, tmp_path):
    found, _ = case
    assert load_redundancy(found.save(tmp_path / "new" / "redundancy.json")) == found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(kind="x"), "of this release"),
        (lambda d: d.update(schema_version=9), "schema version is 9"),
        (lambda d: d.pop("lengths"), "lengths.* is missing|other fields"),
        (lambda d: d["layers"][0].update(more=1), "LayerRedundancy has other fields"),
        (lambda d: d["layers"][0]["correlation"].pop(), "correlation has length 5"),
        (lambda d: d["layers"][0]["inertia"].__setitem__(0, "x"), "inertia holds 'x'"),
        (lambda d: d["layers"][1].update(representatives=[1, 0, 0, 0, 0, 0]), "membership"),
        (lambda d: d["layers"][0]["stability"]["kept"].append(1.0), "kept has length 5"),
        (lambda d: d["prompts"][0]["maps"].__setitem__(0, "AAAA"), "maps of another size"),
        (lambda d: d.update(layers=[]), "other layers"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(case, tmp_path, change, reason):
    path = case[0].save(tmp_path / "redundancy.json")
    data = json.loads(path.read_text())
    del data["checksum"]  # what is meant here is damaged with care
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(RedundancyError, match=reason) as caught:
        load_redundancy(path)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(RedundancyError, match=name):
            load_redundancy(tmp_path / name)


def test_elbow_decides_and_trivial_layers_have_no_stability():
    model = tiny_model("llama")
    windows = torch.randint(3, 97, (3, 12))
    found = study(model, windows, name="m", text=ABOUT)
    assert found.lengths == [5, 12]
    assert all(layer.clusters == layer.elbow for layer in found.layers)
    for clusters in (1, 6):
        whole = study(model, windows, name="m", text=ABOUT, clusters=clusters)
        assert whole.stability is None
        assert all(layer.stability is None for layer in whole.layers)
    assert study(model, windows, name="m", text=ABOUT) == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lengths": [5, 3]}, "ascending"),
        ({"lengths": [0, 3]}, "ascending"),
        ({"lengths": [5, 13]}, "1 to 12"),
        ({"clusters": 7}, "1 to 6"),
        ({"windows": torch.ones(1, 12, dtype=torch.long)}, "at least 2 requests"),
    ],
)
def test_what_cannot_be_studied(changes, reason):
    options = {"windows": torch.randint(3, 97, (3, 12)), **changes}
    with pytest.raises(RedundancyError, match=reason):
        study(tiny_model("llama"), name="m", text=ABOUT, **options)


def test_lengths():
    assert default_lengths(256) == [5, 16, 32, 64, 128, 256]
    assert default_lengths(100) == [5, 16, 32, 64, 100]
    assert default_lengths(4) == [4]
    assert parse_lengths("5,32") == [5, 32]
    with pytest.raises(RedundancyError, match="whole numbers"):
        parse_lengths("5,x")


def test_shown_prompts():
    windows = torch.arange(10, 30).view(2, 10)
    tokenizer = tiny_tokenizer()
    shown = shown_prompts(tokenizer, windows, 1, ["some text " * 10], most=200)
    assert [name for name, _, _ in shown] == ["request 1", f"{('some text ' * 10)[:39]}…"]
    assert shown[0][1].tolist() == [list(range(10, 20))]
    assert "".join(shown[1][2]) == "some text " * 10
    for text in ("a", "long " * 50):
        with pytest.raises(RedundancyError, match="2 to 200"):
            shown_prompts(tokenizer, windows, 1, [text], most=200)


def test_bytes_of_maps_are_local_the_maps():
    maps = torch.rand(3, 5, 5).tril()
    back = decode(encode(maps), 3, 5)
    torch.testing.assert_close(back.sqrt(), maps.sqrt(), atol=0.5 / 255 + 1e-6, rtol=0)
