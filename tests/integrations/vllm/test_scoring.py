"""Log-likelihoods and tokens that vLLM gives to evaluations, against the Transformers runtime."""

import random
from contextlib import nullcontext

import pytest
import torch
import transformers as tf

from chai_attention.integrations.transformers import enabled
from chai_attention.profile import ClusterProfile
from vllm_job import score
from vllm_profiles import GROUPED, PROFILES

# answers of one token and of several, contexts of one token and longer than a step
SIZES = [(1, 1), (1, 4), (3, 1), (7, 2), (20, 5), (50, 1), (90, 30), (150, 1), (200, 1), (250, 6)]
ROWS, BUDGET = 4, 128


def requests() -> list[tuple[list[int], int]]:
    chosen = random.Random(4)
    return [(chosen.choices(range(3, 256), k=a + b), b) for a, b in SIZES]


@torch.no_grad()
def runtime_scores(folder, profile, asked):
    """The same of the Transformers runtime: each row's log-likelihoods and greedy tokens."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores, likeliest, written = [], [], []
    with nullcontext() if profile is None else enabled(model, profile):
        for tokens, count in asked:
            logits = model(torch.tensor([tokens[:-1]])).logits[0, -count:]
            wanted = torch.tensor(tokens[-count:])
            scores.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist())
            likeliest.append((logits.argmax(-1) == wanted).tolist())
            context = torch.tensor([tokens[:-count]])
            out = model.generate(
                context, attention_mask=torch.ones_like(context), do_sample=False,
                max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            written.append(out[0, context.shape[1] :].tolist())
    return scores, likeliest, written


def save_opt(folder):
    torch.manual_seed(3)
    config = tf.OPTConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=256, ffn_dim=128,
        word_embed_proj_dim=256, max_position_embeddings=255, init_std=0.15, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_neox(folder):
    torch.manual_seed(3)
    config = tf.GPTNeoXConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=256,
        intermediate_size=128, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


FOUR = ClusterProfile(
    (2, 3, 1), "static", representatives=((0, 0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
    streaming=((3,), (1,), (0, 2, 3)), recent=9, sinks=3,
)  # fmt: skip
CASES = {
    "multi-head, as it is": ("tiny", None),
    "multi-head, online window": ("tiny", PROFILES["online window"]),
    "grouped, online streaming": ("tiny_grouped", GROUPED["online"]),
    "opt, streaming": (save_opt, FOUR),
    "gpt_neox, streaming": (save_neox, FOUR),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_and_tokens_are_those_of_the_transformers_runtime(case, engine, request, tmp_path):
    made, profile = CASES[case]
    if isinstance(made, str):
        model = request.getfixturevalue(made)
    else:
        made(model := tmp_path / "model")
    asked = requests()
    longest = max(len(tokens) for tokens, _ in asked)  # one more than the OPT reads
    part = engine(
        model, [score(asked, ROWS, BUDGET)], profile, max_num_seqs=ROWS,
        max_num_batched_tokens=BUDGET, max_model_len=longest, enable_prefix_caching=False,
    )["parts"][0]  # fmt: skip
    scores, likeliest, written = runtime_scores(model, profile, asked)
    online = profile is not None and profile.membership != "static"
    for number, (tokens, count) in enumerate(asked):
        found, greedy = part["score"][str(number)]
        assert found == pytest.approx(scores[number], rel=2e-5, abs=2e-5)
        assert greedy == likeliest[number]
        # an online membership is decided on the prompt, in vLLM; a Transformers run waits
        if not online or len(tokens) - count >= profile.window:
            assert part["write"][str(number)][0] == written[number]


def test_of_equally_likely_tokens_greedy_decoding_takes_the_lowest(engine, tmp_path):
    """As transformers does; in 16 bits one of 40 tokens has an equal at the top."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=256,
        intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # every token has a twin
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    model.save_pretrained(tmp_path)
    contexts = [row for row, _ in requests()[:6]]
    written = [
        model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), do_sample=False,
            max_new_tokens=3, min_new_tokens=3, eos_token_id=None, pad_token_id=0,
        )[0].tolist()
        for row in contexts
    ]  # fmt: skip
    assert all(token % 2 == 0 for row in written for token in row[-3:])
    twins = [[*row[:-1], row[-1] + 1] for row in written]
    asked = [(row, 3) for row in (*written, *twins)]
    found = engine(
        tmp_path, [score(asked, ROWS, BUDGET)], None, max_num_seqs=ROWS,
        max_num_batched_tokens=BUDGET, max_model_len=256, enable_prefix_caching=False,
    )["parts"][0]["score"]  # fmt: skip
    for number in range(6):
        (values, greedy), (others, twin) = found[str(number)], found[str(number + 6)]
        assert greedy == [True] * 3
        assert twin == [True, True, False]
        assert values[-1] == others[-1]  # they are equally likely
