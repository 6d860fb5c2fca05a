"""What tests of comparators share: text, padded batches, and whether a model is as it was."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface

FAMILIES = ("llama", "llama-grouped", "opt")


def text(windows=16, length=48):
    """Windows of random tokens ``[S]`` each."""
    draw = torch.Generator().manual_seed(3)
    return list(torch.randint(3, 97, (windows, length), generator=draw))


def batch(rows=3, length=21):
    draw = torch.Generator().manual_seed(4)
    return torch.randint(3, 97, (rows, length), generator=draw)


@torch.no_grad()
def logits(model, tokens, mask=None):
    return model(tokens, attention_mask=mask).logits


def assert_padding_changes_nothing(model, comparator):
    """Sequences of different lengths, padded on either side, get what each gets by itself."""
    lengths, width = (21, 9, 14), 21
    rows = [row[:length] for row, length in zip(batch(), lengths, strict=True)]
    for left in (True, False):
        tokens = torch.zeros(3, width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        places = [slice(width - n, width) if left else slice(0, n) for n in lengths]
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            tokens[index, place], mask[index, place] = row, 1
        with comparator.attached(model):
            found = logits(model, tokens, mask)
            for index, (row, place) in enumerate(zip(rows, places, strict=True)):
                alone = logits(model, row[None])[0]
                torch.testing.assert_close(found[index, place], alone, atol=2e-4, rtol=1e-4)


def assert_causal(model, comparator):
    """A later token changes nothing before it."""
    tokens = batch()
    other = tokens.clone()
    other[:, 13:] = (other[:, 13:] + 7) % 90 + 3
    with comparator.attached(model):
        first, second = logits(model, tokens), logits(model, other)
    torch.testing.assert_close(first[:, :13], second[:, :13], atol=2e-5, rtol=1e-5)
    assert (first[:, 13:] - second[:, 13:]).abs().max() > 1e-2


def traces(model):
    """What an attached comparator could leave behind."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    tables = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    names = [sorted(table) for table in tables]
    return hooks, names, model.config._attn_implementation, sorted(vars(model))
