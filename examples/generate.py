"""Generate with and without clustered heads, and compare the K,V caches.

python examples/generate.py --profile profile.json [--model MODEL] [--prompt "..."]
"""

import argparse

import torch
from transformers import DynamicCache

from chai_attention import ClusteredCache, ClusterProfile, enabled
from chai_attention.integrations.transformers.loading import load_model


def main() -> None:
    """Generate twice from one prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a folder or a name on the hub")
    parser.add_argument("--profile", required=True, help="what chai calibrate wrote")
    parser.add_argument("--prompt", default="The history of Rome begins with")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    profile = ClusterProfile.load(args.profile)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    with torch.no_grad():
        plain = model.generate(
            **inputs, past_key_values=DynamicCache(config=model.config), **options
        )
        with enabled(model, profile):  # or enable(model, profile), until disable(model)
            cache = ClusteredCache(model, profile)
            clustered = model.generate(**inputs, past_key_values=cache, **options)

    start = inputs["input_ids"].shape[1]
    print("full:     ", tokenizer.decode(plain[0, start:], skip_special_tokens=True))
    print("clustered:", tokenizer.decode(clustered[0, start:], skip_special_tokens=True))
    memory = cache.memory()
    print(
        f"K,V cache of {clustered.shape[1] - 1} tokens: {memory.total_bytes:,} bytes in place of "
        f"{memory.full_bytes:,} ({memory.saved:.1%} saved)"
    )


if __name__ == "__main__":
    main()
