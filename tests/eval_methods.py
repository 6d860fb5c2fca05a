"""Comparators, models and items for tests of evaluations."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, nullcontext

import torch
import transformers as tf
from transformers.cache_utils import DynamicCache

from chai_attention.errors import EvaluationError
from chai_attention.evaluation.comparators.base import Comparator
from chai_attention.integrations.transformers import enabled
from chai_attention.integrations.transformers.modules import attention_modules
from chai_attention.profile import ClusterProfile
from tiny_models import COMMON, CONFIGS
from tiny_tokenizer import tiny_tokenizer

LENGTH = 512


def eval_model(family):
    """A tiny model with room for items spelled in single characters."""
    torch.manual_seed(5)
    config = CONFIGS[family]()
    config.max_position_embeddings = LENGTH
    config.initializer_range = 0.2
    return tf.AutoModelForCausalLM.from_config(config).eval()


def load(family):
    """The same with its tokenizer, for processes of their own."""
    return eval_model(family), tiny_tokenizer()


class Plain(Comparator):
    """The model as it is."""

    source = "the model itself"

    def __init__(self, name="mha"):
        self.name = name

    def attached(self, model):
        return nullcontext()

    def kv_share(self, model, length):
        return 1.0

    def settings(self):
        return {"kind": type(self).__name__}


class OwnCache(Plain):
    """The model's own cache, in two calls."""

    needs_cache = True


class GivenCache(OwnCache):
    """The same with a cache that is handed in."""

    def new_cache(self, model):
        return DynamicCache(config=model.config)


class Evicting(OwnCache):
    """Leaves every third token of the context out of the cache, and changes V of the others."""

    @contextmanager
    def attached(self, model):
        def hook(module, args, kwargs, out):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            if layer.keys.shape[2] == kwargs.get("hidden_states", *args).shape[1]:
                kept = left(layer.keys.shape[2])
                layer.keys, layer.values = layer.keys[:, :, kept], 2 * layer.values[:, :, kept]

        modules = attention_modules(model).values()
        hooks = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
        yield
        for each in hooks:
            each.remove()


def left(tokens):
    return torch.arange(tokens) % 3 != 1


class Clustered(Plain):
    """A profile with an online membership, by default one decided by the first 5 tokens."""

    def __init__(self, name="clustered", window=5):
        super().__init__(name)
        layers = COMMON["num_hidden_layers"]
        self.profile = ClusterProfile((2,) * layers, window=window)

    def attached(self, model):
        return enabled(model, self.profile)

    def kv_share(self, model, length):
        return 0.5 + 1 / length

    def settings(self):
        return {"window": self.profile.window}


MADE = {"mha": Plain, "own": OwnCache, "clustered": Clustered}


class Failing(Plain):
    """Fails where it is scored, in one of several ways."""

    def __init__(self, name, how):
        super().__init__(name)
        self.how = how

    def attached(self, model):
        if self.how == "refuses":
            raise EvaluationError("not this model")
        if self.how == "breaks":
            raise KeyError("broken")
        os.kill(os.getpid(), signal.SIGKILL)


def files(folder):
    """Contents of all files by their paths."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def arc_rows(count=7):
    """Items of very uneven length in ARC's columns."""
    rows = []
    for number in range(count):
        words = ["why", "is", "it", "so"] * (1 + (number * 5) % 11)
        choices = ["of " * (1 + (number + i * 3) % 5) + "x" for i in range(4)]
        rows.append(
            {
                "id": str(number),
                "question": f"{number} {' '.join(words)}?",
                "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[number % 4],
            }
        )
    return rows
